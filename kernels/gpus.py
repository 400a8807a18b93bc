"""What the GPUs have that the kernels are for: the limits of a multiprocessor, and the rates of one typical card.

The limits are the architecture's (CUDA programming guide, technical specifications by compute capability). The rates
are those of the card that most people have of it, from its vendor's data sheet, dense, with sums in float32; that of
the second-level cache is no vendor's number and known to a factor of two at best. A prediction needs ratios of them.
"""

from __future__ import annotations

from dataclasses import dataclass

_RESERVED = 1024  # bytes of shared memory that the driver takes from each block
_MOST_REGISTERS = 255  # of a thread


@dataclass(frozen=True)
class Gpu:
    """One compute capability.

    Args:
        card: whose rates these are.
        multiprocessors: how many it has.
        warps, blocks, shared: of a multiprocessor, shared memory in bytes.
        block_shared: bytes of shared memory that one block may have.
        memory, cache: bytes a second, of the second-level cache.
        cache_bytes: how much that holds.
        tensor, plain: operations a second of 16-bit products on the tensor cores, and of float32 without them.
        registers: of a multiprocessor.
    """

    card: str
    multiprocessors: int
    warps: int
    blocks: int
    shared: int
    block_shared: int
    memory: float
    cache: float
    cache_bytes: int
    tensor: float
    plain: float
    registers: int = 65536

    def most_registers(self, warps: int) -> int:
        """How many registers a thread of a block of so many warps can have."""
        return min(_MOST_REGISTERS, self.registers // (32 * warps) // 8 * 8)

    def resident(self, warps: int, shared: int, registers: int) -> int:
        """How many blocks a multiprocessor holds at a time; 0 where not even one fits.

        Args:
            warps: of a block.
            shared: bytes of a block.
            registers: of a thread; a warp gets them in units of 256.
        """
        of_warp = -(-max(registers, 1) * 32 // 256) * 256
        # Each of the four parts of a multiprocessor has its own registers, and a warp stays in one part.
        by_registers = 4 * (self.registers // 4 // of_warp) // warps
        by_shared = self.shared // (-(-(shared + _RESERVED) // 128) * 128)
        return min(self.warps // warps, by_registers, by_shared, self.blocks)


GPUS = {
    80: Gpu("A100", 108, 64, 32, 164 << 10, 163 << 10, 2.04e12, 5.0e12, 40 << 20, 312e12, 19.5e12),
    86: Gpu("RTX 3090", 82, 48, 16, 100 << 10, 99 << 10, 0.94e12, 2.2e12, 6 << 20, 71e12, 35.6e12),
    89: Gpu("RTX 4090", 128, 48, 24, 100 << 10, 99 << 10, 1.01e12, 5.0e12, 72 << 20, 165e12, 82.6e12),
    90: Gpu("H100", 132, 64, 32, 228 << 10, 227 << 10, 3.35e12, 7.0e12, 50 << 20, 989e12, 66.9e12),
    100: Gpu("B200", 148, 64, 32, 228 << 10, 227 << 10, 8.0e12, 14.0e12, 126 << 20, 2250e12, 80e12),
    120: Gpu("RTX 5090", 170, 48, 24, 100 << 10, 99 << 10, 1.79e12, 7.0e12, 96 << 20, 209.5e12, 104.8e12),
}


def gpu_of(capability: int) -> Gpu:
    """The GPU of a capability; of one that is not listed, the next older one that is, or else the oldest."""
    older = [known for known in GPUS if known <= capability]
    return GPUS[max(older) if older else min(GPUS)]
