"""Op `lora_linear_group`: several `lora_linear` of one input, such as q, k, v or gate, up, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfinetune.errors import InvalidInput
from pyfinetune.ops import _lora_linear_cpu as cpu
from pyfinetune.ops import _lora_linear_triton as gpu
from pyfinetune.ops._checks import cpu_why_not, fail
from pyfinetune.ops._op import Backend, Op
from pyfinetune.ops._triton import configuration, on_device_of, triton_why_not
from pyfinetune.ops.lora_linear import check, check_bwd, fake, fake_bwd, prepare, reference, reference_bwd
from pyfinetune.ops.nf4 import Packed4bit

_NAME = "lora_linear_group"

# A schema has no lists with gaps that autograd would look into, so a list holds what is there, and `parts` says of
# each projection, in _PARTS numbers, what that is: its block sizes (0, 0: dense), how many tensors of a packed weight
# follow the codes, and whether it has an adapter, a seed, a magnitude and a bias.
_PARTS = 7
_ARGS = (
    "Tensor x, Tensor[] weights, Tensor[] states, int[] parts, SymInt[] out_features, Tensor[] lora_as, "
    "Tensor[] lora_bs, float[] scalings, float[] dropout_ps, Tensor[] seeds, Tensor[] magnitudes, Tensor[] biases"
)
_COUNT = 12  # arguments of the schema


def _projections(args: Sequence) -> list[tuple]:
    """Of each projection the arguments that `lora_linear` takes behind x."""
    weights, states, parts, out_features, lora_as, lora_bs, scalings, dropout_ps, seeds, magnitudes, biases = args[1:]
    count = len(weights)
    if not count:
        fail(_NAME, "there is no projection")
    if len(parts) != _PARTS * count or any(len(values) != count for values in (out_features, scalings, dropout_ps)):
        fail(_NAME, "the lists do not describe the same number of projections")
    rest = [iter(values) for values in (states, lora_as, lora_bs, seeds, magnitudes, biases)]
    state, a, b, seed, magnitude, bias = rest
    found = []
    try:
        for i, weight in enumerate(weights):
            block, nested_block, fields, has_adapter, has_seed, has_magnitude, has_bias = parts[
                _PARTS * i : _PARTS * (i + 1)
            ]
            packed = [next(state) for _ in range(fields)] + [None] * (5 - fields)
            adapter = (next(a), next(b)) if has_adapter else (None, None)
            found.append(
                (
                    *(weight, *packed, block, nested_block, out_features[i]),
                    *(*adapter, scalings[i], dropout_ps[i], next(seed) if has_seed else None),
                    *(next(magnitude) if has_magnitude else None, next(bias) if has_bias else None),
                )
            )
    except StopIteration:
        fail(_NAME, "a list has fewer tensors than the projections need")
    if any(next(values, None) is not None for values in rest):
        fail(_NAME, "a list has more tensors than the projections need")
    return found


def _named(i: int, function, *args):
    """function(*args), whose error says which projection it is about."""
    try:
        return function(*args)
    except InvalidInput as error:
        fail(_NAME, f"projection {i}: {str(error).removeprefix('lora_linear: ')}")


def _check(*args):
    for i, projection in enumerate(_projections(args)):
        _named(i, check, args[0], *projection)


def _check_bwd(douts, *args):
    projections = _projections(args[:_COUNT])
    if len(douts) != len(projections):
        fail(_NAME, f"douts has {len(douts)} tensors, needs {len(projections)}")
    for i, (dout, projection) in enumerate(zip(douts, projections, strict=True)):
        _named(i, check_bwd, dout, args[0], *projection[:-1])


def _rank(projection: tuple) -> int:
    return 0 if projection[cpu.BASE_ARGS] is None else projection[cpu.BASE_ARGS].shape[0]


def _columns(projections: Sequence[tuple]) -> list[slice]:
    """Each projection's columns in S."""
    return cpu.columns_of([(_rank(p), p[cpu.BASE_ARGS + 3]) for p in projections])


def _fake(*args):
    x, projections = args[0], _projections(args)
    results = [fake(x, *projection) for projection in projections]
    s = x.new_empty((x.shape[0], sum(_rank(p) for p in projections)))
    return [r[0] for r in results], s, [r[2] for r in results], [r[3] for r in results]


