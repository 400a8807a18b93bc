"""The ops: each a public function here, a contract in its file, and kernels behind it."""

from pyfinetune.ops._lora_linear_group import lora_linear_group
from pyfinetune.ops.glu import geglu, swiglu
from pyfinetune.ops.linear_cross_entropy import linear_cross_entropy
from pyfinetune.ops.lora_linear import lora_linear
from pyfinetune.ops.nf4 import Packed4bit, dequantize_4bit, quantize_4bit
from pyfinetune.ops.rms_norm import rms_norm
from pyfinetune.ops.rope import rope
from pyfinetune.ops.varlen_attn import varlen_attn

__all__ = [
    "Packed4bit",
    "dequantize_4bit",
    "geglu",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linear_group",
    "quantize_4bit",
    "rms_norm",
    "rope",
    "swiglu",
    "varlen_attn",
]
