"""What the benchmarks of memory-bound ops share: functions of the same inputs, run forward and backward in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from pyfinetune.bench.ceilings import sets_beyond_cache
from pyfinetune.bench.checks import close_to_exact
from pyfinetune.bench.harness import Passes, Setup

_FORWARD, _BACKWARD = 1.5, 2.0  # how much worse than torch's eager code in the same dtype a result may be


def _tuple(results) -> tuple[torch.Tensor, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def _run(function: Callable, inputs: Sequence[torch.Tensor], douts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Results, and the gradients of the inputs that require grad; without `douts` the results alone."""
    with torch.enable_grad():
        results = _tuple(function(*inputs))
        if not douts:
            return [*results]
        leaves = [t for t in inputs if t.requires_grad]
        return [*results, *torch.autograd.grad(results, leaves, douts)]


def _double(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def build(
    device: torch.device,
    make: Callable[[], tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]],
    functions: Mapping[str, Callable],
    plain: Callable,
    missing: Mapping[str, str],
) -> Setup:
    """Make a case ready.

    Args:
        device: where it runs.
        make: makes one set of inputs and upstream gradients; no gradients means forward only.
        functions: by name, ours and the peers', all of the same inputs.
        plain: the same in plain operators, in the inputs' dtype; in float64 it is what all are held against.
        missing: peers that cannot run here, with the reason.
    """
    first = make()
    size = sum(t.numel() * t.element_size() for part in first for t in part)
    sets = [first] + [make() for _ in range(sets_beyond_cache(size, device) - 1)]
    inputs, douts = first

    def forward(function, i):
        with torch.enable_grad():
            return _tuple(function(*sets[i % len(sets)][0]))

    def backward(i, results):
        inputs, douts = sets[i % len(sets)]
        return torch.autograd.grad(results, [t for t in inputs if t.requires_grad], douts)

    def call(function):
        half = functools.partial(forward, function)
        return Passes(half, backward) if douts else half

    def check(function):
        def judge():
            eager = _run(plain, inputs, douts)
            exact = _run(plain, _double(inputs), _double(douts))
            outputs = len(eager) - (sum(t.requires_grad for t in inputs) if douts else 0)
            names = [f"result {i}" if i < outputs else f"gradient {i - outputs}" for i in range(len(eager))]
            factors = [_FORWARD if i < outputs else _BACKWARD for i in range(len(eager))]
            return close_to_exact(_run(function, inputs, douts), exact, eager, names, factors)

        return judge

    setup = Setup(
        {name: call(function) for name, function in functions.items()},
        {name: check(function) for name, function in functions.items()},
        dict(missing),
        inputs=[*inputs, *douts],
    )
    if douts:
        setup.forward |= {name: functools.partial(forward, function, 0) for name, function in functions.items()}
    return setup
