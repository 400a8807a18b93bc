"""The contract that every op keeps: schema, check, fake, reference, backward, backends; in one object.

An `Op` registers itself with `torch.library` and is called like a function with the schema's arguments. On each call
it checks them (in eager mode and while tracing alike), picks a backend by a pure function of the arguments' metadata,
and runs it. The public function of an op turns friendly arguments into the schema's with `prepare`, which is also what
lets `explain` answer for a call without making it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pyfinetune.errors import BackendUnavailable, InvalidInput

LIBRARY = torch.library.Library("pyfinetune", "DEF")
BACKENDS = ("cuda", "triton", "cpu", "reference")
LEAST_CAPABILITY = 80  # of a GPU, for Triton's kernels. Ampere: bfloat16 and asynchronous copies
REGISTRY: dict[str, Op] = {}

# Process-wide, not per context: autograd runs a backward on threads of its own, which must see the same choice.
_forced: str | None = None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: one of `BACKENDS`.
        run: the implementation; takes the schema's arguments.
        why_not: the reason why `run` cannot take these arguments, or None when it can; looks at metadata only.
        configuration: how `run` would launch its kernels, a line each: of a GPU's capability (None for that of the
            tensors) and the schema's arguments; None where there is no choice.
        yields: the reason why a later backend is to be taken although this one can run, or None; not asked where this
            one is forced.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    configuration: Callable[..., Sequence[str]] | None = None
    yields: Callable[..., str | None] | None = None

    def steps_back(self, *args) -> str | None:
        """Why a call that names no backend does not run on this one, or None."""
        return self.why_not(*args) or (self.yields and self.yields(*args))


@dataclass(frozen=True)
class Choice:
    """A backend in `explain`: why it was not chosen (None for the chosen one), and what it would launch."""

    backend: str
    reason: str | None
    launches: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n    ".join([f"{self.backend}: {self.reason or 'chosen'}", *self.launches])


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns: the chosen backend and every candidate with its reason."""

    op: str
    backend: str
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.op}: {self.backend}", *(f"  {choice}" for choice in self.choices)])


class Op:
    """One operator of the library.

    Args:
        name: the op's name, as in `torch.ops.pyfinetune.<name>`.
        schema: the torch.library schema behind the name, "(Tensor x, ...) -> Tensor".
        check: raises InvalidInput on arguments that the op does not take; metadata only, so that it also runs on fakes.
        fake: shapes and dtypes of the results for tracing; arguments have been checked.
        reference: the plain torch implementation; any device, any float dtype.
        backends: faster implementations, best first. The reference is always there, last.
        prepare: the public function's arguments -> the schema's; used by `explain`.
        setup_context, backward: as in `torch.library.register_autograd`; None for an op without gradients.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        check: Callable[..., None],
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        backends: Sequence[Backend] = (),
        prepare: Callable[..., tuple] | None = None,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ):
        self.name, self.check, self.fake, self.prepare = name, check, fake, prepare
        self.backends = (*backends, Backend("reference", reference, lambda *args: None))
        LIBRARY.define(f"{name}{schema}")
        LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyfinetune::{name}", self._fake, lib=LIBRARY)
        if backward is not None:
            # A second derivative would miss what backward reads from saved results; it must fail, not be wrong.
            backward = once_differentiable(backward)
            torch.library.register_autograd(f"pyfinetune::{name}", backward, setup_context=setup_context, lib=LIBRARY)
        self.overload = getattr(torch.ops.pyfinetune, name).default
        self._nested = "Tensor[]" in schema
        make = _nested_function if self._nested else _eager_function
        self._function = None if backward is None else make(name, self._eager, setup_context, backward)
        REGISTRY[name] = self

    def __call__(self, *args):
        # The registered autograd looks each argument up in the schema again for each argument, in Python: 85 us a call
        # for a schema of 17. Eager calls that need gradients take the same two functions without that detour.
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.overload(*args)
        if self._function is not None and torch.is_grad_enabled():
            flat, shape = (args, None) if not self._nested else _flatten(args)
            for arg in flat:
                if isinstance(arg, torch.Tensor) and arg.requires_grad:
                    if shape is None:
                        return self._function.apply(*args)
                    layout = _Layout(shape)
                    return _nest(self._function.apply(layout, *flat), layout.outputs)
        return self._eager(*args)

    def _eager(self, *args):
        """The op without gradients: by the dispatcher, or past it where nothing there could want the call."""
        if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None or _any_subclass(args):
            return self.overload(*args)
        with torch._C._AutoDispatchBelowAutograd():  # as the dispatcher would
            return self._run(*args)

    def _run(self, *args):
        self.check(*args)
        return self.choose(*args).run(*args)

    def _fake(self, *args):
        self.check(*args)
        return self.fake(*args)

    def choose(self, *args) -> Backend:
        """The backend that a call with these arguments runs on.

        Raises:
            BackendUnavailable: a backend is forced by name and cannot take the arguments.
        """
        for backend in self.backends:
            if _forced is None:
                if backend.steps_back(*args) is None:
                    return backend
            elif backend.name == _forced:
                reason = backend.why_not(*args)
                if reason is None:
                    return backend
                raise BackendUnavailable(f"{self.name}: backend {_forced!r} cannot run here: {reason}")
        raise BackendUnavailable(f"{self.name}: has no {_forced!r} backend")

    def explain(self, *args, capability: int | None = None) -> Explanation:
        """Every backend of the op and whether it would take these arguments; nothing is computed. With a `capability`
        also what would be launched on such a GPU, wherever the arguments are."""
        self.check(*args)
        chosen = self.choose(*args).name
        asked = "why_not" if _forced else "steps_back"
        present = {backend.name: getattr(backend, asked)(*args) for backend in self.backends}
        launches = {
            backend.name: tuple(backend.configuration(capability, *args))
            for backend in self.backends
            if backend.configuration is not None and (present[backend.name] is None or capability is not None)
        }
        choices = []
        for name in BACKENDS:
            if name == chosen:
                reason = None
            elif name not in present:
                reason = "this op has no such backend"
            else:
                reason = present[name] or ("another backend is forced" if _forced else "a faster backend was chosen")
            choices.append(Choice(name, reason, launches.get(name, ())))
        return Explanation(self.name, chosen, tuple(choices))


def _any_subclass(values: Sequence) -> bool:
    """Whether a tensor among the values, or in a list among them, is of a class with a dispatcher of its own."""
    for value in values:
        kind = type(value)
        if kind is list:
            if _any_subclass(value):
                return True
        elif kind is not torch.Tensor and kind is not torch.nn.Parameter and isinstance(value, torch.Tensor):
            return True
    return False


def _eager_function(name: str, run, setup_context, backward) -> type[torch.autograd.Function]:
    """The op's gradient as a plain autograd function around its registered forward.

    `forward` calls `setup_context` itself: with the two apart, torch inspects forward's signature at each call.
    """

    def forward(ctx, *args):
        output = run(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": forward, "backward": backward}
    namespace = {name: staticmethod(function) for name, function in members.items()}
    return type(f"{name}_function", (torch.autograd.Function,), namespace)


@dataclass
class _Layout:
    """Where lists of tensors stand among an op's arguments and results: their lengths, None for anything else."""

    inputs: list[int | None]
    outputs: list[int | None] | None = None


