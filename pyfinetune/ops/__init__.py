"""The ops: each a public function here, a contract in its file, and kernels behind it."""

from pyfinetune.ops.lora_linear import lora_linear
from pyfinetune.ops.nf4 import Packed4bit, dequantize_4bit, quantize_4bit
from pyfinetune.ops.varlen_attn import varlen_attn

__all__ = ["Packed4bit", "dequantize_4bit", "lora_linear", "quantize_4bit", "varlen_attn"]
