"""The cases for pytest-benchmark: `pytest bench/`. Each is checked before it is timed."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from pyfinetune.bench import cases_of
from pyfinetune.bench.harness import OURS, Setup
from pyfinetune.bench.peer_names import PEERS, Choice

# A case under a forced instruction set needs a process of its own: PYFINETUNE_CPU_ISA=avx2 pytest bench/.
CASES = {case.name: case for case in cases_of([], quick=True) if case.isa is None}
# Peers by the name that --peer takes; what compiles first, or needs a GPU, is left to `pyfinetune bench`.
WHO = [OURS, *(name for name, peer in PEERS.items() if not peer.on_request and not peer.gpu)]


@functools.lru_cache(maxsize=1)  # the sides of one case come one after the other
def made(name: str) -> Setup:
    """The case of that name made ready."""
    torch.manual_seed(0)
    with torch.no_grad():
        return CASES[name].build(torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")  # the peers' warnings are not ours to judge
@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("name", CASES)
def test_case(benchmark, name: str, who: str):
    """Right, and timed; ours and the peers of one case are in one group of the report."""
    setup = made(name)
    wanted = [OURS] if who == OURS else [peer for peer in setup.calls if Choice((who,)).includes(peer)]
    if not wanted or wanted[0] not in setup.calls:
        pytest.skip(f"{who} has no part in this case; missing: {setup.missing or 'nothing'}")
    with torch.no_grad():
        verdict = setup.check[wanted[0]]()
        assert verdict.ok, verdict.detail
        benchmark.group = name
        rounds = itertools.count()
        benchmark(lambda: setup.calls[wanted[0]](next(rounds)))
