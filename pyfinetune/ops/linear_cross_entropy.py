"""Op `linear_cross_entropy`: the head's product and the cross-entropy in one, without ever holding all logits."""

from __future__ import annotations

import math

import torch

from pyfinetune.ops import _linear_cross_entropy_cpu as cpu
from pyfinetune.ops import _linear_cross_entropy_triton as triton
from pyfinetune.ops._checks import ALL_FLOATS, check_same_device, check_tensor, cpu_why_not, fail
from pyfinetune.ops._op import Backend, Op
from pyfinetune.ops._triton import triton_why_not

_NAME = "linear_cross_entropy"
_REFERENCE_WORKSPACE = 64 << 20

# What the forward and the recomputing backward share.
_HEAD = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, int ignore_index, float softcap, int workspace_bytes"
)
_NEEDS = "bool need_dhidden, bool need_dweight, bool need_dbias"
_GRADS = "Tensor d_hidden, Tensor d_weight, Tensor d_bias"


def _check_head(hidden, weight, labels, bias, _ignore_index, softcap, workspace_bytes):
    check_tensor(_NAME, "hidden", hidden, ALL_FLOATS)
    if hidden.dim() != 2:
        fail(_NAME, f"hidden has {hidden.dim()} dimensions, needs 2")
    check_tensor(_NAME, "weight", weight, (hidden.dtype,))
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        fail(_NAME, f"weight is {list(weight.shape)}, needs [vocabulary, {hidden.shape[1]}]")
    check_tensor(_NAME, "labels", labels, (torch.int64,))
    if tuple(labels.shape) != (hidden.shape[0],):
        fail(_NAME, f"labels is {list(labels.shape)}, needs [{hidden.shape[0]}]")
    if bias is not None:
        check_tensor(_NAME, "bias", bias, ALL_FLOATS)
        if tuple(bias.shape) != (weight.shape[0],):
            fail(_NAME, f"bias is {list(bias.shape)}, needs [{weight.shape[0]}]")
    if not (math.isfinite(softcap) and softcap >= 0.0):
        fail(_NAME, f"softcap is {softcap}, needs a finite number that is not negative")
    if workspace_bytes < 0:
        fail(_NAME, f"workspace_bytes is {workspace_bytes}, needs at least 1")
    check_same_device(_NAME, hidden=hidden, weight=weight, labels=labels, bias=bias)


def _check(*args):
    _check_head(*args[:7])


def _check_bwd(dout, *args):
    _check_head(*args[:7])
    check_tensor(_NAME, "dout", dout, (_stat_dtype(args[0].dtype),))
    if dout.shape != args[2].shape:
        fail(_NAME, f"dout is {list(dout.shape)}, needs {list(args[2].shape)}")


def _check_scale(grad, scale, dtype):
    check_tensor(_NAME, "grad", grad, ALL_FLOATS)
    check_tensor(_NAME, "scale", scale, (_stat_dtype(grad.dtype),))
    if grad.dim() != 2 or scale.dim() != 1 or scale.shape[0] not in (1, grad.shape[0]):
        fail(_NAME, f"scale is {list(scale.shape)}, needs one number, or one for each row of {list(grad.shape)}")
    if dtype not in (grad.dtype, *ALL_FLOATS[:3]):
        fail(_NAME, f"a gradient of {grad.dtype} has no result in {dtype}")


def _stat_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake(hidden, weight, labels, bias, _ignore_index, _softcap, _workspace_bytes, per_token, *needs):
    stat = _stat_dtype(hidden.dtype)
    loss = hidden.new_empty(labels.shape if per_token else (), dtype=stat)
    shapes = ((hidden.shape, hidden.dtype), (weight.shape, stat), (weight.shape[:1], stat))
    return loss, *_empty_grads(hidden, shapes, needs)


def _fake_bwd(_dout, hidden, weight, labels, bias, _ignore_index, _softcap, _workspace_bytes, *needs):
    bias_dtype = hidden.dtype if bias is None else bias.dtype
    shapes = ((hidden.shape, hidden.dtype), (weight.shape, weight.dtype), (weight.shape[:1], bias_dtype))
    return _empty_grads(hidden, shapes, needs)


def _empty_grads(like, shapes, needs):
    return tuple(
        like.new_empty(shape if need else (0,), dtype=dtype) for (shape, dtype), need in zip(shapes, needs, strict=True)
    )


