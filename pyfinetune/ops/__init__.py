"""The ops: each a public function here, a contract in its file, and kernels behind it."""

from pyfinetune.ops.glu import geglu, swiglu
from pyfinetune.ops.lora_linear import lora_linear
from pyfinetune.ops.nf4 import Packed4bit, dequantize_4bit, quantize_4bit
from pyfinetune.ops.rms_norm import rms_norm
from pyfinetune.ops.rope import rope
from pyfinetune.ops.varlen_attn import varlen_attn

__all__ = ["Packed4bit", "dequantize_4bit", "lora_linear", "quantize_4bit", "varlen_attn"]


def linear_cross_entropy(hidden, weight, labels, bias=None, *, ignore_index=-100, num_items=None, shift=False):
    import torch

    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if shift:
        logits = logits[:, :-1]
        labels = labels[:, 1:]
    l = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        ignore_index=ignore_index,
        reduction="mean" if num_items is None else "sum",
    )
    return l if num_items is None else l / num_items
