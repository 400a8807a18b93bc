"""Attention blocks with projections and rotary embedding, on `pf.ops.rope` around the attention that is set.

Models differ in what stands between the projections and the attention: norms of q and k, by head or over all heads,
biases, a partial rotation or none, one fused projection or three. The forward here covers these by what the block
has; what a block passes on to the attention (scale, window, cap) is not guessed but recorded from the original.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pyfinetune.hf.attention import NAME
from pyfinetune.hf.changes import ClassSwap
from pyfinetune.hf.fast_class import Fast, fast_class
from pyfinetune.hf.groups import shared_input
from pyfinetune.hf.probe import Candidate, Proof, Widened, attempt, compare, run_with_grads, twin_of, why_own_forward
from pyfinetune.ops import rope
from pyfinetune.ops._checks import FLOATS
from pyfinetune.ops._op import explain

KIND = "attention block"
_PROBE = f"{NAME}_probe"
_NORMS = ("q_norm", "k_norm")


class Layout(NamedTuple):
    """What a family of blocks calls its parts: projections in and out, the size of a head, the argument of a cache."""

    inward: tuple[str, ...]
    outward: str
    head_dim: str = "head_dim"
    cache: str = "past_key_values"

    @property
    def projections(self) -> tuple[str, ...]:
        return (*self.inward, self.outward)


_BY_HEAD = Layout(("query_key_value",), "dense", "head_size", "layer_past")  # q, k and v of a head side by side
_LAYOUTS = (Layout(("q_proj", "k_proj", "v_proj"), "o_proj"), Layout(("qkv_proj",), "o_proj"), _BY_HEAD)
_CACHES = {"past_key_values", "past_key_value", "layer_past"}


class FastAttention(Fast):
    """The forward that the swapped classes share; what is set on the class made for each original says the rest."""

    layout: Layout
    rotates: bool
    options: tuple[tuple[str, Any], ...]  # what the original passes to the attention beside its arguments

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        name, layout = self.config._attn_implementation, self.layout
        if name not in (NAME, _PROBE) or position_embeddings is None or kwargs.keys() & (_CACHES - {layout.cache}):
            return super().forward(
                hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
            )
        query, key, value = self._states(hidden_states)
        if self.rotates:
            query, key = rope(query, key, *position_embeddings)
        cache = kwargs.pop(layout.cache, None)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        dropout = self.attention_dropout if self.training else 0.0
        attend = ALL_ATTENTION_FUNCTIONS[name]
        options = {"dropout": dropout, **dict(self.options), **kwargs}
        out, weights = attend(self, query, key, value, attention_mask, **options)
        return getattr(self, layout.outward)(out.reshape(*hidden_states.shape[:-1], -1)), weights

    def _states(self, x: torch.Tensor) -> list[torch.Tensor]:
        """q, k and v as [B, heads, S, head_dim] views of what the projections wrote."""
        inward = [getattr(self, name) for name in self.layout.inward]
        head_dim = getattr(self, self.layout.head_dim)
        if self.layout == _BY_HEAD:
            return list(inward[0](x).view(*x.shape[:-1], -1, 3 * head_dim).transpose(1, 2).chunk(3, dim=-1))
        if len(inward) == 1:
            kv = self.num_key_value_heads * head_dim
            fused = inward[0](x)
            states = list(fused.split([fused.shape[-1] - 2 * kv, kv, kv], dim=-1))
        else:
            states = shared_input(inward, x)
        for i, norm in enumerate([*(getattr(self, name, None) for name in _NORMS), None]):
            wide = norm is not None and norm.weight.shape[0] != head_dim  # over all heads
            state = norm(states[i]) if wide else states[i]
            state = state.view(*x.shape[:-1], -1, head_dim)
            states[i] = (state if norm is None or wide else norm(state)).transpose(1, 2)
        return states


def _record(module: nn.Module, query, key, value, attention_mask, scaling=1.0, **options):
    """Plain attention that notes what it was passed."""
    module.seen.append({"scaling": scaling, **options})
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register(_PROBE, _record)


def _layout_of(module: nn.Module) -> Layout | None:
    """What the block calls its parts, if it is built like one."""
    for layout in _LAYOUTS:
        found = all(isinstance(getattr(module, name, None), nn.Module) for name in layout.projections)
        if found and all(hasattr(module, name) for name in ("config", "attention_dropout", layout.head_dim)):
            return layout
    return None


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every module that is built like an attention block."""
    for name, module in model.named_modules():
        layout = _layout_of(module)
        if layout is None:
            continue
        reason = _why_not(module, layout)
        if reason is not None:
            yield Candidate(KIND, name, module, None, reason, None, None)
            continue
        trial = _Trial(module, layout)
        options, reason = attempt(trial.options)
        if reason is not None:
            yield Candidate(KIND, name, module, None, reason, None, None)
            continue
        facts = {"rotates": bool(getattr(module, "use_rope", True)), "options": tuple(sorted(options.items()))}
        fast = fast_class(FastAttention, type(module), layout=layout, **facts)
        signature = (fast, trial.heads, trial.kv_heads, trial.head_dim, trial.rotary_dim, trial.dtype)
        yield Candidate(
            KIND, name, module, ClassSwap(module, fast), None, signature, functools.partial(trial.prove, fast)
        )


