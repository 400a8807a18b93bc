"""Op `lora_linear`: a frozen or trainable base weight, dense or in 4 bits, with a low-rank update; DoRA included."""

from __future__ import annotations

import torch

from pyfinetune.ops import _lora_linear_cpu as cpu
from pyfinetune.ops import _lora_linear_cuda as cuda
from pyfinetune.ops import _lora_linear_triton as gpu
from pyfinetune.ops._checks import ALL_FLOATS, FLOATS, check_same_device, check_tensor, cpu_why_not, fail
from pyfinetune.ops._op import Backend, Op
from pyfinetune.ops._philox import dropout
from pyfinetune.ops._triton import triton_why_not
from pyfinetune.ops.nf4 import Packed4bit, check_packed, dequantize_reference

_NAME = "lora_linear"

# The base weight as a schema sees it: dense (absmax and the rest None, sizes 0) or packed.
_BASE = (
    "Tensor weight, Tensor? absmax, Tensor? quant_map, Tensor? nested_absmax, Tensor? nested_quant_map, "
    "Tensor? nested_offset, int block_size, int nested_block_size, SymInt out_features"
)
_BASE_ARGS = cpu.BASE_ARGS
_ADAPTER = "Tensor? lora_a, Tensor? lora_b, float scaling, float dropout_p, Tensor? seed, Tensor? magnitude"


def check(x, *args):
    base, (lora_a, lora_b, _scaling, dropout_p, seed, magnitude, bias) = args[:_BASE_ARGS], args[_BASE_ARGS:]
    weight, absmax, quant_map, *nested, block_size, nested_block_size, out_features = base
    check_tensor(_NAME, "x", x, ALL_FLOATS)
    if x.dim() != 2:
        fail(_NAME, f"x has {x.dim()} dimensions, needs 2")
    in_features = x.shape[1]
    if absmax is None:
        check_tensor(_NAME, "weight", weight, (x.dtype,))
        _check_shape("weight", weight, (out_features, in_features))
    else:
        numel = out_features * in_features
        check_packed(_NAME, weight, absmax, quant_map, nested, block_size, nested_block_size, numel)
    for name, value in (("bias", bias), ("magnitude", magnitude)):
        if value is not None:
            check_tensor(_NAME, name, value, ALL_FLOATS)
            _check_shape(name, value, (out_features,))
    if not 0.0 <= dropout_p < 1.0:
        fail(_NAME, f"dropout_p is {dropout_p}, needs 0 <= p < 1")
    if (lora_a is None) != (lora_b is None):
        fail(_NAME, "lora_a and lora_b go together, and one is None")
    if lora_a is not None:
        check_tensor(_NAME, "lora_a", lora_a, ALL_FLOATS)
        check_tensor(_NAME, "lora_b", lora_b, ALL_FLOATS)
        if lora_a.dim() != 2 or lora_a.shape[1] != in_features:
            fail(_NAME, f"lora_a is {list(lora_a.shape)}, needs [r, {in_features}]")
        _check_shape("lora_b", lora_b, (out_features, lora_a.shape[0]))
        if dropout_p > 0.0 and seed is None:
            fail(_NAME, "dropout_p > 0 needs a seed")
    elif magnitude is not None:
        fail(_NAME, "magnitude needs lora_a and lora_b")
    check_same_device(_NAME, x=x, weight=weight, lora_a=lora_a, lora_b=lora_b, bias=bias, magnitude=magnitude)


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple) -> None:
    if tuple(tensor.shape) != shape:
        fail(_NAME, f"{name} is {list(tensor.shape)}, needs {list(shape)}")


def check_bwd(dout, x, *args):
    base, rest = args[:_BASE_ARGS], args[_BASE_ARGS:]
    check(x, *base, *rest[:6], None)
    check_tensor(_NAME, "dout", dout, (x.dtype,))
    _check_shape("dout", dout, (x.shape[0], base[-1]))


