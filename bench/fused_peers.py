"""Peers that come as one function: what torch compiles, and the fused GPU kernels of other packages.

Each package is called by its public functions. Where it is missing on a GPU the reason is told; on a CPU these packages
have nothing to offer, which the list of peers says once.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from types import SimpleNamespace

import torch

from pyfinetune.bench.peer_names import FLASH, FLEX, LIGER, UNSLOTH, VARLEN

_LIGER, _UNSLOTH, _FLASH = "liger_kernel.transformers.functional", "unsloth.kernels", "flash_attn"


def compiled(function: Callable) -> Callable:
    """The function as torch compiles it, which happens at the first call, as does the import of the compiler."""

    @functools.cache
    def made() -> Callable:
        return torch.compile(function, dynamic=False)

    def call(*args, **more):
        return made()(*args, **more)

    return call


def _found(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(module), name)


def _liger_norm(eps: float) -> Callable:
    function = _found(_LIGER, "liger_rms_norm")
    # Its backward pass would write over the caller's gradient.
    return lambda x, weight: function(x, weight, eps, in_place=False)


def _unsloth_norm(eps: float) -> Callable:
    function = _found(_UNSLOTH, "fast_rms_layernorm")
    return lambda x, weight: function(SimpleNamespace(weight=weight, variance_epsilon=eps), x)


def _unsloth_swiglu() -> Callable:
    """Forward only: its backward pass is a part of its whole feed-forward block's."""
    function = _found(_UNSLOTH, "swiglu_fg_kernel")
    return lambda gate, up: function(gate[None], up[None])[0]


def _liger_head() -> Callable:
    function = _found(_LIGER, "liger_fused_linear_cross_entropy")
    return lambda hidden, weight, labels, reduction="mean": function(hidden, weight, labels, reduction=reduction)


def _unsloth_decode() -> Callable:
    """A function of bitsandbytes' codes and quantization state."""
    return _found(_UNSLOTH, "fast_dequantize")


# Liger comes last: some of its backward passes write over what they were given.
_MAKERS: dict[str, dict[str, Callable[..., Callable]]] = {
    "rms_norm": {UNSLOTH: _unsloth_norm, LIGER: _liger_norm},
    "swiglu": {LIGER: lambda: _found(_LIGER, "liger_swiglu")},
    "swiglu forward": {UNSLOTH: _unsloth_swiglu, LIGER: lambda: _found(_LIGER, "liger_swiglu")},
    "geglu": {LIGER: lambda: _found(_LIGER, "liger_geglu")},
    "rope": {LIGER: lambda: _found(_LIGER, "liger_rope")},
    "head": {LIGER: _liger_head},
    "decode": {UNSLOTH: _unsloth_decode},
}


def functions(what: str, device: torch.device, **options) -> tuple[dict[str, Callable], dict[str, str]]:
    """Other packages' kernels by the peer's name, and why those are missing that a GPU could run.

    Args:
        what: "rms_norm", "swiglu", "geglu", "rope", "head" or "decode"; of anything else there are none.
        device: where they would run.
        options: of that op, `eps` for a norm.
    """
    if device.type != "cuda":
        return {}, {}
    found, missing = {}, {}
    for name, maker in _MAKERS.get(what, {}).items():
        try:
            found[name] = maker(**options)
        except (ImportError, AttributeError, NotImplementedError) as error:
            missing[name] = f"not to be had ({type(error).__name__}: {error})"
    return found, missing


def _flash_varlen(bounds: list[int], device: torch.device) -> Callable:
    function = _found(_FLASH, "flash_attn_varlen_func")
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(end - start for start, end in itertools.pairwise(bounds))
    return lambda q, k, v: function(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)


def _varlen(bounds: list[int], device: torch.device) -> Callable:
    from pyfinetune.bench.gpu_attention import torch_varlen

    return torch_varlen(bounds, device)


def _flex(bounds: list[int], device: torch.device) -> Callable:
    if device.type == "cuda":
        from pyfinetune.bench.gpu_attention import torch_flex

        return torch_flex(bounds, device)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = torch.repeat_interleave(torch.tensor([end - start for start, end in itertools.pairwise(bounds)]))

    def visible(batch, head, query, key):
        return (document[query] == document[key]) & (query >= key)

    mask = create_block_mask(visible, None, None, bounds[-1], bounds[-1], device="cpu")
    function = compiled(flex_attention)

    def attention(q, k, v):
        # On a CPU it compiles for whole tensors of four dimensions only, not for views of others.
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
        return function(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attention


def attentions(
    bounds: list[int], device: torch.device, dtype: torch.dtype, backward: bool
) -> tuple[dict[str, Callable], dict[str, str]]:
    """Functions of q, k, v [tokens, heads, head_dim] over packed documents, and why some are missing.

    Args:
        bounds: where each document begins, and where the last one ends.
        device: where they would run.
        dtype: of q, k and v; what is built on FlashAttention takes half precision only.
        backward: whether gradients are wanted.
    """
    found, missing = {}, {}
    makers = {FLEX: _flex}
    if device.type == "cuda" and dtype != torch.float32:
        makers |= {VARLEN: _varlen, FLASH: _flash_varlen}
    if device.type == "cpu" and backward:
        del makers[FLEX]
        missing[FLEX] = "has no backward pass on a CPU"
    for name, maker in makers.items():
        if name == FLASH:
            try:
                _found(_FLASH, "flash_attn_varlen_func")
            except (ImportError, AttributeError) as error:
                missing[name] = f"not to be had ({type(error).__name__}: {error})"
                continue
        found[name] = _when_called(functools.partial(maker, bounds, device))
    return found, missing


def _when_called(maker: Callable[[], Callable]) -> Callable:
    """What the maker makes, made at the first call: a mask costs time and memory, and may not be asked for."""
    made = functools.cache(maker)

    def attention(q, k, v):
        return made()(q, k, v)

    return attention