def _reference(*args):
    x, projections = args[0], _projections(args)
    results = [reference(x, *projection) for projection in projections]
    s = x.new_empty((x.shape[0], sum(_rank(p) for p in projections)))
    for span, projection, result in zip(_columns(projections), projections, results, strict=True):
        if _rank(projection):
            s[:, span] = result[1]
    return [r[0] for r in results], s, [r[2] for r in results], [r[3] for r in results]


def _needs_of(needs: Sequence[bool]) -> tuple[bool, list[cpu.Needs]]:
    return needs[0], [cpu.Needs(*needs[i : i + 5]) for i in range(1, len(needs), 5)]


def _single_args(projection: tuple, s, z, norm, need_dx: bool, need: cpu.Needs) -> tuple:
    """What `lora_linear_bwd` takes behind dout and x."""
    flags = (need_dx, need.weight, need.lora_a, need.lora_b, need.bias, need.magnitude)
    return (*projection[:-1], s, z, norm, *flags)


def _collect(x, projections: Sequence[tuple], dx, grads: Sequence[Sequence]) -> tuple:
    """The results of the backward op: dx, then a list of each kind of gradient; empty where none is wanted."""
    none = x.new_empty(0)
    columns = [[none if grad is None else grad for grad in kind] for kind in zip(*grads, strict=True)]
    result = [none if dx is None else dx]
    for kind, place in zip(columns, (0, cpu.BASE_ARGS, cpu.BASE_ARGS + 1, -2, -1), strict=True):
        present = [(grad, p[place]) for grad, p in zip(kind, projections, strict=True) if p[place] is not None]
        # Results may not share memory, the empty ones neither.
        result.append([grad if grad.numel() else x.new_empty(grad.shape, dtype=grad.dtype) for grad, _ in present])
    return tuple(result)


def _backward_by_one(one, douts, *args):
    """The backward pass as a sum of single ones; `one` is their function."""
    x, projections, (s, zs, norms, needs) = args[0], _projections(args[:_COUNT]), args[_COUNT:]
    need_dx, each = _needs_of(needs)
    dx, grads = None, []
    for i, (dout, span) in enumerate(zip(douts, _columns(projections), strict=True)):
        result = one(dout, x, *_single_args(projections[i], s[:, span], zs[i], norms[i], need_dx, each[i]))
        part, dweight, da, db, dbias, dmagnitude = result
        if need_dx:
            dx = part if dx is None else dx + part
        wanted = zip((dweight, da, db, dmagnitude, dbias), each[i], strict=True)
        grads.append([grad if need else None for grad, need in wanted])
    return _collect(x, projections, dx, grads)


def _fake_bwd(douts, *args):
    return _backward_by_one(fake_bwd, douts, *args)


def _reference_bwd(douts, *args):
    return _backward_by_one(reference_bwd, douts, *args)


def _cpu_projections(x, projections: Sequence[tuple]) -> list[cpu.Projection]:
    return [cpu.Projection(cpu.Base(x, p), *p[cpu.BASE_ARGS : cpu.BASE_ARGS + 6]) for p in projections]


def _cpu_forward(*args):
    x, projections = args[0], _projections(args)
    return cpu.group_forward(x, _cpu_projections(x, projections), [p[-1] for p in projections])


def _cpu_backward(douts, *args):
    x, projections, (s, zs, norms, needs) = args[0], _projections(args[:_COUNT]), args[_COUNT:]
    group = cpu.Backward(x, _cpu_projections(x, projections), s, zs, norms, *_needs_of(needs))
    dx, grads = group.run(douts)
    return _collect(x, projections, dx, grads)


def _triton_forward(*args):
    x, projections = args[0], _projections(args)
    with on_device_of(x):
        return gpu.Forward(x, gpu.projections_of(x, projections)).run([p[-1] for p in projections])


def _triton_backward(douts, *args):
    x, projections, (s, zs, norms, needs) = args[0], _projections(args[:_COUNT]), args[_COUNT:]
    with on_device_of(x):
        group = gpu.Backward(x, gpu.projections_of(x, projections), s, zs, norms, *_needs_of(needs))
        dx, grads = group.run(douts)
    return _collect(x, projections, dx, grads)


def _configuration(capability, *args):
    x, projections = args[0], gpu.projections_of(args[0], _projections(args))
    return configuration(x, capability, lambda on: gpu.describe(on, x, projections))


