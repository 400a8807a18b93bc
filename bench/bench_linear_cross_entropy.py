"""Cases of the op `linear_cross_entropy`: the head and its loss, against what Hugging Face's models and TRL compute."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping

import torch

import pyfinetune as pf
from pyfinetune.bench import fused_peers, peers
from pyfinetune.bench.checks import close_to_exact
from pyfinetune.bench.harness import OURS, Case, Passes, Setup, Target
from pyfinetune.bench.peer_names import COMPILED, EAGER, TRL_HEAD
from pyfinetune.bench.shapes import Sizes

_IGNORED = -100
_FORWARD, _BACKWARD = 1.5, 2.0  # how much worse than torch's eager code in the same dtype a result may be
_TRL_CHUNK = 32768  # entries of the vocabulary at a time, as its trainers have it


def _ours(hidden, weight, labels, reduction="mean"):
    return pf.ops.linear_cross_entropy(hidden, weight, labels, reduction=reduction)


def _eager(hidden, weight, labels, reduction="mean"):
    """As the models of transformers compute it: all logits, in the head's dtype and then in float32."""
    logits = torch.nn.functional.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=_IGNORED, reduction=reduction)


def _trl(function, hidden, weight, labels, reduction="mean"):
    """As TRL's trainers compute it, without what they ask for besides."""
    log_probs, *_ = function.apply(
        hidden, weight, None, labels.clamp(min=0), 1.0, _TRL_CHUNK, None, 1.0, ("log_probs",)
    )
    counts = labels != _IGNORED
    losses = -log_probs.masked_fill(~counts, 0)
    return losses if reduction == "none" else losses.sum() / counts.sum().clamp(min=1)


def build(
    device: torch.device,
    sizes: tuple,
    dtype: torch.dtype,
    ignored: float,
    trains: bool,
    more: Mapping[str, Callable] | None = None,
) -> Setup:
    """The loss of so many tokens, and the gradients of the hidden states, and of the head where it trains.

    `more` are further peers by name, functions such as `_eager`.
    """
    tokens, width, vocab = sizes
    hidden = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, device=device).mul_(width**-0.5).to(dtype).requires_grad_(trains)
    labels = torch.randint(vocab, (tokens,), device=device)
    labels[: int(tokens * ignored)] = _IGNORED  # prompts, on which nothing is trained
    losses, missing = {OURS: _ours, EAGER: _eager, **(more or {})}, {}
    why = peers.why_missing("trl")
    if why:
        missing[TRL_HEAD] = why
    else:
        module = importlib.import_module("trl.kernels.chunked_logprob")
        losses[TRL_HEAD] = functools.partial(_trl, module.ChunkedLogProbFunction)

    def results(loss_of, hidden, weight):
        """The loss of each token, and the gradients of their mean."""
        loss = _call(loss_of, hidden, weight, labels)
        grads = torch.autograd.grad(loss, [hidden, weight] if trains else [hidden])
        return [loss_of(hidden, weight, labels, "none").detach(), *grads]

    names, factors = ["losses", "d_hidden", "d_weight"], [_FORWARD, _BACKWARD, _BACKWARD]

    @functools.cache
    def expected():
        leaves = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in (hidden, weight)]
        return results(_eager, *leaves), results(_eager, hidden, weight)

    def check(loss_of):
        exact, eager = expected()
        count = len(exact)
        return close_to_exact(results(loss_of, hidden, weight), exact, eager, names[:count], factors[:count])

    def backward(_number, loss):
        return torch.autograd.grad(loss, [hidden, weight] if trains else [hidden])

    def forward(loss_of, _number=0):
        return _call(loss_of, hidden, weight, labels)

    halves = {name: functools.partial(forward, loss_of) for name, loss_of in losses.items()}
    return Setup(
        {name: Passes(half, backward) for name, half in halves.items()},
        {name: functools.partial(check, loss_of) for name, loss_of in losses.items()},
        missing,
        inputs=[hidden, weight, labels],
        forward=halves,
    )


def _build(device: torch.device, sizes: tuple, dtype: torch.dtype, ignored: float, trains: bool) -> Setup:
    """`build` with what torch compiles, and the peers of other packages."""
    others, missing = fused_peers.functions("head", device)
    more = {COMPILED: fused_peers.compiled(_eager), **others}
    setup = build(device, sizes, dtype, ignored, trains, more)
    setup.missing |= missing
    return setup


def _call(loss_of, hidden, weight, labels):
    with torch.enable_grad():
        return loss_of(hidden, weight, labels)


def _case(
    sizes: tuple[int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    ignored: float = 0.0,
    trains: bool = False,
    **more,
) -> Case:
    tokens, width, vocab = sizes
    kept = tokens - int(tokens * ignored)
    name = f"head and loss, {tokens} tokens, H {width}, V {vocab}, {str(dtype).removeprefix('torch.')}"
    return Case(
        "linear_cross_entropy",
        name + (f", {ignored:.0%} ignored" if ignored else "") + (", head trains" if trains else ""),
        functools.partial(_build, sizes=sizes, dtype=dtype, ignored=ignored, trains=trains),
        flops=2.0 * (3 if trains else 2) * kept * width * vocab,
        dtype=dtype,
        bytes=float(vocab * width * dtype.itemsize * (2 if trains else 1)),
        **more,
    )


def cases(quick: bool = False) -> list[Case]:
    """The rows of the table; `quick` is smaller, and without targets, which are stated for the full shapes."""
    if quick:
        sizes = (64, 64, 1000)
        return [
            _case(sizes, ignored=0.6),
            _case(sizes, dtype=torch.float32),
            _case(sizes, trains=True),
            _case(sizes),
        ]
    sizes = (1024, 576, 49152)
    return [
        _case(sizes, targets={EAGER: Target(1.9, 1.2)}, compiled=True),
        _case(sizes, targets={EAGER: Target(4.5, 2.8)}, ignored=0.6),
        _case(sizes, trains=True),
        _case(sizes, dtype=torch.float32),
    ]


def shaped(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """The cases of a model's head, or of M rows, a width of K and a vocabulary of N."""
    width, vocab = (sizes.model.hidden, sizes.model.vocab) if sizes.model else (sizes.inner, sizes.out)
    dimensions = (sizes.tokens, width, vocab)
    return [_case(dimensions, dtype=dtype), _case(dimensions, dtype=dtype, ignored=0.6)]