def _why_not(module: nn.Module, layout: Layout) -> str | None:
    if isinstance(module, FastAttention):
        return "already patched"
    own = why_own_forward(module)
    if own is not None:
        return own
    if any(parameter.is_meta for parameter in module.parameters()):
        return "it is on the meta device"
    extra = sorted(name for name, _ in module.named_children() if name not in {*layout.projections, *_NORMS})
    return f"it also has {', '.join(extra)}" if extra else None


class _Trial:
    """A block with small projections in its own ones' place, tried on random numbers.

    Args:
        module: the block.
        layout: what it calls its parts.
    """

    width = 24

    def __init__(self, module: nn.Module, layout: Layout):
        self.module, self.names, self.head_dim = module, layout.projections, getattr(module, layout.head_dim)
        self.sizes = {name: _out_features(getattr(module, name)) for name in layout.inward}
        first = self.sizes[layout.inward[0]]
        if layout == _BY_HEAD:
            q_size = kv_size = first // 3
        elif len(layout.inward) == 1:
            kv_size = module.num_key_value_heads * self.head_dim
            q_size = first - 2 * kv_size
        else:
            q_size, kv_size = first, self.sizes[layout.inward[1]]
        self.heads, self.kv_heads = q_size // self.head_dim, kv_size // self.head_dim
        self.sizes[layout.outward] = self.width
        self.inner = dict.fromkeys(self.names, self.width) | {layout.outward: q_size}
        parameters = [p for p in module.parameters() if p.dtype in FLOATS]
        self.dtype = parameters[0].dtype if parameters else torch.float32
        self.rotary_dim = self.head_dim

    def inputs(self) -> dict[str, torch.Tensor]:
        """x, cos, sin, dout and every parameter at random, exact in the block's dtype."""
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(size, generator=generator) * scale).to(self.dtype).requires_grad_()

        found = {"x": normal(2, 7, self.width), "dout": normal(2, 7, self.width).detach()}
        angle = torch.rand(2, 7, self.rotary_dim // 2, generator=generator).repeat(1, 1, 2) * 6
        found |= {"cos": angle.cos().to(self.dtype), "sin": angle.sin().to(self.dtype)}
        for name in self.names:
            found[f"{name}.weight"] = normal(self.sizes[name], self.inner[name], scale=self.inner[name] ** -0.5)
        for name in _NORMS:
            norm = getattr(self.module, name, None)
            if norm is not None:
                found |= {f"{name}.{key}": normal(*value.shape) for key, value in norm.named_parameters()}
        return found

    def run(self, kind: type, inputs: dict[str, torch.Tensor], seen: list) -> dict[str, torch.Tensor]:
        """Output and gradients of a block of the class `kind`; what it passes to the attention is put into `seen`."""
        twin = twin_of(self.module)
        twin.__class__ = kind
        twin.config = copy.copy(self.module.config)
        twin.config._attn_implementation_internal = _PROBE
        twin.seen, twin.training = seen, False
        for name in self.names:
            twin._modules[name] = nn.Linear(self.inner[name], self.sizes[name], bias=False, device="meta")
        inputs = dict(inputs)
        dout = inputs.pop("dout")

        def call(leaves):
            leaves = dict(leaves)
            x, embeddings = leaves.pop("x"), (leaves.pop("cos"), leaves.pop("sin"))
            arguments = {"hidden_states": x, "position_embeddings": embeddings, "attention_mask": None}
            return torch.func.functional_call(twin, leaves, (), arguments)[0]

        return run_with_grads(call, inputs, dout)

    def options(self) -> dict[str, Any]:
        """What the original passes to the attention beside q, k, v and the mask."""
        seen: list[dict[str, Any]] = []
        try:
            self.run(type(self.module), self.inputs(), seen)
        except RuntimeError:
            # Only a part of a head is rotated: how much, the configuration says.
            parameters = getattr(self.module.config, "rope_parameters", None) or {}
            self.rotary_dim = int(self.head_dim * parameters.get("partial_rotary_factor", 1.0))
            self.run(type(self.module), self.inputs(), seen)
        return {key: value for key, value in seen[-1].items() if key not in ("dropout", "position_ids")}

    def prove(self, fast: type) -> tuple[Proof, str]:
        """Ours against the original."""
        inputs, seen = self.inputs(), []
        wide = {key: value.detach().double().requires_grad_(value.requires_grad) for key, value in inputs.items()}
        with Widened():
            exact = self.run(type(self.module), wide, seen)
        original = self.run(type(self.module), inputs, seen)
        proof = compare(self.run(fast, inputs, seen), original, exact, self.dtype)
        if proof.reason is None and seen[-1] != seen[-2]:
            proof = Proof(proof.error, "it passes other options to the attention")
        q = inputs["x"].detach().new_zeros(1, self.heads, 7, self.head_dim)
        cos = inputs["cos"][:1]
        return proof, explain("rope", q, q[:, : self.kv_heads], cos, cos).backend


def _out_features(module: nn.Module) -> int:
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return base.out_features
