"""The cases for pytest-benchmark: `pytest bench/`. Each is checked before it is timed."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyfinetune.bench import cases_of
from pyfinetune.bench.harness import OURS, Case

# A case under a forced instruction set needs a process of its own: PYFINETUNE_CPU_ISA=avx2 pytest bench/.
CASES = [case for case in cases_of([], quick=True) if case.isa is None]


@pytest.mark.filterwarnings("ignore")  # the peers' warnings are not ours to judge
@pytest.mark.parametrize("who", [OURS, "peer"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(benchmark, case: Case, who: str):
    """Right, and timed; ours and the peer's of one case are in one group of the report."""
    torch.manual_seed(0)
    with torch.no_grad():
        setup = case.build(torch.device("cpu"))
        names = [name for name in setup.calls if (name == OURS) == (who == OURS)]
        if not names:
            pytest.skip(f"no peer: {setup.missing}")
        verdict = setup.check[names[0]]()
        assert verdict.ok, verdict.detail
        benchmark.group = case.name
        benchmark.name = names[0]
        rounds = itertools.count()
        benchmark(lambda: setup.calls[names[0]](next(rounds)))
