"""The Triton backend of `linear_cross_entropy`: how many tokens at a time, and the way to the kernels.

See kernels/linear_cross_entropy.py.
"""

from __future__ import annotations

import torch

from pyfinetune.ops._triton import configuration, kernels, on_device_of, triton_dtypes, triton_why_not

# Products over fewer tokens would leave a large GPU partly idle, and read the whole weight for each few of them.
MIN_ROWS = 1024
LOGITS_BYTES = 256 << 20
# Where the weight trains, each chunk reads and writes all of its float32 gradient: what that holds anyway is a measure
# of what the logits may, and the larger the chunk, the less of the time goes there.
_OF_D_WEIGHT = 4
_TILE = 128


def chunk_rows(tokens: int, vocab: int, width: int, item: int, workspace_bytes: int, need_dweight: bool) -> int:
    """How many tokens' logits are held at a time: equal chunks, of whole tiles where they are larger than one."""
    row = max(1, kernels("linear_cross_entropy").padded_vocabulary(vocab) * item)
    if workspace_bytes:
        most = max(1, workspace_bytes // row)
    else:
        budget = max(LOGITS_BYTES, vocab * width * 4 // _OF_D_WEIGHT if need_dweight else 0)
        most = max(MIN_ROWS, budget // row)
    if most >= tokens:
        return max(1, tokens)
    most = max(1, most // _TILE) * _TILE if most >= _TILE else most
    even = -(-tokens // -(-tokens // most))
    return min(most, -(-even // _TILE) * _TILE)


def _head(args: tuple, needs: tuple) -> tuple:
    hidden, weight, labels, bias, ignore_index, softcap, workspace_bytes = args
    sizes = (*hidden.shape, hidden.element_size())
    rows = chunk_rows(sizes[0], weight.shape[0], sizes[1], sizes[2], workspace_bytes, needs[1])
    return hidden, weight, labels, bias, ignore_index, softcap, rows, needs


def forward(*args):
    """Schema: see `linear_cross_entropy`."""
    with on_device_of(args[0]):
        losses, *grads = kernels("linear_cross_entropy").linear_cross_entropy(*_head(args[:7], args[8:]))
    return losses if args[7] else losses.sum(dtype=torch.float64).float(), *grads


def configuration_of(capability: int | None, *args):
    """A `Backend.configuration` of `linear_cross_entropy`."""

    def describe(on: int):
        hidden, weight, *_rest, rows, needs = _head(args[:7], args[8:])
        return kernels("linear_cross_entropy").describe(on, hidden, weight, min(rows, hidden.shape[0]), any(needs))

    return configuration(args[0], capability, describe)


def backward(dout, *args):
    """Schema: see `linear_cross_entropy_bwd`."""
    hidden, bias = args[0], args[3]
    with on_device_of(hidden):
        backward = kernels("linear_cross_entropy").linear_cross_entropy_bwd
        d_hidden, d_weight, d_bias = backward(dout, *_head(args[:7], args[7:]))
    return d_hidden, d_weight, d_bias.to(hidden.dtype if bias is None else bias.dtype)


def scale(grad, factors, dtype):
    """Schema: see `linear_cross_entropy_scale`."""
    with on_device_of(grad):
        return kernels("linear_cross_entropy").linear_cross_entropy_scale(grad, factors, dtype)


def scale_why_not(grad, factors, dtype) -> str | None:
    """Why the kernel cannot scale this gradient, or None."""
    if dtype not in triton_dtypes():
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    return triton_why_not(grad, factors)
