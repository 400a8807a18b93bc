"""Counter-based random words: the plain torch form of the generator that the kernels use for dropout."""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32-bit words of a product; int64 wraps, and the words of the wrapped product are the same."""
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def random_words(seed: torch.Tensor, n: int) -> torch.Tensor:
    """int64 [n] in [0, 2^32): Philox 4x32-10; word i is word i % 4 of the block at counter i // 4 under key `seed`.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    counter = torch.arange((n + 3) // 4, dtype=torch.int64, device=seed.device)
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=1).reshape(-1)[:n]


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """x * keep / (1 - p); element i is kept when its random word reaches p * 2^32. Selects, so inf drops to zero."""
    keep = random_words(seed.to(x.device), x.numel()).reshape(x.shape) >= int(p * 2**32)
    scale = 1.0 / (1.0 - p)
    if x.dtype == torch.float64:
        return torch.where(keep, x * scale, 0)
    # The kernels scale in float32 and round once.
    return torch.where(keep, x.float() * torch.tensor(scale, dtype=torch.float32), 0).to(x.dtype)