def _backends(triton, cpu_, tensors, described=None) -> list[Backend]:
    """The two backends of an op; `tensors` picks what their kernels read of its arguments."""
    return [
        Backend("triton", triton, lambda *args: triton_why_not(*tensors(*args)), described),
        Backend("cpu", cpu_, lambda *args: cpu_why_not(*tensors(*args))),
    ]


_bwd = Op(
    f"{_NAME}_bwd",
    f"(Tensor[] douts, {_ARGS}, Tensor s, Tensor[] zs, Tensor[] norms, bool[] needs) "
    "-> (Tensor dx, Tensor[] dweights, Tensor[] d_lora_as, Tensor[] d_lora_bs, Tensor[] dmagnitudes, Tensor[] dbiases)",
    check=_check_bwd,
    fake=_fake_bwd,
    reference=_reference_bwd,
    backends=_backends(_triton_backward, _cpu_backward, lambda douts, x, weights, *rest: (x, *douts, *weights)),
)


def _setup_context(ctx, inputs, output):
    _ys, s, zs, norms = output
    ctx.mark_non_differentiable(s, *zs, *norms)
    ctx.set_materialize_grads(False)
    lists = [value for value in inputs[1:] if not value or isinstance(value[0], torch.Tensor)]
    ctx.save_for_backward(inputs[0], s, *zs, *norms, *(tensor for value in lists for tensor in value))
    # What is no tensor, and how many tensors stand where there are some.
    ctx.plan = [len(value) if any(value is other for other in lists) else list(value) for value in inputs[1:]]


def _saved(ctx) -> tuple[list, tuple]:
    """The arguments, and s, zs, norms."""
    x, s, *rest = ctx.saved_tensors
    count = ctx.plan[0]
    zs, norms, rest = rest[:count], rest[count : 2 * count], iter(rest[2 * count :])
    args = [[next(rest) for _ in range(item)] if isinstance(item, int) else item for item in ctx.plan]
    return [x, *args], (s, zs, norms)


def _backward(ctx, dys, *_unused):
    args, (s, zs, norms) = _saved(ctx)
    x, weights, states, parts, out_features, lora_as, lora_bs, _scalings, _ps, seeds, magnitudes, biases = args
    wants_x, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[1:]
    none = [None] * _COUNT
    for i, value in ((1, weights), (2, states), (5, lora_as), (6, lora_bs), (9, seeds), (10, magnitudes), (11, biases)):
        none[i] = [None] * len(value)
    if all(dy is None for dy in dys):
        return tuple(none)
    douts = [x.new_zeros((x.shape[0], n)) if dy is None else dy for dy, n in zip(dys, out_features, strict=True)]
    flags = [iter(wants[place]) for place in (4, 5, 9, 10)]
    needs = [wants_x]
    for i in range(len(weights)):
        _block, _nested, fields, has_adapter, _seed, has_magnitude, has_bias = parts[_PARTS * i : _PARTS * (i + 1)]
        present = (has_adapter, has_adapter, has_magnitude, has_bias)
        needs.append(wants[0][i] and not fields)
        needs.extend(bool(has) and next(flag) for has, flag in zip(present, flags, strict=True))
    dx, *grads = _bwd(douts, *args, s, zs, norms, needs)
    result = none
    result[0] = dx if wants_x else None
    for place, kind in zip((1, 5, 6, 10, 11), grads, strict=True):
        wanted = [needs[1 + 5 * i] for i in range(len(weights))] if place == 1 else wants[place - 1]
        result[place] = [grad if want else None for grad, want in zip(kind, wanted, strict=True)]
    result[11] = [None if g is None else g.to(bias.dtype) for g, bias in zip(result[11], biases, strict=True)]
    return tuple(result)


