"""What a run of the benchmark is asked for, and the cases that follow from it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from pyfinetune.bench import cases_of, module_of, op_names
from pyfinetune.bench.harness import Case
from pyfinetune.bench.peer_names import PEERS, Choice
from pyfinetune.bench.shapes import Sizes, dtype_named, parse_all
from pyfinetune.bench.steps import STEP
from pyfinetune.errors import UserError
from pyfinetune.machine import info
from pyfinetune.ops._op import BACKENDS

_DEFAULT_MODEL = "model:smollm2-135m"  # for an op whose table has no case of the dtype that is asked for


@dataclass(frozen=True)
class Request:
    """The options of `pyfinetune bench`, as they were written.

    Args:
        ops: which; all when empty.
        quick: small shapes and little time, to see that all is right.
        shapes: `model:NAME` or `M,N,K`, instead of the cases of the table.
        tokens: rows for the models of `shapes` and `model`.
        dtype: "bf16", "fp32" or "fp16": only cases in it; an op whose table has none gets a small model's shapes.
        backend: what ours has to run on.
        peers: keys of `peer_names.PEERS`, only these.
        device: "cpu" or "cuda".
        seconds: time to spend on timing each case; 3, or 0.2 with `quick`.
        model: a configuration, for a whole training step of it; see `bench_step.requested`.
        method, packed, layers: how that is trained; see there.
    """

    ops: tuple[str, ...] = ()
    quick: bool = False
    shapes: tuple[str, ...] = ()
    tokens: int | None = None
    dtype: str | None = None
    backend: str | None = None
    peers: tuple[str, ...] = ()
    device: str = "cpu"
    seconds: float | None = None
    model: str | None = None
    method: str | None = None
    packed: bool = False
    layers: int | None = None

    @classmethod
    def from_json(cls, text: str) -> Request:
        """The request that `to_json` wrote."""
        values = json.loads(text)
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def to_json(self) -> str:
        """As a line of JSON, for the process that measures."""
        return json.dumps(dataclasses.asdict(self))

    @property
    def choice(self) -> Choice:
        """Which peers are measured."""
        return Choice(self.peers, full=not self.quick)

    @property
    def time_each(self) -> float:
        """Seconds to spend on timing each case."""
        return self.seconds if self.seconds is not None else 0.2 if self.quick else 3.0

    def check(self) -> None:
        """Raise what can be known before anything is measured.

        Raises:
            UserError: an option that is not known, contradicts another one, or cannot be had on this machine.
        """
        facts = info()
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"--device {self.device}: is neither cpu nor cuda")
        if self.device == "cuda" and not facts["gpus"]:
            raise UserError("--device cuda: torch sees no GPU on this machine", fix="pyfinetune bench --device cpu")
        if self.backend is not None:
            if self.backend not in BACKENDS:
                raise UserError(f"--backend {self.backend}: is not one of {', '.join(BACKENDS)}")
            reason = facts["backends"][self.backend]
            if reason is not None:
                usable = [name for name, why in facts["backends"].items() if why is None]
                raise UserError(
                    f"--backend {self.backend}: cannot run here: {reason}", fix=f"choose from: {', '.join(usable)}"
                )
        for peer in self.choice.peers:
            reason = PEERS[peer].why_missing(self.device)
            if reason is not None:
                raise UserError(f"--peer {peer}: cannot run here: {reason}")
        if self.model is None:
            for name in ("method", "packed", "layers"):
                if getattr(self, name):
                    raise UserError(f"--{name}: needs --model, which says what is trained")
            if self.tokens is not None and not self.shapes:
                raise UserError("--tokens: needs --shapes model:NAME or --model")
        elif set(self.ops) - {STEP} or self.shapes:
            other = "--shapes" if self.shapes else next(op for op in self.ops if op != STEP)
            raise UserError(f"--model: is for a whole step, {other} is not", fix="pyfinetune bench step --model NAME")
        self.cases()

    def cases(self) -> list[Case]:
        """What is to be measured, in order.

        Raises:
            UserError: an op, a shape or a dtype that is not known, or one that an op asked for has no cases of.
        """
        dtype = None if self.dtype is None else dtype_named(self.dtype)
        if self.model is not None:
            text = f"--tokens {self.tokens}"
            if self.tokens is not None and self.tokens < 2:
                raise UserError(f"{text}: a step needs 2 or more, as the first one is not predicted")
            sizes = Sizes(text, self.tokens or 1024)
            step = module_of(STEP)
            chosen = dtype or dtype_named("bf16")
            return [step.requested(self.model, self.method or "lora", self.packed, self.layers, sizes, chosen)]
        found: dict[tuple[str, str], Case] = {}
        for op in self.ops or op_names():
            made = self._cases_of(op, dtype)
            if not made and self.ops:
                asked = " and ".join([*self.shapes, *([self.dtype] if self.dtype else [])])
                raise UserError(
                    f"bench {op}: there are no cases of {asked}",
                    fix="pyfinetune bench step --model NAME" if op == STEP else "--shapes model:NAME has some",
                )
            found |= {(case.op, case.name): case for case in made}
        if not found:
            raise UserError(f"bench: no op has cases of {' and '.join(self.shapes)}")
        return list(found.values())

    def _cases_of(self, op: str, dtype) -> list[Case]:
        if self.shapes:
            module, chosen = module_of(op), dtype or dtype_named("bf16")
            asked = parse_all(self.shapes, self.tokens, self.quick)
            return [case for sizes in asked for case in module.shaped(sizes, chosen)]
        cases = cases_of([op], self.quick)
        if dtype is None:
            return cases
        fitting = [case for case in cases if case.dtype == dtype]
        (sizes,) = parse_all([_DEFAULT_MODEL], None, self.quick)
        return fitting or module_of(op).shaped(sizes, dtype)

    def left_out(self) -> list[str]:
        """Ops that were not named and have no cases of what is asked for."""
        made = {case.op for case in self.cases()}
        return [] if self.ops or self.model else [op for op in op_names() if op not in made]
