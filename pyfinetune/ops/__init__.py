"""The ops: each a public function here, a contract in its file, and kernels behind it."""

from pyfinetune.ops._lora_linear_group import lora_linear_group
from pyfinetune.ops.lora_linear import lora_linear
from pyfinetune.ops.nf4 import Packed4bit, dequantize_4bit, quantize_4bit

__all__ = ["Packed4bit", "dequantize_4bit", "lora_linear", "lora_linear_group", "quantize_4bit"]
