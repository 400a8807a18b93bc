"""The loss of a causal language model that is called with labels, on `pf.ops.linear_cross_entropy`.

        model(labels=...)
          pre-hook: there are labels
          lm_head(hidden)            -> logits that nobody has computed yet, and what they would be made from
          loss_function(logits, ...) -> linear_cross_entropy(hidden, weight, labels)

Logits that are used in any other way (scaled, capped, returned and read) are computed then, and the original loss
runs: no model's forward has to be known.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from pyfinetune.errors import InvalidInput
from pyfinetune.hf.probe import Candidate, Proof, compare, has_hooks, run_with_grads, why_fixed, why_own_forward
from pyfinetune.ops import linear_cross_entropy
from pyfinetune.ops._checks import FLOATS
from pyfinetune.ops._op import explain

KIND = "causal LM loss"


class LazyLogits(torch.Tensor):
    """hidden W^T + bias, computed when somebody first asks for the values; autograd sees an ordinary result.

    Args:
        hidden, weight, bias: what it is made from, with their graph.
        dtype: of the result.
        computed: holds the values once they are there; shared by what would share memory.
    """

    @staticmethod
    def __new__(cls, hidden, weight, bias, dtype, computed=None):
        """A tensor without memory."""
        shape = (*hidden.shape[:-1], weight.shape[0])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        computed: list[torch.Tensor] | None = None,
    ):
        self.parts = (hidden, weight, bias)
        self._computed: list[torch.Tensor] = [] if computed is None else computed

    @property
    def computed(self) -> torch.Tensor | None:
        """The values, if anybody has asked for them."""
        return self._computed[0] if self._computed else None

    def values(self) -> torch.Tensor:
        """The logits, without a graph."""
        if not self._computed:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._computed.append(nn.functional.linear(*_detached(_alive(self.parts))).to(self.dtype))
        return self._computed[0]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Compute the values and go on with them; a cast, a clone and a detach need none."""
        kwargs = kwargs or {}
        lazy = args[0] if args else None
        if isinstance(lazy, cls) and lazy.computed is None:
            if func is torch.ops.aten.detach.default:
                return cls(*_detached(lazy.parts), lazy.dtype, lazy._computed)
            if func is torch.ops.aten.clone.default:  # DDP clones what a model returns
                return cls(*lazy.parts, lazy.dtype)
            if func is torch.ops.aten._to_copy.default and set(kwargs) == {"dtype"} and kwargs["dtype"] in FLOATS:
                return cls(*lazy.parts, kwargs["dtype"])
        args, kwargs = tree_map_only(cls, cls.values, (args, kwargs))
        return func(*args, **kwargs)


def _of_values(name: str) -> Callable:
    method = getattr(torch.Tensor, name)

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        return method(self.values(), *args, **kwargs)

    return call


# What reads a tensor without an operator.
_READS = ("numpy", "tolist", "data_ptr", "untyped_storage", "__dlpack__", "__repr__", "__deepcopy__", "__reduce_ex__")
for _name in _READS:
    setattr(LazyLogits, _name, _of_values(_name))


def _detached(parts: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if part is None else part.detach() for part in parts)


def _alive(parts: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    weight = parts[1]
    if weight.numel() and not weight.untyped_storage().size():
        raise InvalidInput(
            "causal_lm_loss: the head's weight was freed after its forward, as by FSDP around the head alone; leave "
            "this kind out: patch(model, kinds=...)"
        )
    return parts


class _Head(torch.autograd.Function):
    """The gradient of logits that were computed after all."""

    @staticmethod
    def forward(ctx, hidden, weight, bias):
        """Nothing is computed."""
        ctx.save_for_backward(hidden, weight)
        return LazyLogits(hidden, weight, bias, hidden.dtype)

    @staticmethod
    def backward(ctx, dout):
        """As of a linear layer."""
        hidden, weight = ctx.saved_tensors
        rows = dout.reshape(-1, dout.shape[-1])
        needs = ctx.needs_input_grad
        return (
            dout @ weight if needs[0] else None,
            rows.T @ hidden.reshape(-1, hidden.shape[-1]) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
        )


def lazy_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> LazyLogits:
    """hidden W^T + bias, not computed yet.

    Args:
        hidden: [..., H].
        weight: [V, H].
        bias: [V] or None.
    """
    logits = _Head.apply(hidden, weight, bias)
    logits.parts = (hidden, weight, bias)  # inside the function they have no graph
    return logits


class LossCall:
    """What the hooks, the head and the loss function of one model share: whether the call at hand has labels."""

    def __init__(self):
        self.has_labels = False

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        self.has_labels = kwargs.get("labels") is not None and not torch.compiler.is_compiling()

    def after(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook, called after an error too."""
        self.has_labels = False


class FastHead(nn.Linear):
    """A head whose output is not computed while the model is called with labels."""

    original = nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits, or the promise of them."""
        # Whoever listens expects values, and FSDP and the like, who hook in here, free the weight afterwards.
        if not self.loss_call.has_labels or torch.compiler.is_compiling() or has_hooks(self):
            return super().forward(x)
        parts = (x, self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type) and {x.dtype, self.weight.dtype} <= set(FLOATS):
            dtype = torch.get_autocast_dtype(x.device.type)
            parts = tuple(None if part is None else part.to(dtype) for part in parts)
        return lazy_logits(*parts) if parts[0].dtype == parts[1].dtype else super().forward(x)


def fast_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """`ForCausalLMLoss`, from what the logits would be made of where they are not made yet."""
    if not isinstance(logits, LazyLogits) or logits.computed is not None or logits.shape[-1] != vocab_size:
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    # Without a graph where the logits have none: they were detached, or cast under no_grad.
    hidden, weight, bias = _alive(logits.parts if logits.requires_grad else _detached(logits.parts))
    targets = labels if shift_labels is None else shift_labels.reshape(hidden.shape[:-1])
    return linear_cross_entropy(
        hidden,
        weight,
        targets.to(hidden.device),
        bias,
        ignore_index=ignore_index,
        num_items=num_items_in_batch,
        shift=shift_labels is None,
    )


def restore(module: nn.Module) -> None:
    """Take out of a model or a head what `LossSwitch` has put in; anything else is left alone."""
    if module.__dict__.get("_loss_function") is fast_loss:
        del module._loss_function
    module.__dict__.pop("loss_call", None)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), LossCall)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


