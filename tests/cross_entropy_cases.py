"""Calls of `linear_cross_entropy`, what torch makes of them, and how the two are compared."""

from __future__ import annotations

import dataclasses

import torch
from backends import INTERPRETED
from oracle import BACKWARD, FORWARD, assert_as_good_as
from torch.nn import functional

import pyfinetune as pf

IGNORED = -100


def name(value):
    return str(value).removeprefix("torch.")


@dataclasses.dataclass
class Case:
    """Inputs of one call; hidden, weight and bias require grad."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    bias: torch.Tensor | None = None
    options: dict = dataclasses.field(default_factory=dict)
    workspace: int | None = None

    def inputs(self):
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def forward(self):
        args = (self.hidden, self.weight, self.labels, self.bias)
        return pf.ops.linear_cross_entropy(*args, **self.options, workspace_bytes=self.workspace)

    def gradients(self, loss):
        return [loss, *torch.autograd.grad(loss, self.inputs(), upstream(loss))]

    def run(self):
        """(loss, gradients) through pf.ops."""
        return self.gradients(self.forward())

    def plain(self):
        """(loss, gradients) by torch's operators, as Hugging Face's models call them."""
        return self.gradients(self.plain_loss())

    def plain_loss(self):
        options = {"reduction": "mean", "softcap": 0.0, "shift": False, "num_items": None} | self.options
        logits = functional.linear(self.hidden, self.weight, self.bias)
        if options["softcap"]:
            logits = torch.tanh(logits / options["softcap"]) * options["softcap"]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        labels = self.labels
        if options["shift"]:
            labels = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        reduction = "sum" if options["num_items"] is not None else options["reduction"]
        flat = logits.reshape(-1, logits.shape[-1])
        loss = functional.cross_entropy(flat, labels.reshape(-1), reduction=reduction, ignore_index=IGNORED)
        if options["num_items"] is not None:
            loss = loss / options["num_items"]
        return loss.view(labels.shape) if reduction == "none" else loss

    def cast(self, dtype):
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in self.leaves()]
        return dataclasses.replace(self, hidden=leaves[0], weight=leaves[1], bias=leaves[2])

    def leaves(self):
        return self.hidden, self.weight, self.bias

    def per_token(self):
        options = {key: value for key, value in self.options.items() if key != "num_items"}
        return dataclasses.replace(self, options=options | {"reduction": "none"})

    def reduced(self, losses):
        """What the losses of the tokens come to under the case's reduction."""
        if self.options.get("reduction") == "none":
            return losses
        total = losses.double().sum()
        if self.options.get("reduction") != "sum":
            total = total / self.options.get("num_items", (self.labels != IGNORED).sum())
        return total.to(losses.dtype)

    def frozen(self):
        """The same call where only hidden's gradient is wanted."""
        weight, bias = (None if t is None else t.detach() for t in (self.weight, self.bias))
        return dataclasses.replace(self, weight=weight, bias=bias)


def upstream(loss):
    """The same gradient, not 1, for every run of a case; one for each token with reduction "none"."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    return torch.randn(loss.shape, generator=generator).abs().add(0.5).to(loss.dtype)


def make(shape, vocab, width, *, dtype=torch.float32, bias=False, ignored=0.3, scale=2.0, workspace=None, **options):
    """A case with peaked and flat distributions among its tokens."""
    shape = (shape,) if isinstance(shape, int) else shape
    labels = torch.randint(vocab, shape)
    labels[torch.rand(shape) < ignored] = IGNORED
    strength = torch.rand(shape)[..., None] * scale
    return Case(
        hidden=(torch.randn(*shape, width) * strength).to(dtype).requires_grad_(),
        weight=(torch.randn(vocab, width) * max(1, width) ** -0.5).to(dtype).requires_grad_(),
        labels=labels,
        bias=torch.randn(vocab).to(dtype).requires_grad_() if bias else None,
        options=options,
        workspace=workspace,
    )


def hold_to_the_oracle(backend, *sizes, draws=4, **options):
    """Several draws are judged together: the largest of a few rounding errors is a matter of luck.

    For the same reason a mean or sum, a single number, is held to the losses of its tokens, and those to the oracle.
    """
    ours, theirs, exact = [], [], []
    for _ in range(min(2, draws) if INTERPRETED else draws):
        case = make(*sizes, **options)
        each = case.per_token()
        with pf.use_backend(backend):
            loss, *grads = case.run()
            losses = each.forward().detach()
        torch.testing.assert_close(loss, case.reduced(losses))
        ours.append([losses, *grads])
        theirs.append([each.plain()[0], *case.plain()[1:]])
        exact.append([each.cast(torch.float64).plain()[0], *case.cast(torch.float64).plain()[1:]])
    for i in range(len(ours[0])):
        stacked = [torch.stack([draw[i] for draw in results]) for results in (ours, theirs, exact)]
        assert_as_good_as(*stacked, BACKWARD if i else FORWARD, ("loss", "d_hidden", "d_weight", "d_bias")[i])


OPTIONS = [
    {},
    {"bias": True},
    {"reduction": "sum"},
    {"num_items": 57},
    {"softcap": 3.0, "bias": True},
    {"reduction": "none"},
    {"reduction": "none", "softcap": 3.0, "bias": True},
]


def option_name(options):
    return "-".join(f"{key}{value}" for key, value in options.items()) or "plain"


class LargestAllocation(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that any torch operation inside the block returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and "pyfinetune" not in str(func):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return result
