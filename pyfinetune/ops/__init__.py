"""The ops: each a public function here, a contract in its file, and kernels behind it."""

from pyfinetune.ops.glu import geglu, swiglu
from pyfinetune.ops.lora_linear import lora_linear
from pyfinetune.ops.nf4 import Packed4bit, dequantize_4bit, quantize_4bit
from pyfinetune.ops.rms_norm import rms_norm
from pyfinetune.ops.rope import rope

__all__ = [
    "Packed4bit",
    "dequantize_4bit",
    "geglu",
    "lora_linear",
    "quantize_4bit",
    "rms_norm",
    "rope",
    "swiglu",
]