class LossSwitch:
    """A model's head, hooks and loss function.

    Args:
        model: the model that is called with labels.
        head: its head.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Linear):
        self._model, self._head = weakref.ref(model), weakref.ref(head)

    def apply(self) -> None:
        """Put all three in."""
        model, head, call = self._model(), self._head(), LossCall()
        if model is None or head is None:
            return
        head.__class__ = FastHead
        head.loss_call = call
        model.register_forward_pre_hook(call.before, with_kwargs=True)
        model.register_forward_hook(call.after, always_call=True)
        model.loss_function = fast_loss

    def revert(self) -> None:
        """Take all three out."""
        model, head = self._model(), self._head()
        if head is not None and type(head) is FastHead:
            head.__class__ = nn.Linear
        for module in (model, head):
            if module is not None:
                restore(module)

    def obstacle(self) -> str | None:
        """Another class or loss function that has come since."""
        model, head = self._model(), self._head()
        if model is None or head is None:
            return None
        if type(head) not in (FastHead, nn.Linear):
            return f"the head has become {type(head).__name__}"
        ours = model.__dict__.get("_loss_function", fast_loss) is fast_loss
        return None if ours else "the loss function has become another"


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every model with a causal language model's loss."""
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or not hasattr(module, "get_output_embeddings"):
            continue
        head = module.get_output_embeddings()
        # None stands for a name that transformers does not recognise, to which it gives this loss.
        if head is None or getattr(module, "loss_type", None) not in ("ForCausalLM", None):
            continue
        reason = _why_not(module, head)
        change = None if reason else LossSwitch(module, head)
        prove = None if reason else functools.partial(_prove, head)
        yield Candidate(KIND, name, module, change, reason, None if reason else (KIND, id(head)), prove)


def _why_not(model: PreTrainedModel, head: nn.Module) -> str | None:
    if isinstance(head, FastHead):
        return "already patched"
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}"
    if head.weight.dtype not in FLOATS:
        return f"its head is {head.weight.dtype}"
    if model.loss_function is not ForCausalLMLoss:
        return "it has a loss function of its own"
    if not _only_casts(model):
        own = why_own_forward(model)
        if own is not None:
            return f"{own}, such as TRL's own head" if "forward" in own else own
    return why_fixed(head)


def _only_casts(model: PreTrainedModel) -> bool:
    """Whether the model's own forward is accelerate's mixed precision around that of the class."""
    inner = model.__dict__.get("_original_forward")
    return getattr(inner, "__func__", None) is type(model).forward


def _prove(head: nn.Linear) -> tuple[Proof, str]:
    """Both losses over a small head."""
    width, vocabulary, dtype = 24, 50, head.weight.dtype
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(head.weight.device)

    inputs = {"hidden": normal(2, 9, width).requires_grad_(), "weight": normal(vocabulary, width)}
    inputs["weight"].requires_grad_(head.weight.requires_grad)
    if head.bias is not None:
        inputs["bias"] = normal(vocabulary).requires_grad_(head.bias.requires_grad)
    labels = torch.randint(vocabulary, (2, 9), generator=generator).to(head.weight.device)
    labels[0, :4] = -100

    def run(logits_of: Callable, loss: Callable, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        def call(leaves):
            logits = logits_of(leaves["hidden"], leaves["weight"], leaves.get("bias"))
            return loss(logits, labels, vocabulary)

        return run_with_grads(call, values, torch.ones((), dtype=dtype, device=labels.device))

    wide = {key: value.detach().double().requires_grad_(value.requires_grad) for key, value in inputs.items()}
    exact = run(nn.functional.linear, _exact_loss, wide)
    proof = compare(
        run(lazy_logits, fast_loss, inputs), run(nn.functional.linear, ForCausalLMLoss, inputs), exact, dtype
    )
    example = (inputs["hidden"].detach(), inputs["weight"].detach(), labels)
    return proof, explain("linear_cross_entropy", *example).backend


def _exact_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1))
