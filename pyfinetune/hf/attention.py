"""Attention of any model that goes through `AttentionInterface`, on `pf.ops.varlen_attn`.

The mask interface is registered beside it: flash attention's, which hands the 2-D mask through. Without it padding
would be dropped in silence.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from pyfinetune.errors import InvalidInput
from pyfinetune.hf.documents import Documents, documents_of
from pyfinetune.hf.probe import Candidate, Proof, Widened, compare, run_with_grads
from pyfinetune.ops import varlen_attn
from pyfinetune.ops._checks import FLOATS
from pyfinetune.ops._op import explain

_logger = logging.get_logger(__name__)

KIND = "attention"
NAME = "pyfinetune"


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """What `AttentionInterface` calls: q [B, H, S, D], k and v [B, H_kv, S_k, D] -> [B, S, H, D_v].

    Arguments that are not named here do not change the result, but for those in `_UNSUPPORTED`.

    Raises:
        InvalidInput: the model asks for something that the op does not compute.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    asked = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if asked:
        raise InvalidInput(f"attention: {', '.join(asked)} is not supported; set_attn_implementation('eager')")
    if others.get("output_attentions") and not torch.compiler.is_compiling():
        _logger.warning_once("pyfinetune's attention has no weights to give; set_attn_implementation('eager') for them")
    batch, heads, q_length, _ = query.shape
    k_length, window = key.shape[2], (-1, -1)
    if sliding_window is not None:
        window = (sliding_window - 1, sliding_window - 1)
    given_mask = attention_mask is not None and attention_mask.dim() != 2
    documents = None
    if not given_mask:
        documents = documents_of(
            batch, q_length, k_length, attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k, query.device
        )
    if given_mask or dropout:
        mask = attention_mask if given_mask else _dense_mask(documents, batch, q_length, k_length, causal, window)
        options = {"softcap": softcap} if softcap else {}
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False, **options)
    q, k, v = (
        _tokens(t, kept) for t, kept in ((query, documents.kept_q), *((t, documents.kept_k) for t in (key, value)))
    )
    out = varlen_attn(
        q,
        k,
        v,
        documents.cu_q,
        documents.cu_k,
        causal=causal,
        softmax_scale=scaling,
        window_size=window,
        softcap=softcap or 0.0,
    )
    if documents.kept_q is not None:
        out = out.new_zeros(batch * q_length, heads, out.shape[-1]).index_copy(0, documents.kept_q, out)
    return out.view(batch, q_length, heads, -1), None


_UNSUPPORTED = ("s_aux", "position_bias", "cache")


