"""Is the result right? Ours and the peers' are held against float64, or bit for bit where the format says so."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfinetune.bench.harness import Verdict


def same_bits(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], names: Sequence[str]) -> Verdict:
    """Every tensor equal to the expected one, element for element."""
    for name, a, b in zip(names, got, expected, strict=True):
        if a.dtype != b.dtype or a.numel() != b.numel():
            return Verdict(False, f"{name}: {a.dtype} {list(a.shape)}, expected {b.dtype} {list(b.shape)}")
        wrong = int((a.reshape(-1) != b.reshape(-1)).sum())
        if wrong:
            return Verdict(False, f"{name}: {wrong} of {a.numel()} elements differ")
    return Verdict(True, "bit-equal")


def close_to_exact(
    got: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    eager: Sequence[torch.Tensor],
    names: Sequence[str],
    factors: Sequence[float],
) -> Verdict:
    """No error above `factor` times the one that torch's plain code makes in the same dtype, plus one ulp of the scale.

    Args:
        got: what is judged.
        exact: the same in float64.
        eager: the same by torch's plain operators in the compute dtype, which also names that dtype.
        names: what the tensors are called.
        factors: how much worse than eager each may be.
    """
    worst = 0.0
    for name, a, reference, plain, factor in zip(names, got, exact, eager, factors, strict=True):
        if a.shape != reference.shape:
            return Verdict(False, f"{name}: {list(a.shape)}, expected {list(reference.shape)}")
        if not bool(torch.isfinite(a).all()):
            return Verdict(False, f"{name}: not finite")
        error = float((a.double() - reference).abs().max())
        ulp = torch.finfo(plain.dtype).eps * float(reference.abs().max())
        allowed = factor * float((plain.double() - reference).abs().max()) + ulp
        if error > allowed:
            return Verdict(False, f"{name}: error {error:.3g}, at most {allowed:.3g}")
        worst = max(worst, error / allowed if allowed else 0.0)
    return Verdict(True, f"error {worst:.0%} of what is allowed")
