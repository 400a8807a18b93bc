"""What only a GPU can show: other streams, captured graphs, no synchronisation, more than 2^31 elements, red zones.

PYFINETUNE_GPU_REHEARSAL=1 runs the same code on the CPU, where streams and graphs are stood in for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os

import pytest
import torch
from gpu_calls import CALLS, LARGE, Maker, large
from oracle import BACKWARD, FORWARD, assert_as_good_as
from torch.overrides import TorchFunctionMode

import pyfinetune as pf
from pyfinetune.ops._triton import interpreted

REHEARSAL = os.environ.get("PYFINETUNE_GPU_REHEARSAL") == "1"
GPU = torch.cuda.is_available() and not REHEARSAL
pytestmark = pytest.mark.skipif(not (GPU or REHEARSAL), reason="needs a GPU")

DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32] if interpreted() else [torch.bfloat16, torch.float16, torch.float32]
REPLAYS = 100 if GPU else 2
BEYOND = 2**31 if GPU else 2**13
every_call = pytest.mark.parametrize("name", CALLS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
MARGIN = 4096  # bytes on either side of a tensor


@pytest.fixture(autouse=True)
def _freed():
    """What a test held is there for others, in other processes too."""
    yield
    if GPU:
        torch.cuda.empty_cache()


@contextlib.contextmanager
def triton():
    """Every op of the block by Triton; a test of one that has no such kernel is skipped."""
    try:
        with pf.use_backend("triton"):
            yield
    except pf.BackendUnavailable as error:
        pytest.skip(str(error))


def synchronize():
    if GPU:
        torch.cuda.synchronize()


@contextlib.contextmanager
def side_stream(busy: bool = True):
    """Another stream, on which something takes its time first: what does not wait for it reads too early."""
    if not GPU:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if busy:
            torch.cuda._sleep(20_000_000)
        yield
    torch.cuda.current_stream().wait_stream(stream)


class Captured:
    """A function's work as a graph, or the function itself where there are none."""

    def __init__(self, function):
        self.function, self.results, self.graph = function, None, None
        if GPU:
            with side_stream(busy=False):
                function()  # compiles, and makes what libraries keep
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.results = function()

    def replay(self) -> list[torch.Tensor]:
        if self.graph is None:
            return self.function()
        self.graph.replay()
        return self.results


def same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach().clone() for t in tensors]


@every_dtype
@every_call
def test_small(name, dtype):
    """Finite, and the same again; what compute-sanitizer watches."""
    call = getattr(Maker(DEVICE, dtype), name)()
    with triton():
        first, second = call.run(), call.run()
    synchronize()
    assert all(bool(torch.isfinite(t).all()) for t in first if t.is_floating_point())
    assert same(first, second)


@every_dtype
@every_call
def test_another_stream(name, dtype):
    """Inputs that the stream is still busy making are waited for, and results are on that stream too."""
    call = getattr(Maker(DEVICE, dtype), name)()
    with triton():
        expected = call.run()
        synchronize()
        with side_stream():
            results = copies(call.run(copies(call.tensors)))
        synchronize()
    assert same(results, expected)


@every_call
def test_a_captured_graph(name):
    """Forward and backward in one graph, replayed on the same inputs and on others written in their place."""
    make = Maker(DEVICE, DTYPES[0])
    call = getattr(make, name)()
    given = copies(call.tensors)
    floats = [i for i, t in enumerate(call.tensors) if t.requires_grad]
    others = [make.random(*given[i].shape) for i in floats]
    with triton():
        expected = call.run(given)
        captured = Captured(lambda: call.run(given))
        for _ in range(REPLAYS):
            assert same(captured.replay(), expected)
        for i, other in zip(floats, others, strict=True):
            given[i].copy_(other)
        synchronize()
        again = copies(captured.replay())
        assert same(again, call.run(given))
    assert not floats or not same(again, expected)


@every_call
def test_no_synchronisation(name):
    """The host runs ahead: nothing in a call waits for the GPU."""
    call = getattr(Maker(DEVICE, DTYPES[0]), name)()
    with triton():
        call.run()
        synchronize()
        if GPU:
            torch.cuda.set_sync_debug_mode("error")
        try:
            call.run()
        finally:
            if GPU:
                torch.cuda.set_sync_debug_mode("default")


@every_call
def test_memory_does_not_grow(name):
    call = getattr(Maker(DEVICE, DTYPES[0]), name)()
    held = torch.cuda.memory_allocated if GPU else (lambda: 0)
    with triton():
        call.run()
        gc.collect()
        before = held()
        for _ in range(20 if GPU else 1):
            call.run()
        synchronize()
        gc.collect()
        assert held() <= before