def _stat_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def fake(x, *args):
    out_features = args[_BASE_ARGS - 1]
    lora_a, _lora_b, _scaling, _p, _seed, magnitude, _bias = args[_BASE_ARGS:]
    rows = x.shape[0]
    y = x.new_empty((rows, out_features))
    s = x.new_empty((rows, lora_a.shape[0]) if lora_a is not None else (0,))
    z = x.new_empty((rows, out_features) if magnitude is not None else (0,))
    norm = x.new_empty((out_features,) if magnitude is not None else (0,), dtype=_stat_dtype(x.dtype))
    return y, s, z, norm


def fake_bwd(dout, x, *args):
    weight, out_features = args[0], args[_BASE_ARGS - 1]
    lora_a, lora_b, _scaling, _p, _seed, magnitude, _s, _z, _norm, *needs = args[_BASE_ARGS:]
    shapes = (
        (x.shape, x.dtype),
        ((out_features, x.shape[1]), weight.dtype if weight.dtype != torch.uint8 else x.dtype),
        (lora_a.shape, lora_a.dtype) if lora_a is not None else ((0,), x.dtype),
        (lora_b.shape, lora_b.dtype) if lora_b is not None else ((0,), x.dtype),
        ((out_features,), x.dtype),
        ((out_features,), magnitude.dtype if magnitude is not None else x.dtype),
    )
    return tuple(
        x.new_empty(shape if need else (0,), dtype=dtype) for (shape, dtype), need in zip(shapes, needs, strict=True)
    )


def _dense(x, base):
    """The base weight [out, in] in x's dtype."""
    weight, absmax, *_rest, out_features = base
    if absmax is None:
        return weight
    # Decoded values are defined by a rounding to the compute dtype; float64 takes the float32 ones.
    dtype = x.dtype if x.dtype in FLOATS else torch.float32
    return dequantize_reference(*base[:-1], (out_features, x.shape[1]), dtype).to(x.dtype)


def reference(x, *args):
    base, (lora_a, lora_b, scaling, dropout_p, seed, magnitude, bias) = args[:_BASE_ARGS], args[_BASE_ARGS:]
    weight = _dense(x, base)
    y = x @ weight.T
    empty = x.new_empty(0)
    s, z, norm = empty, empty.clone(), x.new_empty(0, dtype=_stat_dtype(x.dtype))
    if lora_a is not None:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        dropped = dropout(x, dropout_p, seed) if dropout_p else x
        s = dropped @ a.T
        update = scaling * (s @ b.T)
        if magnitude is None:
            y = y + update
        else:
            stat = norm.dtype
            norm = (weight.to(stat) + scaling * (b.to(stat) @ a.to(stat))).norm(dim=1)
            inner = dropped @ weight.T if dropout_p else y
            z = inner + update
            y = (y - inner) + (magnitude.to(stat) / norm).to(x.dtype) * z
    if bias is not None:
        y = y + bias.to(x.dtype)
    return y, s, z, norm


def reference_bwd(dout, x, *args):
    base = args[:_BASE_ARGS]
    lora_a, lora_b, scaling, dropout_p, seed, magnitude, s, z, norm, *needs = args[_BASE_ARGS:]
    need_dx, need_dweight, need_da, need_db, need_dbias, need_dmagnitude = needs
    grads = list(fake_bwd(dout, x, *args))
    g = dout if magnitude is None else dout * (magnitude.to(norm.dtype) / norm).to(dout.dtype)
    dropped = dropout(x, dropout_p, seed) if dropout_p and lora_a is not None else x
    split = magnitude is not None and dropout_p > 0  # DoRA recomputes its base term on the dropped input
    if lora_a is not None:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        t = scaling * (g @ b)
        if need_da:
            grads[2] = (t.T @ dropped).to(lora_a.dtype)
        if need_db:
            grads[3] = (scaling * (g.T @ s)).to(lora_b.dtype)
    if need_dx:
        weight = _dense(x, base)
        through = dout if split else g
        dx = through @ weight
        if lora_a is not None:
            inner = t @ a + ((g - dout) @ weight if split else 0)
            dx = dx + (dropout(inner, dropout_p, seed) if dropout_p else inner)
        grads[0] = dx
    if need_dweight:
        grads[1] = dout.T @ x + (g - dout).T @ dropped if split else g.T @ x
    if need_dbias:
        grads[4] = dout.sum(dim=0, dtype=_stat_dtype(x.dtype)).to(x.dtype)
    if need_dmagnitude:
        grads[5] = ((dout.to(norm.dtype) * z).sum(dim=0) / norm).to(magnitude.dtype)
    return tuple(grads)


