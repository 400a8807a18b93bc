"""Op `varlen_attn`: attention over documents of any lengths packed into one row, causal, windowed, grouped heads."""

from __future__ import annotations

import math

import torch

from pyfinetune._native import capsule, native, threads
from pyfinetune.ops import _varlen_attn_reference as reference
from pyfinetune.ops._checks import ALL_FLOATS, check_same_device, check_tensor, cpu_why_not, fail
from pyfinetune.ops._op import Backend, Op
from pyfinetune.ops._triton import configuration, kernels, on_device_of, triton_why_not

_NAME = "varlen_attn"
_INPUTS = "Tensor q, Tensor k, Tensor v"
_CU_SEQLENS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k"
_OPTIONS = "bool causal, float softmax_scale, int window_left, int window_right, float softcap"
_ARGS = 10
MOST_ROWS = 1 << 30  # the Triton kernels count a document's rows in int32, and add a window's to them
HUGE_PAGES_FROM = 4 << 20  # bytes; the first touch of huge pages costs a fraction of small pages'


def _check(q, k, v, cu_seqlens_q, cu_seqlens_k, _causal, softmax_scale, window_left, window_right, softcap):
    check_tensor(_NAME, "q", q, ALL_FLOATS)
    for name, value in (("k", k), ("v", v)):
        check_tensor(_NAME, name, value, (q.dtype,))
    for name, value, shape in (
        ("q", q, "[total_q, num_heads, head_dim]"),
        ("k", k, "[total_k, num_kv_heads, head_dim]"),
        ("v", v, "[total_k, num_kv_heads, head_dim_v]"),
    ):
        if value.dim() != 3:
            fail(_NAME, f"{name} is {list(value.shape)}, needs {shape}")
        if value.shape[1] == 0 or value.shape[2] == 0:
            fail(_NAME, f"{name} is {list(value.shape)}, needs at least one head and one element in each")
    if k.shape[2] != q.shape[2]:
        fail(_NAME, f"k is {list(k.shape)}, needs q's head_dim {q.shape[2]}")
    if q.shape[1] % k.shape[1]:
        fail(_NAME, f"k has {k.shape[1]} heads, needs a divisor of q's {q.shape[1]}")
    if tuple(v.shape[:2]) != tuple(k.shape[:2]):
        fail(_NAME, f"v is {list(v.shape)}, needs {list(k.shape[:2])} as k has in front")
    for name, value in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(_NAME, name, value, (torch.int32,))
        if value.dim() != 1 or value.shape[0] == 0:
            fail(_NAME, f"{name} is {list(value.shape)}, needs [documents + 1]")
    if cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
        found = f"{cu_seqlens_k.shape[0] - 1} documents and cu_seqlens_q {cu_seqlens_q.shape[0] - 1}"
        fail(_NAME, f"cu_seqlens_k has {found}, needs as many")
    if not math.isfinite(softmax_scale):
        fail(_NAME, f"softmax_scale is {softmax_scale}, needs a finite number")
    if not (math.isfinite(softcap) and softcap >= 0.0):
        fail(_NAME, f"softcap is {softcap}, needs a positive number, or 0 for none")
    if window_left < -1 or window_right < -1:
        fail(_NAME, f"window_size is {(window_left, window_right)}, needs keys to the left and right, or -1 for all")
    check_same_device(_NAME, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)


def _check_bwd(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *rest):
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, *rest[:5])
    rows, num_heads = q.shape[:2]
    for name, value, dtype, shape in (
        ("dout", dout, q.dtype, (rows, num_heads, v.shape[2])),
        ("out", out, q.dtype, (rows, num_heads, v.shape[2])),
        ("lse", lse, reference.stat_dtype(q.dtype), (num_heads, rows)),
    ):
        check_tensor(_NAME, name, value, (dtype,))
        if tuple(value.shape) != shape:
            fail(_NAME, f"{name} is {list(value.shape)}, needs {list(shape)}")
    check_same_device(_NAME, q=q, dout=dout, out=out, lse=lse)


