"""Op `rope`: rotary position embedding of queries and keys, halves rotated against each other as in GPT-NeoX."""

from __future__ import annotations

import torch

from pyfinetune._native import capsule, native, threads
from pyfinetune.ops._checks import ALL_FLOATS, check_tensor, cpu_why_not, fail
from pyfinetune.ops._layout import unit_rows
from pyfinetune.ops._op import Backend, Op
from pyfinetune.ops._triton import configuration, kernels, on_device_of, triton_why_not

_NAME = "rope"


def _check(q, k, cos, sin):
    check_tensor(_NAME, "q", q, ALL_FLOATS)
    check_tensor(_NAME, "k", k, (q.dtype,))
    check_tensor(_NAME, "cos", cos, ALL_FLOATS)
    check_tensor(_NAME, "sin", sin, (cos.dtype,))
    if q.dim() not in (3, 4):
        fail(_NAME, f"q is {list(q.shape)}, needs [batch, heads, tokens, head_dim] or [tokens, heads, head_dim]")
    if k.dim() != q.dim() or k.shape[:1] != q.shape[:1] or k.shape[2:] != q.shape[2:]:
        fail(_NAME, f"k is {list(k.shape)}, needs q's shape {list(q.shape)} up to the heads, dimension 1")
    # The heads are dimension 1 in both layouts, and what is left of q without them is what cos has to fit.
    shared = cos.dim() == 3 and cos.shape[0] == 1
    batch, tokens = cos.shape[:1], cos.shape[1:-1]
    if cos.dim() != q.dim() - 1 or tokens != q.shape[2:-1] or not (shared or batch == q.shape[:1]):
        wanted = f"[{q.shape[0]} or 1, {q.shape[2]}, rotary_dim]" if q.dim() == 4 else f"[{q.shape[0]}, rotary_dim]"
        fail(_NAME, f"cos is {list(cos.shape)}, needs {wanted} for q {list(q.shape)}")
    if sin.shape != cos.shape:
        fail(_NAME, f"sin is {list(sin.shape)}, needs cos's shape {list(cos.shape)}")
    rotary_dim = cos.shape[-1]
    if rotary_dim % 2 or not 0 < rotary_dim <= q.shape[-1]:
        fail(_NAME, f"cos is {list(cos.shape)}, needs an even last size of 2 to {q.shape[-1]}, q's head_dim")
    if not q.device == k.device == cos.device == sin.device:
        where = ", ".join(f"{name} is on {t.device}" for name, t in (("q", q), ("k", k), ("cos", cos), ("sin", sin)))
        fail(_NAME, where)


def _like(x: torch.Tensor) -> torch.Tensor:
    """A new tensor with x's order of dimensions in memory.

    Queries that are a [batch, tokens, heads, head_dim] projection seen with its heads first stay that, and attention
    finds them as it wants them.
    """
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else x.new_empty(x.shape)


def _fake(q, k, cos, sin):
    return _like(q), _like(k)


