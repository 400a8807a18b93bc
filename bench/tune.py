"""Measure launch configurations on this machine's GPU: `python -m pyfinetune.bench.tune [OP ...] --json FILE`.

Every op runs forward and backward at shapes of common models; each of its kernels is timed in its first six
configurations by the model's rank, and the fastest becomes an entry of FILE, in place of one for the same kernel, GPU
and class of shapes. PYFINETUNE_AUTOTUNE_FILE=FILE then launches by it; with FILE kernels/measured.json it ships.

`--dry-run` does the same in Triton's interpreter with tiny shapes, to see that it will work.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import pyfinetune as pf
from pyfinetune.errors import PyfinetuneError, UserError

Call = Callable[[], Any]


class Shapes:
    """Sizes of common models, or tiny ones, and tensors of them."""

    def __init__(self, device: torch.device, tiny: bool):
        self.device, self.tiny = device, tiny
        self.dtype = torch.float16 if tiny else torch.bfloat16  # the interpreter's products of bfloat16 are wrong
        self.tokens = 48 if tiny else 4096
        self.hidden = (64,) if tiny else (2048, 4096, 8192)
        self.linear = ((64, 128),) if tiny else ((4096, 4096), (14336, 4096), (4096, 14336))
        self.ranks = (4,) if tiny else (16, 64)
        self.heads = ((4, 2, 32),) if tiny else ((32, 8, 128), (32, 8, 64))
        self.vocab = 512 if tiny else 128256

    def new(self, *shape: int, grad: bool = True) -> torch.Tensor:
        """Random values."""
        return torch.randn(shape, dtype=self.dtype, device=self.device, requires_grad=grad)


def _backward(out: torch.Tensor | tuple) -> None:
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    torch.autograd.backward(outs, [torch.ones_like(each) for each in outs])


def _nf4(s: Shapes) -> Iterator[Call]:
    for out, width in s.linear:
        weight = s.new(out, width, grad=False)
        for double_quant in (False, True):
            yield lambda w=weight, d=double_quant: pf.ops.dequantize_4bit(pf.ops.quantize_4bit(w, double_quant=d))


def _lora_linear(s: Shapes) -> Iterator[Call]:
    for out, width in s.linear:
        weight = s.new(out, width, grad=False)
        packed, x = pf.ops.quantize_4bit(weight), s.new(s.tokens, width)
        for rank in s.ranks:
            a, b = s.new(rank, width), s.new(out, rank)
            magnitude = s.new(out)
            yield lambda x=x, w=packed, a=a, b=b: _backward(pf.ops.lora_linear(x, w, a, b, 2.0))
            yield lambda x=x, w=weight, a=a, b=b: _backward(pf.ops.lora_linear(x, w, a, b, 2.0))
            yield lambda x=x, w=packed, a=a, b=b: _backward(pf.ops.lora_linear(x, w, a, b, 2.0, dropout_p=0.1))
            yield lambda x=x, w=packed, a=a, b=b, m=magnitude: _backward(
                pf.ops.lora_linear(x, w, a, b, 2.0, magnitude=m)
            )


def _varlen_attn(s: Shapes) -> Iterator[Call]:
    cu_seqlens = torch.tensor([0, s.tokens // 3, s.tokens], dtype=torch.int32, device=s.device)
    for heads, kv_heads, dim in s.heads:
        q, k, v = (s.new(s.tokens, n, dim) for n in (heads, kv_heads, kv_heads))
        for window in ((-1, -1), (s.tokens // 4, -1)):
            yield lambda q=q, k=k, v=v, w=window: _backward(pf.ops.varlen_attn(q, k, v, cu_seqlens, window_size=w))


def _linear_cross_entropy(s: Shapes) -> Iterator[Call]:
    width = s.hidden[len(s.hidden) // 2]
    weight, labels = s.new(s.vocab, width, grad=False), torch.arange(s.tokens, device=s.device)
    for tokens in (s.tokens // 4, s.tokens):
        hidden = s.new(tokens, width)
        yield lambda h=hidden, n=tokens: _backward(pf.ops.linear_cross_entropy(h, weight, labels[:n]))
        yield lambda h=hidden, n=tokens: pf.ops.linear_cross_entropy(h.detach(), weight, labels[:n])


def _rms_norm(s: Shapes) -> Iterator[Call]:
    for cols in (*s.hidden, 128):
        x, residual = s.new(s.tokens, cols), s.new(s.tokens, cols)
        for weight in (s.new(cols), s.new(cols, grad=False)):
            yield lambda x=x, w=weight: _backward(pf.ops.rms_norm(x, w))
            yield lambda x=x, w=weight, r=residual: _backward(pf.ops.rms_norm(x, w, residual=r))


def _rope(s: Shapes) -> Iterator[Call]:
    for heads, kv_heads, dim in s.heads:
        q, k = s.new(1, heads, s.tokens, dim), s.new(1, kv_heads, s.tokens, dim)
        for dtype in (s.dtype, torch.float32):
            cos, sin = (s.new(1, s.tokens, dim, grad=False).to(dtype) for _ in range(2))
            yield lambda q=q, k=k, cos=cos, sin=sin: _backward(pf.ops.rope(q, k, cos, sin))


def _glu(s: Shapes) -> Iterator[Call]:
    for out, _width in s.linear:
        gate, up = s.new(s.tokens, out), s.new(s.tokens, out)
        yield lambda g=gate, u=up: _backward(pf.ops.swiglu(g, u))
        yield lambda g=gate, u=up: _backward(pf.ops.geglu(g, u))


CASES: dict[str, Callable[[Shapes], Iterator[Call]]] = {
    "nf4": _nf4,
    "lora_linear": _lora_linear,
    "varlen_attn": _varlen_attn,
    "linear_cross_entropy": _linear_cross_entropy,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "glu": _glu,
}


def _wall_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def measure(ops: list[str], minutes: float, dry_run: bool = False) -> tuple[list[dict[str, Any]], bool]:
    """Run the ops, and time what they launch.

    Args:
        ops: names of `CASES`.
        minutes: after which nothing more is begun.
        dry_run: in Triton's interpreter, which must have been chosen before Triton was imported.

    Returns:
        Entries of kernels/measured.json, and whether the time was enough for all.

    Raises:
        BackendUnavailable: Triton's kernels cannot run here.
    """
    from pyfinetune.kernels.config import autotuning, remembered

    shapes = Shapes(torch.device("cpu" if dry_run else "cuda"), dry_run)
    end, before, done = time.monotonic() + 60 * minutes, len(remembered()), True
    with pf.use_backend("triton"), autotuning(_wall_clock if dry_run else None, 60 * minutes):
        for op in ops:
            for call in CASES[op](shapes):
                done = time.monotonic() < end
                if not done:
                    break
                call()
    where = "Triton's interpreter" if dry_run else torch.cuda.get_device_name()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    on = f"{where}, {_versions()}, {today}"
    return [entry | {"ms": float(f"{entry['ms']:.4g}"), "on": on} for entry in remembered()[before:]], done


def _versions() -> str:
    import triton

    return f"torch {torch.__version__}, triton {triton.__version__}"


def _told(entry: dict[str, Any]) -> str:
    """An entry for readers, with what the model would have launched where it is another."""
    from pyfinetune.kernels.config import FAMILIES, Config

    family, shape = FAMILIES[entry["kernel"]], list(entry["shape"].values())
    config = Config(entry["blocks"], entry["num_warps"], entry["num_stages"])
    model = family.fitting(entry["capability"], *shape)[0]
    same = str(model) == str(config)
    text = f"{family.name} [{family.shape_text(shape)}]: {config}, {entry['ms']:.4g} ms"
    return text if same else f"{text}; the model: {model}"


def _run(args: argparse.Namespace) -> int:
    from pyfinetune.kernels import measured
    from pyfinetune.kernels.config import SHIPPED

    for op in args.ops:
        if op not in CASES:
            raise UserError(f"{op}: no such op", fix=f"choose from: {', '.join(CASES)}")
    if not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes:g}: needs more than 0")
    if args.dry_run and args.json is not None and args.json.resolve() == SHIPPED.resolve():
        raise UserError(f"--json {args.json}: what a rehearsal measures must not ship")
    if not args.dry_run and not torch.cuda.is_available():
        raise UserError("there is no GPU here to measure on", fix="rehearse on the CPU with --dry-run")
    if args.json is not None and args.json.exists():
        try:
            measured.read(args.json)
        except ValueError as error:
            raise UserError(f"--json: {error}", fix="name a new file, or mend this one") from None
    entries, done = measure(args.ops or list(CASES), args.minutes, args.dry_run)
    for entry in entries:
        print(_told(entry))
    if args.json is not None:
        measured.write(args.json, entries)
        print(f"{len(entries)} entries written to {args.json}")
    if not done:
        print(f"stopped after {args.minutes:g} minutes; more: --minutes {2 * args.minutes:g}, or name ops")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m pyfinetune.bench.tune`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pyfinetune.bench.tune", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"all by default: {', '.join(CASES)}")
    parser.add_argument("--json", type=Path, help="file to add the entries to")
    parser.add_argument("--minutes", type=float, default=5.0, help="after which nothing more is begun")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU with tiny shapes")
    args = parser.parse_args(argv)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    try:
        return _run(args)
    except PyfinetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
