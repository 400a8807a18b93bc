"""How long a launch should take: a roofline with the GPU's parallelism in it, to rank configurations by.

    resident   blocks that a multiprocessor holds, by shared memory, registers and warps
    at once    min(programs, multiprocessors * resident)
    waves      ceil(programs / (multiprocessors * resident))
    memory     bytes / min(bandwidth, at once * bytes under way in a block / LATENCY)                 (Little's law)
    cache      bytes asked for by all programs / rate of the second-level cache
    compute    operations / (peak * programs / (multiprocessors * ceil(programs / multiprocessors))
                                  * min(1, warps on a multiprocessor / WARPS))           the busiest one ends last
    chain      waves * LATENCY * (1 + steps / stages)     what a program waits for, one step after the other
    seconds    max(memory, cache, compute, chain)

Absolute times are rough; what it is for is the order of configurations of one kernel, and those within `TIE` of the
best count as equal to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyfinetune.kernels.gpus import Gpu

LATENCY = 7e-7  # seconds from a load that misses all caches to its data, about the same on all of them
WARPS = 8  # of a multiprocessor that keep its arithmetic busy: two for each of its four parts
TIE = 1.05


@dataclass(frozen=True)
class Work:
    """What a launch does with one configuration.

    Args:
        programs: blocks of the grid.
        moved: bytes from and to memory, each counted once.
        under_way: bytes that one block loads at a time.
        asked: bytes that all programs load and store together; `moved` by default.
        flops: operations, two to a multiply-add.
        steps: of a program's loop, each of which waits for a load; 0 where all is loaded at once.
        tensor_cores: whether the operations are 16-bit products.
    """

    programs: int
    moved: float
    under_way: float
    asked: float = 0.0
    flops: float = 0.0
    steps: int = 0
    tensor_cores: bool = False


def seconds(gpu: Gpu, work: Work, warps: int, shared: int, registers: int, stages: int) -> float:
    """What a launch should take; infinite where no block fits a multiprocessor.

    Args:
        gpu: where.
        work: what.
        warps, shared, registers: of a block, bytes of a block, and of a thread.
        stages: of the loop's loads.
    """
    resident = gpu.resident(warps, shared, registers)
    if not resident:
        return float("inf")
    room = gpu.multiprocessors * resident
    memory = work.moved / min(gpu.memory, min(work.programs, room) * work.under_way / LATENCY)
    cache = max(work.asked, work.moved) / gpu.cache
    busiest = -(-work.programs // gpu.multiprocessors)
    balance = work.programs / (gpu.multiprocessors * busiest)
    occupied = min(1.0, min(resident, busiest) * warps / WARPS)
    compute = work.flops / ((gpu.tensor if work.tensor_cores else gpu.plain) * balance * occupied)
    chain = -(-work.programs // room) * LATENCY * (1 + work.steps / stages)
    return max(memory, cache, compute, chain)