def _wide(tensor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _rotated(x, cos, sin, backward: bool):
    rotary_dim, half = cos.shape[-1], cos.shape[-1] // 2
    cos, sin = (_wide(t, x).unsqueeze(1) for t in (cos, sin))
    inner = _wide(x[..., :rotary_dim], x)
    out = _like(x)
    if backward:
        # The transpose of y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2.
        inner = inner * cos + torch.roll(inner * sin, half, dims=-1) * _signs(inner, half, -1)
    else:
        inner = inner * cos + torch.roll(inner, half, dims=-1) * _signs(inner, half, 1) * sin
    out[..., :rotary_dim] = inner
    out[..., rotary_dim:] = x[..., rotary_dim:]
    return out


def _signs(x: torch.Tensor, half: int, last: int) -> torch.Tensor:
    """-last for the first half of the columns, last for the second."""
    return torch.where(torch.arange(2 * half, device=x.device) < half, -last, last).to(x.dtype)


def _reference(q, k, cos, sin):
    return _rotated(q, cos, sin, False), _rotated(k, cos, sin, False)


def _reference_bwd(dq, dk, cos, sin):
    return _rotated(dq, cos, sin, True), _rotated(dk, cos, sin, True)


def _cpu_in(backward: bool):
    def run(q, k, cos, sin):
        q_out, k_out = _like(q), _like(k)
        inputs = (capsule(unit_rows(t)) for t in (q, k, cos, sin))
        native.rope(*inputs, capsule(q_out), capsule(k_out), backward, threads())
        return q_out, k_out

    return run


def _triton_in(backward: bool):
    def run(q, k, cos, sin):
        q_out, k_out = _like(q), _like(k)
        with on_device_of(q):
            kernels(_NAME).rope(q_out, k_out, *(unit_rows(t) for t in (q, k, cos, sin)), backward)
        return q_out, k_out

    return run


def _configuration(capability, q, k, cos, sin):
    return configuration(q, capability, lambda on: kernels(_NAME).describe(on, q, cos))


def _backends(backward: bool) -> list[Backend]:
    return [
        Backend("triton", _triton_in(backward), lambda q, k, cos, sin: triton_why_not(q, cos), _configuration),
        Backend("cpu", _cpu_in(backward), lambda q, k, cos, sin: cpu_why_not(q, cos)),
    ]


_bwd = Op(
    "rope_bwd",
    "(Tensor dq_out, Tensor dk_out, Tensor cos, Tensor sin) -> (Tensor dq, Tensor dk)",
    check=_check,
    fake=_fake,
    reference=_reference_bwd,
    backends=_backends(backward=True),
)


def _setup_context(ctx, inputs, output):
    _q, _k, cos, sin = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk):
    need_q, need_k, *_ = ctx.needs_input_grad
    need_q, need_k = need_q and dq is not None, need_k and dk is not None
    if not need_q and not need_k:
        return None, None, None, None
    # What is not wanted goes in with no heads.
    dq, dk = dq if need_q else dk[:, :0], dk if need_k else dq[:, :0]
    dq, dk = _bwd(dq, dk, *ctx.saved_tensors)
    return dq if need_q else None, dk if need_k else None, None, None


def _prepare(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
    for name, tensor in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        check_tensor(_NAME, name, tensor)
    if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():
        fail(_NAME, f"{'cos' if cos.requires_grad else 'sin'} requires grad, needs detaching: it gets no gradient")
    return q, k, cos, sin


_rope = Op(
    _NAME,
    "(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor q_out, Tensor k_out)",
    check=_check,
    fake=_fake,
    reference=_reference,
    backends=_backends(backward=False),
    prepare=_prepare,
    setup_context=_setup_context,
    backward=_backward,
)


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their positions.

    y[..., :r] = x * cos + rotate_half(x) * sin,  rotate_half((x1, x2)) = (-x2, x1), halves of the first r = rotary_dim
    features; the other features pass through.

    The heads are dimension 1 and the features the last one, and the other dimensions are those of cos and sin: 4-D q
    and k go with cos and sin of 3 dimensions (Hugging Face's), 3-D ones, packed, with 2. Where the tokens are
    dimension 1, pass `x.transpose(1, 2)`: strides cost nothing. Products are float32 (float64 for float64), rounded
    once.

    Args:
        q: [batch, heads, tokens, head_dim] or [tokens, heads, head_dim], float32, float16, bfloat16 (float64 on the
            reference backend); any strides.
        k: the same, of q's dtype; its number of heads may be another.
        cos: [batch or 1, tokens, rotary_dim] or [tokens, rotary_dim] of any float dtype, rotary_dim even and at most
            head_dim. The two halves of a row may differ.
        sin: of cos's shape and dtype. Neither gets a gradient.

    Returns:
        The rotated q and k: new tensors of their shapes and dtypes, with the dimensions in the same order in memory.

    Raises:
        InvalidInput: shapes, dtypes or devices that do not fit, or cos or sin that require grad; the message names the
            argument.

    Example:
        >>> angles = torch.outer(torch.arange(16.0), 10000 ** -torch.linspace(0, 1, 32)).repeat(1, 2)[None]
        >>> q, k = torch.randn(2, 4, 16, 64), torch.randn(2, 2, 16, 64)
        >>> q, k = pf.ops.rope(q, k, angles.cos(), angles.sin())

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; partial rotation: GPT-NeoX.
    """
    return _rope(*_prepare(q, k, cos, sin))