def label_error(row: int, label: int, vocab: int, ignore_index: int) -> str:
    """What is said of a label that names no entry of the vocabulary."""
    return f"the label of row {row} is {label}, needs 0 <= label < {vocab}, or ignore_index ({ignore_index})"


def _kept_rows(labels, ignore_index, vocab):
    """Indices of the rows to compute."""
    if labels.device.type != "cpu":
        # To count them, the host would have to wait for the GPU: there every row is computed, and ignored ones masked.
        return torch.arange(labels.shape[0], device=labels.device)
    rows = (labels != ignore_index).nonzero().squeeze(1)
    kept = labels[rows]
    wrong = ((kept < 0) | (kept >= vocab)).nonzero()
    if wrong.shape[0]:
        row = int(rows[wrong[0, 0]])
        fail(_NAME, label_error(row, int(labels[row]), vocab, ignore_index))
    return rows


def _pass(hidden, weight, labels, bias, ignore_index, softcap, workspace_bytes, scale, needs):
    """Per-token losses, and the gradients of their sum, each row weighted by `scale` [N] where that is given.

    d_weight and d_bias come in the dtype they are summed in.
    """
    stat, vocab = _stat_dtype(hidden.dtype), weight.shape[0]
    losses = hidden.new_zeros(labels.shape, dtype=stat)
    shapes = ((hidden.shape, hidden.dtype), (weight.shape, stat), (weight.shape[:1], stat))
    d_hidden, d_weight, d_bias = (grad.zero_() for grad in _empty_grads(hidden, shapes, needs))
    need_dhidden, need_dweight, need_dbias = needs
    rows = _kept_rows(labels, ignore_index, vocab)
    step = max(1, (workspace_bytes or _REFERENCE_WORKSPACE) // max(1, vocab * losses.element_size()))
    for part in rows.split(step) if rows.shape[0] else ():
        h, keep = hidden[part], labels[part] != ignore_index
        target = torch.where(keep, labels[part], 0)
        z = (h @ weight.T).to(stat)
        z = z if bias is None else z + bias.to(stat)
        capped = torch.tanh(z / softcap) if softcap else None
        z = z if capped is None else softcap * capped
        lse = torch.logsumexp(z, dim=1, keepdim=True)
        losses[part] = torch.where(keep, (lse - z.gather(1, target[:, None])).squeeze(1), 0)
        if not any(needs):
            continue
        g = (z - lse).exp_()
        g[torch.arange(part.shape[0], device=g.device), target] -= 1
        g = g if capped is None else g * (1 - capped * capped)
        g = torch.where(keep[:, None], g if scale is None else g * scale[part, None], 0)
        g16 = g.to(hidden.dtype)
        if need_dhidden:
            d_hidden[part] = g16 @ weight
        if need_dweight:
            # float16 could overflow in a sum over many rows.
            shrink = 2.0 ** -part.shape[0].bit_length() if g16.dtype == torch.float16 else 1.0
            d_weight += ((g * shrink).to(hidden.dtype).T @ h).to(stat) / shrink
        if need_dbias:
            d_bias += g.sum(dim=0)
    return losses, d_hidden, d_weight, d_bias


def _reference(hidden, weight, labels, bias, ignore_index, softcap, workspace_bytes, per_token, *needs):
    args = (hidden, weight, labels, bias, ignore_index, softcap, workspace_bytes)
    losses, *grads = _pass(*args, None, needs)
    return losses if per_token else losses.sum(), *grads


def _reference_bwd(dout, *args):
    head, needs = args[:7], args[7:]
    _losses, *grads = _pass(*head, dout, needs)
    return tuple(grad.to(like.dtype) for grad, like in zip(grads, _fake_bwd(dout, *args), strict=True))


def _reference_scale(grad, scale, dtype):
    scale = scale[:, None]
    # Rows of scale 0 are ignored ones: zero, whatever the upstream gradient is elsewhere.
    return torch.where(scale == 0, 0, grad * scale).to(dtype)


def _labels_checked(run, position: int):
    """Triton's `run`, behind the look at the labels (argument `position`) that it must not take on a GPU."""

    def checked(*args):
        weight, labels, _bias, ignore_index = args[position - 1 : position + 3]
        if labels.device.type == "cpu":  # Triton's interpreter
            _kept_rows(labels, ignore_index, weight.shape[0])
        return run(*args)

    return checked


_bwd = Op(
    f"{_NAME}_bwd",
    f"(Tensor dout, {_HEAD}, {_NEEDS}) -> ({_GRADS})",
    check=_check_bwd,
    fake=_fake_bwd,
    reference=_reference_bwd,
    backends=[
        Backend("triton", _labels_checked(triton.backward, 3), lambda *args: triton_why_not(*args[:3], args[4])),
        Backend("cpu", cpu.backward, lambda *args: cpu_why_not(*args[:3], args[4])),
    ],
)

_scale = Op(
    f"{_NAME}_scale",
    "(Tensor grad, Tensor scale, ScalarType dtype) -> Tensor",
    check=_check_scale,
    fake=lambda grad, scale, dtype: grad.new_empty(grad.shape, dtype=dtype),
    reference=_reference_scale,
    backends=[Backend("triton", triton.scale, triton.scale_why_not), Backend("cpu", cpu.scale, cpu.scale_why_not)],
)


def _setup_context(ctx, inputs, output):
    hidden, weight, labels, bias, ignore_index, softcap, workspace_bytes, per_token, *made = inputs
    _loss, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)
    wants = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    # Sums over tokens cannot be weighted afterwards: a gradient for each token means computing them again.
    ctx.recompute = any(want and not have for want, have in zip(wants, made, strict=True))
    head = (hidden, weight, bias) if ctx.recompute else (None, None, None)
    ctx.save_for_backward(*head, labels, *grads)
    ctx.numbers = (ignore_index, softcap, workspace_bytes)
    ctx.per_token, ctx.wants = per_token, wants
    ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)


