"""Op `rms_norm`: root-mean-square normalisation with a gain, alone or together with the residual sum before it."""

from __future__ import annotations

import torch

from pyfinetune._native import capsule, native, threads
from pyfinetune.ops._checks import ALL_FLOATS, check_tensor, cpu_why_not, fail
from pyfinetune.ops._layout import unit_rows
from pyfinetune.ops._op import Backend, Op
from pyfinetune.ops._triton import configuration, kernels, on_device_of, triton_why_not

_NAME = "rms_norm"


def _check(x, weight, residual, eps, offset):
    check_tensor(_NAME, "x", x, ALL_FLOATS)
    check_tensor(_NAME, "weight", weight, ALL_FLOATS)
    if x.dim() == 0 or x.shape[-1] == 0:
        fail(_NAME, f"x is {list(x.shape)}, needs [..., features] with at least one feature")
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        fail(_NAME, f"weight is {list(weight.shape)}, needs [{x.shape[-1]}]")
    if weight.device != x.device:
        fail(_NAME, f"x is on {x.device}, weight is on {weight.device}")
    if residual is not None:
        _check_like("residual", residual, x)
    if not 0.0 <= eps < float("inf"):
        fail(_NAME, f"eps is {eps}, needs 0 <= eps")


def _check_like(name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    check_tensor(_NAME, name, tensor, (x.dtype,))
    if tensor.shape != x.shape:
        fail(_NAME, f"{name} is {list(tensor.shape)}, needs x's shape {list(x.shape)}")
    if tensor.device != x.device:
        fail(_NAME, f"x is on {x.device}, {name} is on {tensor.device}")


def _check_bwd(dout, dsum, x, weight, rstd, offset, need_dx, need_dweight):
    _check(x, weight, dsum, 0.0, offset)
    _check_like("dout", dout, x)
    check_tensor(_NAME, "rstd", rstd, (_stat_dtype(x),))
    if rstd.shape != x.shape[:-1]:
        fail(_NAME, f"rstd is {list(rstd.shape)}, needs {list(x.shape[:-1])}")


def _stat_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(x, weight, residual, eps, offset):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, total, x.new_empty(x.shape[:-1], dtype=_stat_dtype(x))


def _fake_bwd(dout, dsum, x, weight, rstd, offset, need_dx, need_dweight):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else x.new_empty(0)
    return dx, weight.new_empty(weight.shape if need_dweight else 0)


def _reference(x, weight, residual, eps, offset):
    total = x.new_empty(0) if residual is None else (x + residual).contiguous()
    inner = (x if residual is None else total).to(_stat_dtype(x))
    rstd = torch.rsqrt(inner.square().mean(dim=-1) + eps).contiguous()
    y = inner * rstd[..., None] * (weight.to(rstd.dtype) + offset)
    return y.to(x.dtype).contiguous(), total, rstd


def _reference_bwd(dout, dsum, x, weight, rstd, offset, need_dx, need_dweight):
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    normal, g = x.to(rstd.dtype) * rstd[..., None], dout.to(rstd.dtype)
    if need_dx:
        through = g * (weight.to(rstd.dtype) + offset)
        dx = rstd[..., None] * (through - normal * (through * normal).mean(dim=-1, keepdim=True))
        dx = (dx if dsum is None else dx + dsum).to(x.dtype).contiguous()
    if need_dweight:
        dweight = (g * normal).reshape(-1, x.shape[-1]).sum(dim=0).to(weight.dtype)
    return dx, dweight


def _cpu(x, weight, residual, eps, offset):
    x = unit_rows(x)
    residual = None if residual is None else unit_rows(residual)
    y, total, rstd = _fake(x, weight, residual, eps, offset)
    native.rms_norm(
        capsule(x),
        capsule(weight.contiguous()),
        capsule(residual),
        eps,
        offset,
        capsule(y),
        None if residual is None else capsule(total),
        capsule(rstd),
        threads(),
    )
    return y, total, rstd


def _cpu_bwd(dout, dsum, x, weight, rstd, offset, need_dx, need_dweight):
    dx, dweight = _fake_bwd(dout, dsum, x, weight, rstd, offset, need_dx, need_dweight)
    native.rms_norm_bwd(
        capsule(unit_rows(dout)),
        None if dsum is None else capsule(unit_rows(dsum)),
        capsule(unit_rows(x)),
        capsule(weight.contiguous()),
        capsule(rstd.contiguous()),
        offset,
        capsule(dx) if need_dx else None,
        capsule(dweight) if need_dweight else None,
        threads(),
    )
    return dx, dweight


def _triton(x, weight, residual, eps, offset):
    y, total, rstd = _fake(x, weight, residual, eps, offset)
    x, residual = unit_rows(x), None if residual is None else unit_rows(residual)
    with on_device_of(x):
        kernels(_NAME).rms_norm(y, total, rstd, x, residual, weight.contiguous(), eps, offset)
    return y, total, rstd


def _triton_bwd(dout, dsum, x, weight, rstd, offset, need_dx, need_dweight):
    dx, dweight = _fake_bwd(dout, dsum, x, weight, rstd, offset, need_dx, need_dweight)
    with on_device_of(x):
        kernels(_NAME).rms_norm_bwd(
            dx if need_dx else None,
            dweight if need_dweight else None,
            unit_rows(dout),
            None if dsum is None else unit_rows(dsum),
            unit_rows(x),
            weight.contiguous(),
            rstd.contiguous(),
            offset,
        )
    return dx, dweight


_bwd = Op(
    "rms_norm_bwd",
    "(Tensor dout, Tensor? dsum, Tensor x, Tensor weight, Tensor rstd, float offset, bool need_dx, bool need_dweight) "
    "-> (Tensor dx, Tensor dweight)",
    check=_check_bwd,
    fake=_fake_bwd,
    reference=_reference_bwd,
    backends=[
        Backend("triton", _triton_bwd, lambda dout, dsum, x, weight, *rest: triton_why_not(x, weight)),
        Backend("cpu", _cpu_bwd, lambda dout, dsum, x, weight, *rest: cpu_why_not(x, weight)),
    ],
)


def _setup_context(ctx, inputs, output):
    x, weight, residual, _eps, offset = inputs
    _y, total, rstd = output
    if residual is None:
        ctx.mark_non_differentiable(total, rstd)
    else:
        ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else total, weight, rstd)
    ctx.offset, ctx.has_residual = offset, residual is not None