def _flatten(values: Sequence) -> tuple[list, list[int | None]]:
    """The values with lists of tensors (and what stands for their gradients) opened, and where those were."""
    flat, lengths = [], []
    for value in values:
        if isinstance(value, list | tuple) and all(v is None or isinstance(v, torch.Tensor) for v in value):
            flat.extend(value)
            lengths.append(len(value))
        else:
            flat.append(value)
            lengths.append(None)
    return flat, lengths


def _nest(flat: Sequence, lengths: Sequence[int | None]) -> tuple:
    nested, start = [], 0
    for length in lengths:
        nested.append(flat[start] if length is None else list(flat[start : start + length]))
        start += 1 if length is None else length
    return tuple(nested)


def _nested_function(name: str, run, setup_context, backward) -> type[torch.autograd.Function]:
    """The same for an op with lists of tensors: autograd sees tensors only where they are arguments themselves."""

    def forward(ctx, layout: _Layout, *flat):
        args = _nest(flat, layout.inputs)
        output = run(*args)
        setup_context(ctx, args, output)
        ctx.layout = layout
        flat_output, layout.outputs = _flatten(output)
        return tuple(flat_output)

    def nested_backward(ctx, *grads):
        needs = ctx.needs_input_grad
        ctx.needs_input_grad = _nest(needs[1:], ctx.layout.inputs)
        try:
            result = backward(ctx, *_nest(grads, ctx.layout.outputs))
        finally:
            ctx.needs_input_grad = needs
        flat = [None]
        for grad, length in zip(result, ctx.layout.inputs, strict=True):
            flat.extend([grad] if length is None else grad or [None] * length)
        return tuple(flat)

    members = {"forward": forward, "backward": nested_backward}
    namespace = {name: staticmethod(function) for name, function in members.items()}
    return type(f"{name}_function", (torch.autograd.Function,), namespace)


def _validated(name: str | None, source: str) -> str | None:
    if name and name not in BACKENDS:
        raise InvalidInput(f"{source}: {name!r} is no backend; choose from {', '.join(BACKENDS)}")
    return name or None


def is_forced() -> bool:
    """Whether a backend is forced by name, so that none may use another's kernels."""
    return _forced is not None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op inside the block, in the whole process.

    A forced backend that cannot take a call raises; it never falls back silently. The environment variable
    PYFINETUNE_BACKEND does the same for a whole run.

    Args:
        name: "reference", "cpu", "triton" or "cuda".

    Raises:
        InvalidInput: the name is none of these.

    Example:
        >>> with pf.use_backend("reference"):
        ...     weight = pf.ops.dequantize_4bit(packed)
    """
    global _forced
    previous, _forced = _forced, _validated(name, "use_backend")
    try:
        yield
    finally:
        _forced = previous


def explain(op: str, *args, capability: int | None = None, **kwargs) -> Explanation:
    """Which backend a call would run on, why not the others, and how it would launch its kernels.

    Args:
        op: the name of a public op, such as "dequantize_4bit".
        *args, **kwargs: what would be passed to `pf.ops.<op>`.
        capability: of a GPU that need not be here, 86 for sm_86: what the Triton kernels would be launched with on it.

    Returns:
        An `Explanation`; print it, or read `.backend` and `.choices`.

    Raises:
        InvalidInput: the op does not exist or does not take these arguments.

    Example:
        >>> print(pf.explain("dequantize_4bit", packed))
    """
    known = {name: o for name, o in REGISTRY.items() if o.prepare is not None}
    if op not in known:
        raise InvalidInput(f"explain: {op!r} is no op; choose from {', '.join(sorted(known))}")
    if capability is not None and (not isinstance(capability, int) or capability < LEAST_CAPABILITY):
        raise InvalidInput(f"explain: capability is {capability!r}, needs {LEAST_CAPABILITY} or more: 86 for sm_86")
    return known[op].explain(*known[op].prepare(*args, **kwargs), capability=capability)


_forced = _validated(os.environ.get("PYFINETUNE_BACKEND"), "PYFINETUNE_BACKEND")