def _prepare(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor | Packed4bit],
    lora_as: Sequence[torch.Tensor | None],
    lora_bs: Sequence[torch.Tensor | None],
    scalings: Sequence[float],
    biases: Sequence[torch.Tensor | None] | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    seeds: Sequence[torch.Tensor | int | None] | None = None,
    magnitudes: Sequence[torch.Tensor | None] | None = None,
) -> tuple:
    count = len(weights)
    given = {
        "lora_as": lora_as,
        "lora_bs": lora_bs,
        "scalings": scalings,
        "biases": [None] * count if biases is None else biases,
        "dropout_p": dropout_p if isinstance(dropout_p, Sequence) else [dropout_p] * count,
        "seeds": [None] * count if seeds is None else seeds,
        "magnitudes": [None] * count if magnitudes is None else magnitudes,
    }
    for name, values in given.items():
        if len(values) != count:
            fail(_NAME, f"{name} has {len(values)} elements, needs {count}")
    lists = ([], [], [], [], [], [], [], [], [], [], [])
    weights_, states, parts, out_features, as_, bs, scalings_, ps, seeds_, magnitudes_, biases_ = lists
    for i, values in enumerate(zip(weights, *given.values(), strict=True)):
        x, weight, *packed, block, nested_block, out, a, b, scaling, p, seed, magnitude, bias = _named(
            i, prepare, x, *values
        )
        present = [t for t in packed if t is not None]
        parts += [block, nested_block, len(present), *(t is not None for t in (a, seed, magnitude, bias))]
        if (a is None) != (b is None):
            fail(_NAME, f"projection {i}: lora_a and lora_b go together, and one is None")
        for value, into in ((weight, weights_), (out, out_features), (scaling, scalings_), (p, ps)):
            into.append(value)
        for value, into in ((a, as_), (b, bs), (seed, seeds_), (magnitude, magnitudes_), (bias, biases_)):
            if value is not None:
                into.append(value)
        states += present
    return (x, *lists)


_lora_linear_group = Op(
    _NAME,
    f"({_ARGS}) -> (Tensor[] ys, Tensor s, Tensor[] zs, Tensor[] norms)",
    check=_check,
    fake=_fake,
    reference=_reference,
    backends=_backends(_triton_forward, _cpu_forward, lambda x, weights, *rest: (x, *weights), _configuration),
    prepare=_prepare,
    setup_context=_setup_context,
    backward=_backward,
)


def lora_linear_group(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor | Packed4bit],
    lora_as: Sequence[torch.Tensor | None],
    lora_bs: Sequence[torch.Tensor | None],
    scalings: Sequence[float],
    biases: Sequence[torch.Tensor | None] | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    seeds: Sequence[torch.Tensor | int | None] | None = None,
    magnitudes: Sequence[torch.Tensor | None] | None = None,
) -> list[torch.Tensor]:
    """Several linear layers with low-rank updates over one input: q, k and v, or gate and up.

    ys[i] = lora_linear(x, weights[i], lora_as[i], lora_bs[i], scalings[i], ...), each as it would be alone.

    What depends on x alone is done once: the products of x with every A, their gradients, and dx, to which every
    layer adds in place. Layers may differ in width, rank and kind of weight, and any of them may have no adapter.

    Args:
        x: [..., in]; see `lora_linear`, also for the dtypes of everything below.
        weights: of each layer a [out_i, in] tensor or a `Packed4bit` of that shape.
        lora_as: of each layer [r_i, in], or None for the base alone.
        lora_bs: of each layer [out_i, r_i], or None.
        scalings: of each layer alpha / r, or alpha / sqrt(r).
        biases: of each layer [out_i] or None; None for no bias at all.
        dropout_p: probability of dropping an element of x before an update, one for all or one for each layer.
        seeds: what each layer's mask is made from, see `lora_linear`; None to draw one for each.
        magnitudes: of each layer [out_i], DoRA's, or None; None for no DoRA at all.

    Returns:
        A list of [..., out_i] in the compute dtype.

    Raises:
        InvalidInput: an argument of the wrong shape, dtype or device, or lists of different lengths; the message names
            the argument and the layer.

    Example:
        >>> x, wq, wk = torch.randn(4, 128), torch.randn(64, 128), torch.randn(32, 128)
        >>> a, b = torch.randn(8, 128), [torch.zeros(64, 8), torch.zeros(32, 8)]
        >>> q, k = pf.ops.lora_linear_group(x, [wq, wk], [a, a], b, [2.0, 2.0])

    Source: as `lora_linear`.
    """
    args = _prepare(x, weights, lora_as, lora_bs, scalings, biases, dropout_p, seeds, magnitudes)
    ys = _lora_linear_group(*args)[0]
    return ys if x.dim() == 2 else [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]