def _tokens(states: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """[B, H, S, D] -> [tokens, H, D]; a view where nothing is dropped and the memory allows it."""
    flat = states.transpose(1, 2).reshape(-1, states.shape[1], states.shape[3])
    return flat if kept is None else flat[kept]


def _dense_mask(
    documents: Documents, batch: int, q_length: int, k_length: int, causal: bool, window: tuple[int, int]
) -> torch.Tensor:
    """[B, 1, S, S_k], true where a query may see a key: for what only a dense path computes."""

    def places(cu: torch.Tensor, kept: torch.Tensor | None, length: int, other: torch.Tensor) -> torch.Tensor:
        """Document and position, counted from the document's end, of each flat token; -1 outside of documents."""
        found = torch.full((2, batch * length), -1, device=cu.device)
        lengths = (cu[1:] - cu[:-1]).long()
        document = torch.repeat_interleave(torch.arange(len(lengths), device=cu.device), lengths)
        offset = torch.arange(len(document), device=cu.device) - cu[:-1].long()[document]
        # Aligned at the end: the last query sees the last key.
        offset += ((other[1:] - other[:-1]).long() - lengths)[document] if causal or window[0] >= 0 else 0
        found[:, slice(len(document)) if kept is None else kept] = torch.stack([document, offset])
        return found.view(2, batch, length)

    document_q, place_q = places(documents.cu_q, documents.kept_q, q_length, documents.cu_k)
    document_k, place_k = places(documents.cu_k, documents.kept_k, k_length, documents.cu_k)
    distance = place_q[:, :, None] - place_k[:, None, :]
    allowed = document_q[:, :, None] == document_k[:, None, :]
    if causal:
        allowed &= distance >= 0
    if window[0] >= 0:
        allowed &= (distance <= window[0]) & (distance >= -window[1])
    return allowed[:, None]


def restore(module: nn.Module) -> None:
    """Give a model back the attention it would have had; anything else is left alone."""
    if isinstance(module, PreTrainedModel) and module.config._attn_implementation == NAME:
        module.set_attn_implementation("sdpa" if module._supports_sdpa else "eager")


class AttentionSwitch:
    """A model's attention goes through the name under which ours is registered.

    Args:
        model: the model whose `set_attn_implementation` is called.
    """

    def __init__(self, model: PreTrainedModel):
        self._model, self._before = weakref.ref(model), model.config._attn_implementation

    def apply(self) -> None:
        """Switch to ours."""
        self._set(NAME)

    def revert(self) -> None:
        """Switch back."""
        self._set(self._before)

    def obstacle(self) -> str | None:
        """The implementation that somebody has switched to since."""
        model = self._model()
        current = None if model is None else model.config._attn_implementation
        return None if current in (None, NAME, self._before) else f"attention has become {current}"

    def _set(self, name: str) -> None:
        model = self._model()
        if model is not None:
            model.set_attn_implementation(name)


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every outermost model of transformers in it."""
    inner: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or id(module) in inner:
            continue
        inner.update(map(id, module.modules()))
        reason = _why_not(module)
        if reason is not None:
            yield Candidate(KIND, name, module, None, reason, None, None)
            continue
        prove = functools.partial(_prove, module)
        yield Candidate(KIND, name, module, AttentionSwitch(module), None, (KIND, id(module)), prove)


def _why_not(model: PreTrainedModel) -> str | None:
    current = model.config._attn_implementation
    if current == NAME:
        return "already patched"
    if not (getattr(model, "_supports_attention_backend", False) and getattr(model, "_supports_flash_attn", False)):
        return "its attention does not go through AttentionInterface"
    if current != "sdpa" and not (current == "eager" and not model._supports_sdpa):
        return f"attn_implementation={current!r} was chosen"
    if any(name.rsplit(".", 1)[-1] == "sinks" for name, _ in model.named_parameters()):
        return "no kernel for attention sinks"
    if model.device.type == "meta":
        return "it is on the meta device"
    if model.dtype not in FLOATS:
        return f"the model is {model.dtype}"
    return None


def _shape_of(model: PreTrainedModel) -> tuple[int, int, int]:
    """Heads, key-value heads and head_dim, as far as the configuration says."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_head", 4)
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 64 * heads) // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, size


def _prove(model: PreTrainedModel) -> tuple[Proof, str]:
    """Our function against the one it replaces, on two rows of a model's shape."""
    heads, kv_heads, size = _shape_of(model)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(model.dtype).to(model.device)

    shapes = {"query": heads, "key": kv_heads, "value": kv_heads}
    inputs = {name: normal(2, count, 33, size).requires_grad_() for name, count in shapes.items()}
    dout = normal(2, 33, heads, size)
    module = types.SimpleNamespace(is_causal=True, num_key_value_groups=heads // kv_heads, training=False)

    def run(function, values):
        return run_with_grads(lambda leaves: function(module, *leaves.values(), None)[0], values, dout)

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with Widened():
        exact = run(sdpa, {name: value.detach().double().requires_grad_() for name, value in inputs.items()})
    proof = compare(run(attention, inputs), run(sdpa, inputs), exact, model.dtype)
    q, k, v = (_tokens(value.detach(), None) for value in inputs.values())
    cu_seqlens = torch.tensor([0, 33, 66], dtype=torch.int32, device=model.device)
    return proof, explain("varlen_attn", q, k, v, cu_seqlens).backend


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