def _backward(ctx, dout, *_unused):
    count = 11
    if dout is None:
        return (None,) * count
    hidden, weight, bias, labels, d_hidden, d_weight, d_bias = ctx.saved_tensors
    kept = labels != ctx.numbers[0]
    rows = torch.where(kept, dout, 0)
    if ctx.recompute:
        head = (hidden, weight, labels, bias, *ctx.numbers)
        d_hidden, d_weight, d_bias = _bwd(rows, *head, *ctx.wants)
    else:
        weight_dtype, bias_dtype = ctx.dtypes
        total = torch.where(kept.any(), dout, 0).reshape(1) if not ctx.per_token else None
        if ctx.wants[0]:
            d_hidden = _scale(d_hidden, rows, d_hidden.dtype)
        if ctx.wants[1]:
            d_weight = _scale(d_weight, total, weight_dtype)
        if ctx.wants[2]:
            d_bias = torch.where(total == 0, 0, d_bias * total).to(bias_dtype)
    grads = [None] * count
    for position, want, grad in zip((0, 1, 3), ctx.wants, (d_hidden, d_weight, d_bias), strict=True):
        grads[position] = grad if want else None
    return tuple(grads)


def _prepare(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: torch.Tensor | float | None = None,
    softcap: float = 0.0,
    shift: bool = False,
    workspace_bytes: int | None = None,
) -> tuple:
    check_tensor(_NAME, "hidden", hidden, ALL_FLOATS)
    check_tensor(_NAME, "weight", weight, ALL_FLOATS)
    check_tensor(_NAME, "labels", labels, (torch.int64,))
    if hidden.dim() == 0:
        fail(_NAME, "hidden has no dimensions, needs [..., H]")
    if labels.shape != hidden.shape[:-1]:
        fail(_NAME, f"labels is {list(labels.shape)}, needs {list(hidden.shape[:-1])} (hidden's, without the last)")
    if reduction not in ("mean", "sum", "none"):
        fail(_NAME, f"reduction is {reduction!r}, needs 'mean', 'sum' or 'none'")
    if num_items is not None:
        if reduction != "mean":
            fail(_NAME, f"num_items is the denominator of reduction 'mean', and reduction is {reduction!r}")
        if isinstance(num_items, torch.Tensor) and num_items.dim() != 0:
            fail(_NAME, f"num_items is {list(num_items.shape)}, needs a number or a 0-d tensor")
        if not isinstance(num_items, torch.Tensor | int | float):
            fail(_NAME, f"num_items is {type(num_items).__name__}, needs a number or a 0-d tensor")
    if workspace_bytes is not None and workspace_bytes < 1:
        fail(_NAME, f"workspace_bytes is {workspace_bytes}, needs at least 1")
    if shift:
        if labels.dim() == 0:
            fail(_NAME, "shift needs labels with a dimension to shift along")
        labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    per_token = reduction == "none"
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    if per_token and any(needs[1:]):
        needs = [False] * 3  # see _setup_context
    head = (hidden.reshape(labels.numel(), hidden.shape[-1]), weight, labels.reshape(-1), bias)
    return (*head, ignore_index, float(softcap), workspace_bytes or 0, per_token, *needs)