def _of_forward(reason):
    """A reason that the backward's arguments have in common with the forward's."""
    return lambda dout, *args: reason(*args)


_bwd = Op(
    "lora_linear_bwd",
    f"(Tensor dout, Tensor x, {_BASE}, {_ADAPTER}, Tensor s, Tensor z, Tensor norm, bool need_dx, bool need_dweight, "
    "bool need_da, bool need_db, bool need_dbias, bool need_dmagnitude) "
    "-> (Tensor dx, Tensor dweight, Tensor d_lora_a, Tensor d_lora_b, Tensor dbias, Tensor dmagnitude)",
    check=check_bwd,
    fake=fake_bwd,
    reference=reference_bwd,
    backends=[
        Backend("cuda", cuda.backward, _of_forward(cuda.why_not), yields=_of_forward(cuda.yields)),
        Backend("triton", gpu.backward, lambda dout, x, weight, *rest: triton_why_not(dout, x, weight)),
        Backend("cpu", cpu.backward, lambda dout, x, weight, *rest: cpu_why_not(dout, x, weight)),
    ],
)


def _setup_context(ctx, inputs, output):
    x, rest = inputs[0], inputs[1:]
    *base, out_features = rest[:_BASE_ARGS]
    lora_a, lora_b, scaling, dropout_p, seed, magnitude, bias = rest[_BASE_ARGS:]
    _y, s, z, norm = output
    ctx.mark_non_differentiable(s, z, norm)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *base[:6], lora_a, lora_b, seed, magnitude, s, z, norm)
    ctx.sizes = (*base[6:], out_features)
    ctx.scaling, ctx.dropout_p, ctx.bias_dtype = scaling, dropout_p, None if bias is None else bias.dtype


def _backward(ctx, dout, *_unused):
    count = 1 + _BASE_ARGS + 7
    if dout is None:
        return (None,) * count
    x, *base, lora_a, lora_b, seed, magnitude, s, z, norm = ctx.saved_tensors
    wants = ctx.needs_input_grad
    need = {
        "x": wants[0],
        "weight": wants[1] and base[1] is None,
        "a": wants[1 + _BASE_ARGS],
        "b": wants[2 + _BASE_ARGS],
        "bias": wants[count - 1],
        "magnitude": wants[count - 2],
    }
    adapter = (lora_a, lora_b, ctx.scaling, ctx.dropout_p, seed, magnitude)
    dx, dweight, da, db, dbias, dmagnitude = _bwd(dout, x, *base, *ctx.sizes, *adapter, s, z, norm, *need.values())
    grads = [None] * count
    grads[0] = dx if need["x"] else None
    grads[1] = dweight if need["weight"] else None
    grads[1 + _BASE_ARGS] = da if need["a"] else None
    grads[2 + _BASE_ARGS] = db if need["b"] else None
    grads[count - 2] = dmagnitude if need["magnitude"] else None
    grads[count - 1] = dbias.to(ctx.bias_dtype) if need["bias"] else None
    return tuple(grads)


