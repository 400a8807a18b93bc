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

from pyfinetune.hf.probe import Candidate, Proof, compare, run_with_grads, why_fixed
from pyfinetune.ops import linear_cross_entropy
from pyfinetune.ops._checks import FLOATS
from pyfinetune.ops._op import explain

KIND = "causal LM loss"


class LazyLogits(torch.Tensor):
    """hidden W^T + bias, computed when an operator first asks for its values; autograd sees an ordinary result."""

    @staticmethod
    def __new__(cls, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        shape = (*hidden.shape[:-1], weight.shape[0])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        self.parts = (hidden, weight, bias)
        self.computed: torch.Tensor | None = None

    def values(self) -> torch.Tensor:
        """The logits, without a graph."""
        if self.computed is None:
            with torch.no_grad():
                self.computed = nn.functional.linear(*(None if p is None else p.detach() for p in self.parts)).to(
                    self.dtype
                )
        return self.computed

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"LazyLogits({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Compute the values and go on with them; a cast and a detach need none."""
        kwargs = kwargs or {}
        lazy = args[0] if args else None
        if func is torch.ops.aten.detach.default:
            return cls(*lazy.parts, lazy.dtype)
        if func is torch.ops.aten._to_copy.default and set(kwargs) == {"dtype"} and kwargs["dtype"].is_floating_point:
            return cls(*lazy.parts, kwargs["dtype"])
        args, kwargs = tree_map_only(cls, cls.values, (args, kwargs))
        return func(*args, **kwargs)


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
        same = x.dtype == self.weight.dtype and not torch.is_autocast_enabled(x.device.type)
        if not self.loss_call.has_labels or not same or torch.compiler.is_compiling():
            return super().forward(x)
        return lazy_logits(x, self.weight, self.bias)


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
    hidden, weight, bias = logits.parts
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
    if "forward" in model.__dict__:
        return "it has a forward of its own (instance attribute), such as TRL's own head"
    return why_fixed(head)


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