def _fake(q, _k, v, *_rest):
    total_q, num_heads, _head_dim = q.shape
    out = q.new_empty((total_q, num_heads, v.shape[2]))
    return out, q.new_empty((num_heads, total_q), dtype=reference.stat_dtype(q.dtype))


def _fake_bwd(_dout, q, k, v, *rest):
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip((q, k, v), rest[-3:], strict=True))


def _head_dim_why_not(q, v) -> str | None:
    for name, size in (("head_dim", q.shape[2]), ("v's head_dim", v.shape[2])):
        if size % 8 or not 16 <= size <= 256:
            return f"{name} is {size}, the kernel needs a multiple of 8 from 16 to 256"
    return None


def _cpu_why_not(q, _k, v, *_rest):
    return _head_dim_why_not(q, v) or cpu_why_not(q, v)


def _triton_why_not(q, k, v, *_rest):
    for name, rows in (("q", q.shape[0]), ("k", k.shape[0])):
        if rows >= MOST_ROWS:
            return f"{name} has {rows} rows, the kernel needs fewer than {MOST_ROWS}"
    return _head_dim_why_not(q, v) or triton_why_not(q, k, v)


def _rowwise(x: torch.Tensor) -> torch.Tensor:
    """x with neighbours in its last dimension, which is the only stride that the kernel is particular about."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _on_huge_pages(x: torch.Tensor) -> torch.Tensor:
    if x.numel() * x.element_size() >= HUGE_PAGES_FROM:
        native.advise_huge_pages(capsule(x))
    return x


def _cpu_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *options):
    out, lse = _fake(q, k, v)
    inputs = [capsule(_rowwise(x)) for x in (q, k, v)]
    cu_seqlens = [capsule(x.contiguous()) for x in (cu_seqlens_q, cu_seqlens_k)]
    native.varlen_attn(*inputs, *cu_seqlens, capsule(_on_huge_pages(out)), capsule(lse), *options, threads())
    return out, lse


def _cpu_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *rest):
    options, needs = rest[:5], rest[5:]
    grads = _fake_bwd(dout, q, k, v, *needs)
    inputs = [capsule(_rowwise(x)) for x in (dout, q, k, v)]
    saved = [capsule(x.contiguous()) for x in (out, lse, cu_seqlens_q, cu_seqlens_k)]
    wanted = [capsule(_on_huge_pages(x)) if need else None for x, need in zip(grads, needs, strict=True)]
    native.varlen_attn_bwd(*inputs, *saved, *wanted, *options, threads())
    return grads


def _triton_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *options):
    out, lse = _fake(q, k, v)
    inputs = [*map(_rowwise, (q, k, v)), cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()]
    with on_device_of(q):
        kernels(_NAME).varlen_attn(*inputs, out, lse, *options)
    return out, lse


def _triton_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *rest):
    options, needs = rest[:5], rest[5:]
    grads = _fake_bwd(dout, q, k, v, *needs)
    inputs = [*map(_rowwise, (dout, q, k, v)), *(x.contiguous() for x in (out, lse, cu_seqlens_q, cu_seqlens_k))]
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    with on_device_of(q):
        kernels(_NAME).varlen_attn_bwd(*inputs, *wanted, *options)
    return grads


def _configuration(capability, q, k, v, _cu_seqlens_q, _cu_seqlens_k, *options):
    return configuration(q, capability, lambda on: kernels(_NAME).describe(on, q, k, v, *options))


_bwd = Op(
    "varlen_attn_bwd",
    f"(Tensor dout, {_INPUTS}, Tensor out, Tensor lse, {_CU_SEQLENS}, {_OPTIONS}, "
    "bool need_dq, bool need_dk, bool need_dv) -> (Tensor dq, Tensor dk, Tensor dv)",
    check=_check_bwd,
    fake=_fake_bwd,
    reference=reference.backward,
    backends=[
        Backend("triton", _triton_backward, lambda dout, *args: _triton_why_not(*args)),
        Backend("cpu", _cpu_backward, lambda dout, *args: _cpu_why_not(*args)),
    ],
)


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, *options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
    ctx.options = options


def _backward(ctx, dout, _dlse):
    if dout is None:
        return (None,) * _ARGS
    needs = ctx.needs_input_grad[:3]
    grads = _bwd(dout, *ctx.saved_tensors, *ctx.options, *needs)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * (_ARGS - 3))


def _is_count(value) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    return_lse: bool = False,
) -> tuple:
    inputs = []
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_tensor(_NAME, name, value, ALL_FLOATS)
        if torch.is_autocast_enabled(value.device.type) and value.dtype != torch.float64:
            value = value.to(torch.get_autocast_dtype(value.device.type))
        inputs.append(value)
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if value is not None and (not _is_count(value) or value < 0):
            fail(_NAME, f"{name} is {value!r}, needs the length of the longest document, or None")
    if not isinstance(window_size, tuple | list) or len(window_size) != 2 or not all(map(_is_count, window_size)):
        fail(_NAME, f"window_size is {window_size!r}, needs (left, right) in keys")
    if q.dim() != 3 or q.shape[2] == 0:
        fail(_NAME, f"q is {list(q.shape)}, needs [total_q, num_heads, head_dim]")
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    return (*inputs, cu_seqlens_q, cu_seqlens_k, bool(causal), scale, *window_size, float(softcap))


_varlen_attn = Op(
    _NAME,
    f"({_INPUTS}, {_CU_SEQLENS}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    check=_check,
    fake=_fake,
    reference=reference.forward,
    backends=[
        Backend("triton", _triton_forward, _triton_why_not, _configuration),
        Backend("cpu", _cpu_forward, _cpu_why_not),
    ],
    prepare=_prepare,
    setup_context=_setup_context,
    backward=_backward,
)


def varlen_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention within each document of a packed row, without a mask and without padding.

    out_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j  over the keys j of i's own document that i sees

    Query i of a document with lq queries and lk keys stands at key p = i + lk - lq, so that the last query meets the
    last key. `causal` lets it see keys up to p, a window those from p - left to p + right. Several heads of q may
    share one of k and v, which are not repeated. A query that sees no key gets zeros, and so do rows past the last
    document. Same bits whatever the number of threads.

    Args:
        q: [total_q, num_heads, head_dim], float32, float16, bfloat16 (float64 on the reference backend); any strides.
        k: [total_k, num_kv_heads, head_dim] in q's dtype; num_kv_heads divides num_heads.
        v: [total_k, num_kv_heads, head_dim_v] in q's dtype.
        cu_seqlens_q: int32 [documents + 1]: where each document begins in q, and where the last one ends.
        cu_seqlens_k: the same for k and v; None where it is the same.
        max_seqlen_q: the longest document's queries, a hint that callers of other libraries pass; not needed.
        max_seqlen_k: the same for its keys.
        causal: whether a query sees only keys up to its own place.
        softmax_scale: multiplies the scores; head_dim ** -0.5 when None.
        window_size: how many keys to the left and right of its own place a query sees; -1 for no limit.
        softcap: scores s become softcap * tanh(s / softcap); 0 for none.
        return_lse: return the log-sum-exp of the scores too.

    Returns:
        [total_q, num_heads, head_dim_v] in q's dtype (autocast's, where that is on); with `return_lse` also float32
        [num_heads, total_q], natural logarithm, -inf where a query sees no key, without a gradient.

    Raises:
        InvalidInput: an argument of the wrong shape, dtype, device or value; the message names it.

    Example:
        >>> q, kv = torch.randn(10, 6, 64), torch.randn(10, 2, 64)
        >>> cu_seqlens = torch.tensor([0, 3, 10], dtype=torch.int32)  # two documents, of 3 and 7 tokens
        >>> out = pf.ops.varlen_attn(q, kv, kv, cu_seqlens)

    Source: FlashAttention-2, https://arxiv.org/abs/2307.08691.
    """
    options = {"causal": causal, "softmax_scale": softmax_scale, "window_size": window_size, "softcap": softcap}
    out, lse = _varlen_attn(*_prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options))
    return (out, lse) if return_lse else out
