"""What "right" means: error against float64, measured in units of torch's own error in the same dtype."""

from __future__ import annotations

import torch

FORWARD, BACKWARD = 1.5, 2.0


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference from the float64 result; infinite when a NaN or inf appears that is not there."""
    actual, exact = actual.detach().double(), exact.detach().double()
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, needs {tuple(exact.shape)}"
    if actual.numel() == 0:
        return 0.0
    difference = (actual - exact).abs()
    return difference.nan_to_num(nan=float("inf")).max().item()


def assert_as_good_as(
    actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, factor: float, name: str = "result"
) -> None:
    """error(actual) <= factor * error(eager) + one ulp of the result's scale, in the eager result's dtype."""
    if exact.numel() == 0:
        assert actual.shape == exact.shape
        return
    ulp = torch.finfo(eager.dtype).eps * exact.detach().abs().max().item()
    allowed = factor * error(eager, exact) + ulp
    found = error(actual, exact)
    assert found <= allowed, f"{name}: error {found:.3e}, allowed {allowed:.3e} (eager {error(eager, exact):.3e})"


class Guarded:
    """A tensor inside a larger buffer whose other elements hold a sentinel, to find stray writes."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, margin: int = 256, sentinel: int = 77):
        numel = 1
        for size in shape:
            numel *= size
        self.buffer = torch.full((numel + 2 * margin,), sentinel, dtype=dtype)
        self.tensor = self.buffer[margin : margin + numel].view(shape)
        self.margin, self.sentinel = margin, sentinel

    def check(self) -> None:
        """No element outside the tensor has changed."""
        outside = torch.cat([self.buffer[: self.margin], self.buffer[self.buffer.numel() - self.margin :]])
        assert (outside == self.sentinel).all(), "a write left the tensor"


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in every layout that callers produce."""
    padded = torch.stack([x, torch.zeros_like(x)], dim=-1)
    shifted = torch.cat([torch.zeros(3, dtype=x.dtype), x.reshape(-1)])[3:].view(x.shape)
    wide = torch.cat([x, torch.zeros_like(x)], dim=-1)[..., : x.shape[-1]]
    views = {"contiguous": x, "every other element": padded[..., 0], "odd offset": shifted, "wide rows": wide}
    if x.dim() == 2:
        views["transposed"] = x.T.contiguous().T
    for name, view in views.items():
        assert torch.equal(view, x), name
    return views