_linear_cross_entropy = Op(
    _NAME,
    f"({_HEAD}, bool per_token, {_NEEDS}) -> (Tensor loss, {_GRADS})",
    check=_check,
    fake=_fake,
    reference=_reference,
    backends=[
        Backend(
            "triton",
            _labels_checked(triton.forward, 2),
            lambda *args: triton_why_not(*args[:2], args[3]),
            triton.configuration_of,
        ),
        Backend("cpu", cpu.forward, lambda *args: cpu_why_not(*args[:2], args[3])),
    ],
    prepare=_prepare,
    setup_context=_setup_context,
    backward=_backward,
)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: torch.Tensor | float | None = None,
    softcap: float = 0.0,
    shift: bool = False,
    workspace_bytes: int | None = None,
) -> torch.Tensor:
    """The language-model head and its cross-entropy in one, without ever holding the logits of all tokens.

    loss_i = log sum_v exp(z_iv) - z_i,label_i with z = hidden W^T + bias, or softcap * tanh of that / softcap; over
    the tokens whose label is not `ignore_index`. Ignored tokens are left out before the first product.

    Products are in hidden's dtype (autocast's, where that is on), everything after them in float32. Gradients are made
    together with the loss, for an upstream gradient of 1, and only scaled in the backward pass; with reduction "none"
    and a weight or bias that trains they are computed there instead. Equal inputs and thread counts give equal bits.

    Args:
        hidden: [..., H], float32, float16, bfloat16 (float64 on the reference backend).
        weight: [V, H] in hidden's dtype; gets a gradient only when it requires one.
        labels: [...], int64: an entry of the vocabulary each, or `ignore_index`.
        bias: [V] or None.
        ignore_index: the label of tokens that do not count.
        reduction: "mean", "sum", or "none" for the loss of each token, zero where ignored.
        num_items: the denominator for "mean" in place of the number of labels that count: the whole batch's when
            gradients are accumulated over parts of it. A number, or a 0-d tensor, which is not read on the host.
        softcap: bound of the logits; 0 is none.
        shift: position t predicts the label at t + 1 of the same row, and the last position predicts nothing, as in
            Hugging Face's models.
        workspace_bytes: most bytes of logits held at a time (on a GPU at least one token's); None is the backend's own
            choice: on a CPU 4 MiB, or 128 MiB where the weight or bias trains; on a GPU the larger of 256 MiB, 1024
            tokens and, where the weight trains, a quarter of its float32 gradient.

    Returns:
        A scalar, or [...] for "none"; float32 (float64 for float64). With no label that counts, "mean" without
        `num_items` is NaN with gradients of zero, as torch's `cross_entropy` has it; "sum" is 0.

    Raises:
        InvalidInput: an argument of the wrong shape, dtype or device, or, on a CPU, a label outside the vocabulary; the
            message names it. On a GPU no call waits to look: there such a label makes the loss and the gradients NaN.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 64, requires_grad=True), torch.randn(1000, 64)
        >>> labels = torch.randint(1000, (2, 5))
        >>> pf.ops.linear_cross_entropy(hidden, weight, labels, shift=True).backward()

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", https://arxiv.org/abs/1805.02867.
    """
    options = {"ignore_index": ignore_index, "reduction": reduction, "num_items": num_items, "softcap": softcap}
    args = _prepare(hidden, weight, labels, bias, **options, shift=shift, workspace_bytes=workspace_bytes)
    loss, *_grads = _linear_cross_entropy(*args)
    if reduction == "none":
        return loss.reshape(labels.shape)
    if reduction == "sum":
        return loss
    if num_items is None:
        num_items = (args[2] != ignore_index).sum()
    elif isinstance(num_items, torch.Tensor):
        num_items = num_items.to(loss.device, loss.dtype if num_items.is_floating_point() else num_items.dtype)
    return loss / num_items