class RedZones(TorchFunctionMode):
    """Every tensor made without values stands between two margins, which `check` finds untouched."""

    MAKERS = frozenset(
        [torch.empty, torch.empty_like, torch.zeros, torch.zeros_like, torch.Tensor.new_empty, torch.Tensor.new_zeros]
    )

    def __init__(self):
        super().__init__()
        self.buffers: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function not in self.MAKERS or made.device.type != DEVICE or not made.is_contiguous():
            return made
        size = made.numel() * made.element_size()
        buffer = torch.full((size + 2 * MARGIN,), 77, dtype=torch.uint8, device=made.device)
        self.buffers.append((buffer, size))
        inside = buffer[MARGIN : MARGIN + size].view(made.dtype).view(made.shape)
        return inside.copy_(made)

    def check(self) -> int:
        """How many tensors there were, all of whose margins are as they were."""
        for buffer, size in self.buffers:
            outside = torch.cat([buffer[:MARGIN], buffer[MARGIN + size :]])
            assert bool((outside == 77).all()), f"a write left a tensor of {size} bytes"
        return len(self.buffers)


def between_nans(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with NaN (or the largest integer) before and after them, which a stray read would find."""
    kind = tensor.dtype
    poison = float("nan") if kind.is_floating_point else torch.iinfo(kind).max
    margin = MARGIN // tensor.element_size()
    buffer = torch.full((tensor.numel() + 2 * margin,), poison, dtype=kind, device=tensor.device)
    return buffer[margin : margin + tensor.numel()].view(tensor.shape).copy_(tensor.detach())


@every_dtype
@every_call
def test_red_zones(name, dtype):
    """No write outside of what the op makes, and no read outside of what it is given."""
    call = getattr(Maker(DEVICE, dtype), name)()
    with triton():
        expected = call.run()
        given = [between_nans(tensor) for tensor in call.tensors]
        zones = RedZones()
        # On the threads that autograd has for a GPU, the mode would not see what is made.
        with torch.autograd.set_multithreading_enabled(False), zones:
            results = call.run(given)
        synchronize()
    assert zones.check() > 0, "nothing was made where it could be watched"
    assert same(results, expected)


def test_red_zones_find_a_stray_write():
    zones = RedZones()
    with zones:
        made = torch.empty(5, 3, device=DEVICE)
    made.as_strided((16,), (1,)).fill_(1.0)
    with pytest.raises(AssertionError, match="a write left a tensor of 60 bytes"):
        zones.check()


def memory(gibibytes: int) -> None:
    """Skips the test on a GPU with less to spare; fills nothing with NaN, as tens of gigabytes take their time."""
    if GPU:
        torch.cuda.empty_cache()
    if GPU and torch.cuda.mem_get_info()[0] < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free memory")
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", LARGE)
def test_more_than_31_bits_of_elements(name):
    """The last rows of tensors past 2^31 elements are what the same rows are alone."""
    memory(100)
    call = large(name, DEVICE, DTYPES[0], BEYOND)
    assert max(tensor.numel() for tensor in call.tensors) > BEYOND
    last = [t.detach().clone().requires_grad_(t.requires_grad) for t in call.last(call.tensors)]
    tail = dataclasses.replace(call, tensors=last)
    with triton():
        results = call.run()
    with pf.use_backend("reference"):
        eager = tail.run()
        exact = tail.run([t.double() if t.is_floating_point() else t for t in last])
    count = len(results) - sum(t.requires_grad for t in last)
    compared = 0
    for index, (found, plain) in enumerate(zip(results, eager, strict=True)):
        axes = [axis for axis, size in enumerate(plain.shape) if found.shape[axis] != size]
        if axes:  # else it is a sum over all rows, such as the gradient of a norm's weight
            size = plain.shape[axes[0]]
            cut = found.narrow(axes[0], found.shape[axes[0]] - size, size)
            factor = FORWARD if index < count else BACKWARD
            assert_as_good_as(cut, plain, exact[index], factor, f"{name}: result or gradient {index}")
            compared += 1
    assert compared >= 2


def test_more_than_31_bits_of_4_bit_weights():
    memory(60)
    small = Maker(DEVICE, DTYPES[0]).packed(64, 4096, double_quant=False)
    times = BEYOND // (64 * 4096) + 1
    codes, absmax = small.codes.repeat(times, 1), small.absmax.repeat(times)
    packed = dataclasses.replace(small, codes=codes, absmax=absmax, shape=(64 * times, 4096))
    with triton():
        decoded, expected = pf.ops.dequantize_4bit(packed), pf.ops.dequantize_4bit(small)
    assert decoded.numel() > BEYOND
    assert torch.equal(decoded[:64], expected)
    assert torch.equal(decoded[-64:], expected)