def _backward(ctx, dout, dsum, _drstd):
    dsum = dsum if ctx.has_residual else None
    need_x, need_weight, need_residual, *_ = ctx.needs_input_grad
    if dout is None:
        return dsum if need_x else None, None, dsum if need_residual else None, None, None
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = _bwd(dout, dsum, x, weight, rstd, ctx.offset, need_x or need_residual, need_weight)
    return dx if need_x else None, dweight if need_weight else None, dx if need_residual else None, None, None


def _prepare(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple:
    check_tensor(_NAME, "x", x)
    check_tensor(_NAME, "weight", weight)
    if residual is not None:
        check_tensor(_NAME, "residual", residual)
    return x, weight, residual, eps, offset


def _configuration(capability, x, weight, residual, *rest):
    return configuration(x, capability, lambda on: kernels(_NAME).describe(on, x, residual))


_rms_norm = Op(
    _NAME,
    "(Tensor x, Tensor weight, Tensor? residual, float eps, float offset) -> (Tensor y, Tensor total, Tensor rstd)",
    check=_check,
    fake=_fake,
    reference=_reference,
    backends=[
        Backend("triton", _triton, lambda x, weight, *rest: triton_why_not(x, weight), _configuration),
        Backend("cpu", _cpu, lambda x, weight, *rest: cpu_why_not(x, weight)),
    ],
    prepare=_prepare,
    setup_context=_setup_context,
    backward=_backward,
)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Divide each row by its root mean square and multiply it with a gain.

    y = x' * rsqrt(mean(x'^2) + eps) * (offset + weight),  x' = x + residual rounded to x's dtype (x alone without one).

    Statistics and products are float32 (float64 for float64), rounded once. The gradient of `weight` is computed only
    where it trains; it is summed in float32 in an order that does not depend on the number of threads.

    Args:
        x: [..., features], float32, float16, bfloat16 (float64 on the reference backend); any strides.
        weight: [features], of any float dtype.
        eps: added to the mean square; >= 0.
        residual: of x's shape and dtype, or None: the residual stream that x is added to.
        offset: added to the weight: 1.0 for Gemma, whose weights are stored around zero.

    Returns:
        y, of x's shape and dtype; with `residual` the pair (y, x'), where x' is the new residual stream. Both are
        differentiable.

    Raises:
        InvalidInput: an argument of the wrong shape, dtype or device; the message names it.

    Example:
        >>> x, weight = torch.randn(2, 16, 64), torch.ones(64)
        >>> y = pf.ops.rms_norm(x, weight)
        >>> y, stream = pf.ops.rms_norm(x, weight, residual=torch.randn_like(x))

    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """
    y, total, _rstd = _rms_norm(*_prepare(x, weight, eps, residual=residual, offset=offset))
    return y if residual is None else (y, total)