def prepare(
    x: torch.Tensor,
    weight_or_packed: torch.Tensor | Packed4bit,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | int | None = None,
    magnitude: torch.Tensor | None = None,
) -> tuple:
    check_tensor(_NAME, "x", x, ALL_FLOATS)
    if x.dim() == 0:
        fail(_NAME, "x has no dimensions, needs [..., in]")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if isinstance(weight_or_packed, Packed4bit):
        packed = weight_or_packed
        if len(packed.shape) != 2:
            fail(_NAME, f"the packed weight is {list(packed.shape)}, needs [out, in]")
        out_features, in_features = packed.shape
        base = (*packed.tensors(), packed.block_size, packed.nested_block_size, out_features)
    else:
        check_tensor(_NAME, "weight", weight_or_packed, ALL_FLOATS)
        if weight_or_packed.dim() != 2:
            fail(_NAME, f"weight is {list(weight_or_packed.shape)}, needs [out, in]")
        out_features, in_features = weight_or_packed.shape
        base = (weight_or_packed.to(x.dtype), None, None, None, None, None, 0, 0, out_features)
    if x.shape[-1] != in_features:
        fail(_NAME, f"x is {list(x.shape)}, needs [..., {in_features}]")
    if lora_a is None or dropout_p == 0.0:
        dropout_p, seed = (0.0 if lora_a is None else dropout_p), None
    elif not isinstance(seed, torch.Tensor):
        # On x's device, filled there: a copy from the host would wait for the GPU.
        options = {"dtype": torch.int64, "device": x.device}
        seed = torch.randint(2**63 - 1, (), **options) if seed is None else torch.full((), seed, **options)
    elif seed.dtype != torch.int64 or seed.dim() != 0:
        fail(_NAME, f"seed is {seed.dtype} {list(seed.shape)}, needs a 0-d int64 tensor")
    adapter = (lora_a, lora_b, float(scaling), float(dropout_p), seed, magnitude)
    # A view costs a node of the graph, forward and backward.
    return (x if x.dim() == 2 else x.reshape(-1, in_features), *base, *adapter, bias)


_lora_linear = Op(
    _NAME,
    f"(Tensor x, {_BASE}, {_ADAPTER}, Tensor? bias) -> (Tensor y, Tensor s, Tensor z, Tensor norm)",
    check=check,
    fake=fake,
    reference=reference,
    backends=[
        Backend("cuda", cuda.forward, cuda.why_not, yields=cuda.yields),
        Backend("triton", gpu.forward, lambda x, weight, *rest: triton_why_not(x, weight), gpu.configuration_of),
        Backend("cpu", cpu.forward, lambda x, weight, *rest: cpu_why_not(x, weight)),
    ],
    prepare=prepare,
    setup_context=_setup_context,
    backward=_backward,
)


def lora_linear(
    x: torch.Tensor,
    weight_or_packed: torch.Tensor | Packed4bit,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | int | None = None,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with a low-rank update, over a dense or a 4-bit weight.

    y = x W^T + scaling * dropout(x) A^T B^T + bias;  with `magnitude` m (DoRA) the first two terms are multiplied by
    m / ||W + scaling * B A||, norms by row and without a gradient, and the base term inside the product sees
    dropout(x) too, as in PEFT.

    x's dtype is the compute dtype (autocast's, where that is on). Adapters of another dtype are cast to it, as
    autocast does, and get gradients in their own. A 4-bit weight is decoded piece by piece: the whole never exists.

    Args:
        x: [..., in], float32, float16, bfloat16 (float64 on the reference backend).
        weight_or_packed: [out, in] tensor, or a `Packed4bit` of that shape, which gets no gradient.
        lora_a: [r, in], or None for the base alone.
        lora_b: [out, r], or None.
        scaling: alpha / r, or alpha / sqrt(r).
        bias: [out] or None.
        dropout_p: probability of dropping an element of x before the update; 0 <= p < 1.
        seed: what the mask is made from: an int, a 0-d int64 tensor, or None to draw one from torch's generator.
        magnitude: [out], DoRA's, or None.

    Returns:
        [..., out] in the compute dtype.

    Raises:
        InvalidInput: an argument of the wrong shape, dtype or device; the message names it.

    Example:
        >>> packed = pf.ops.quantize_4bit(torch.randn(64, 128))
        >>> a, b = torch.randn(8, 128), torch.zeros(64, 8)
        >>> y = pf.ops.lora_linear(torch.randn(4, 128), packed, a, b, 2.0)

    Source: LoRA, https://arxiv.org/abs/2106.09685; QLoRA, https://arxiv.org/abs/2305.14314; DoRA,
    https://arxiv.org/abs/2402.09353; the norm by the low-rank identity, see `_lora_linear_cpu`.
    """
    args = prepare(x, weight_or_packed, lora_a, lora_b, scaling, bias, dropout_p, seed, magnitude)
    y = _lora_linear(*args)[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])
