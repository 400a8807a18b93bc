"""`plan`: the memory and the work of a training step, counted before there is any.

One step runs on tensors that have shapes and lifetimes but no memory: forward, backward, clipping, optimizer. A ledger
notes each piece of memory when it is made and when its last user lets go of it, so that the peak is counted, not
estimated: what autograd saves, what checkpointing drops, gradients, optimizer state and temporaries alike.

    model, batch -> copy without memory -> one step under the ledger -> moments -> Plan

Each place of the step ("backward, last layer", ...) keeps its own peak. With equal layers each of these is linear in
their number, which is how a few layers stand for many: see `extrapolate`.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from pyfinetune.errors import InvalidInput
from pyfinetune.ops._cost import cost_of

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits and loss", "scratch", "batch")
_CUDA_GRAIN = 512  # bytes, to which torch's allocator of GPU memory rounds


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step takes.

    Args:
        moments: of each place in the step the bytes at its own peak, by part (`PARTS`).
        flops: floating-point operations of the step's matrix products, by the dtype they run in.
        parameters: elements of all parameters; those in 4 bits count as they are stored.
        trainable: elements of those that train.
    """

    moments: Mapping[str, Mapping[str, int]]
    flops: Mapping[str, float]
    parameters: int
    trainable: int

    @property
    def peak_at(self) -> str:
        """The place where the most is held."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part at the peak."""
        return {part: int(self.moments[self.peak_at].get(part, 0)) for part in PARTS}

    @property
    def peak(self) -> int:
        """Bytes held at the peak, without what the process or the GPU's context takes by itself."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"peak": self.peak, "peak_at": self.peak_at, "parts": self.parts, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        lines = [f"{part:<16} {size / 2**20:>12,.1f} MiB" for part, size in self.parts.items() if size]
        return "\n".join([*lines, f"{'peak':<16} {self.peak / 2**20:>12,.1f} MiB  ({self.peak_at})"])


def plan(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    device: str = "cpu",
    gradient_checkpointing: bool = False,
    accumulation: int = 1,
    autocast: torch.dtype | None = None,
    max_grad_norm: float = 1.0,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> Plan:
    """Predict the memory that a training step takes, part by part, and its floating-point operations.

    The model may be on the meta device, or be a real one, patched or not, in the state in which it will be trained;
    it is copied without its memory and left as it is. Counted are torch's tensors and the scratch of this package's
    kernels at the fullest moment, not what the process or a GPU's context takes before there is a model, nor what
    loading and saving take. transformers looks at a batch's values to find packed rows; here are none to look at, and
    torch's own attention is planned with a mask, as for packed rows.

    Args:
        model: any module that returns a loss, as Hugging Face's do when they are called with labels.
        batch: the arguments of its call by name; of tensors only shape and dtype count.
        device: "cpu" or "cuda": whose kernels' scratch to count.
        gradient_checkpointing: recompute each layer in the backward pass.
        accumulation: batches of one optimizer step; from the second on gradients are there during the forward pass.
        autocast: run the model under autocast in this dtype, as `bf16: true` does.
        max_grad_norm: gradients are clipped to this norm; 0 for none.
        optimizer: makes the optimizer from the trained parameters; AdamW, fused, when None.

    Returns:
        The plan: print it, or read `.peak` (bytes), `.parts`, `.peak_at` and `.flops`.

    Raises:
        InvalidInput: not a module, nothing trains, the model gives no loss, or something in it cannot run without
            values.

    Example:
        >>> ids = torch.empty(4, 1024, dtype=torch.int64, device="meta")
        >>> print(pf.plan(model, {"input_ids": ids, "labels": ids}))  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"plan: model is {type(model).__name__}, needs an nn.Module")
    if device not in ("cpu", "cuda"):
        raise InvalidInput(f"plan: device is {device!r}, needs 'cpu' or 'cuda'")
    if accumulation < 1:
        raise InvalidInput(f"plan: accumulation is {accumulation}, needs at least 1")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidInput("plan: no parameter of the model trains; add adapters, or set requires_grad")
    mode = FakeTensorMode()
    shadow = fake_copy(model, mode).train()
    if gradient_checkpointing:
        _checkpoint(shadow)
    ledger = Ledger(device)
    step = _Step(shadow, ledger, autocast, accumulation, max_grad_norm)
    try:
        with mode:
            step.run({name: _fake(value) for name, value in batch.items()}, optimizer or _adamw)
    except InvalidInput:
        raise
    except Exception as error:  # whatever the model does with values that are not there
        reason = " ".join(str(error).split())[:300]
        raise InvalidInput(f"plan: the model cannot run without values: {type(error).__name__}: {reason}") from error
    parameters = list(shadow.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return Plan(ledger.moments, dict(ledger.flops), sum(p.numel() for p in parameters), trainable)


def extrapolate(fewer: Plan, more: Plan, layers: tuple[int, int], wanted: int) -> Plan:
    """The plan of a model with many equal layers from the plans of two models with few.

    Args:
        fewer, more: plans of the same model with less and with more layers; at least 2, so that the first is not the
            last.
        layers: how many each of them has.
        wanted: how many the model has.

    Returns:
        A plan in which everything is continued linearly.

    Raises:
        InvalidInput: the numbers of layers are equal or below 2.

    Example:
        >>> extrapolate(two, three, (2, 3), 32).peak  # doctest: +SKIP
    """
    if min(layers) < 2 or layers[0] == layers[1]:
        raise InvalidInput(f"extrapolate: layers is {layers}, needs two different numbers from 2 up")
    share = (wanted - layers[0]) / (layers[1] - layers[0])

    def line(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        return {key: a.get(key, 0) + share * (b.get(key, 0) - a.get(key, 0)) for key in {**a, **b}}

    # Two layers have none between them; with more, what is held there lies between the first and the last.
    moments = {
        name: {part: round(size) for part, size in line(parts, more.moments[name]).items()}
        for name, parts in fewer.moments.items()
    }
    counts = line(
        {"all": fewer.parameters, "trainable": fewer.trainable}, {"all": more.parameters, "trainable": more.trainable}
    )
    return Plan(moments, line(fewer.flops, more.flops), round(counts["all"]), round(counts["trainable"]))


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a module whose tensors have shape, dtype and strides but no memory; all seem to be on the CPU.

    Args:
        model: any module; what shares a tensor shares it in the copy.
        mode: the mode that the copy belongs to.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        with mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
    return copy.deepcopy(model, memo)


def _fake(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="cpu")


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True)


def _checkpoint(model: nn.Module) -> None:
    """Switch checkpointing on as transformers' Trainer does."""
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    if enable is None:
        raise InvalidInput(f"plan: {type(model).__name__} has no gradient checkpointing; leave it off")
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    enable()


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: its longest list of modules of one class; empty where there is none.

    Args:
        model: any module.
    """
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(each) for each in m}) == 1]
    return max(lists, key=len, default=[])


class Ledger(TorchDispatchMode):
    """Counts the memory of every tensor that operators make, from its making to its end.

    Args:
        device: "cpu" or "cuda", whose rounding and scratch to count.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device, self.grain = device, _CUDA_GRAIN if device == "cuda" else 1
        self.moments: dict[str, dict[str, int]] = {}
        self.flops: Counter[str] = Counter()
        self.phase, self.place = "setup", ""
        self._held: dict[int, list] = {}  # storage -> [its weak reference, part, bytes]
        self._live: Counter[str] = Counter()
        self._total = 0
        self._peaks: dict[str, int] = {}
        self._scratch: dict[str, int] = {}
        self._sum: tuple[int, set[int], int] | None = None  # see _in_place

    @property
    def label(self) -> str:
        """Where in the step it is."""
        return f"{self.phase}, {self.place}" if self.place else self.phase

    def hold(self, tensor: torch.Tensor, part: str) -> None:
        """Note the memory of a tensor, or give what is known to another part."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            entry = self._held[key]
            self._count(entry[1], -entry[2])
            entry[1] = part
            self._count(part, entry[2])
            return
        size = -(-storage.nbytes() // self.grain) * self.grain
        self._held[key] = [weakref.ref(storage, lambda _, key=key: self._free(key)), part, size]
        self._count(part, size)

    def _free(self, key: int) -> None:
        _, part, size = self._held.pop(key)
        self._count(part, -size)
        if self._sum is not None and key in self._sum[1]:
            self._settle()

    def _settle(self) -> None:
        if self._sum is not None:
            key, _, size = self._sum
            self._sum = None
            if key in self._held:
                self._held[key][2] = size
                self._count(self._held[key][1], size)

    def _in_place(self, func, args: tuple, out: Any) -> bool:
        """Whether autograd adds two gradients of one tensor: into the first, where nobody else holds it.

        A tensor without memory is never added into. So the sum counts from when one of the two is let go, or, where
        both live on, from the next operator.
        """
        if func is not torch.ops.aten.add.Tensor or self.phase != "backward" or torch.is_grad_enabled():
            return False
        same = all(isinstance(a, torch.Tensor) and (a.shape, a.dtype) == (out.shape, out.dtype) for a in args[:2])
        return len(args) == 2 and same

    def _count(self, part: str, size: int) -> None:
        self._live[part] += size
        self._total += size

    def note(self, passing: int = 0) -> None:
        """Keep what is held, if it is the most at this place; `passing` bytes more are held for a moment."""
        if self.phase != "setup" and self._total + passing > self._peaks.get(self.label, -1):
            self._peaks[self.label] = self._total + passing
            self.moments[self.label] = dict(self._live)
            self.moments[self.label]["scratch"] = self._live["scratch"] + passing

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operator and note what it made."""
        self._settle()
        out = func(*args, **(kwargs or {}))
        if any(type(leaf).__name__ == "LazyLogits" for leaf in tree_leaves(out)):
            return out
        part = self._part()
        for leaf in tree_leaves(out):
            if isinstance(leaf, FakeTensor) and leaf.untyped_storage()._cdata not in self._held:
                self.hold(leaf, part)
                if self._in_place(func, args, leaf):
                    key = leaf.untyped_storage()._cdata
                    self._sum = (key, {arg.untyped_storage()._cdata for arg in args}, self._held[key][2])
                    self._count(part, -self._held[key][2])
                    self._held[key][2] = 0
        self.note(self._cost(func, args, kwargs or {}, out))
        return out

    def _part(self) -> str:
        if self.phase == "optimizer":
            return "optimizer"
        return "logits and loss" if self.place == "head and loss" else "activations"

    def _cost(self, func, args, kwargs, out) -> int:
        """Bytes that the operator holds while it runs; its operations are added up."""
        packet = func._overloadpacket
        first = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)), None)
        dtype = "none" if first is None else str(first.dtype).removeprefix("torch.")
        if func.namespace == "pyfinetune":
            cost = cost_of(packet.__name__, args, self.device)
            self.flops[dtype] += cost.flops
            for name, size in cost.kept.items():
                self._count("scratch", max(0, size - self._scratch.get(name, 0)))
                self._scratch[name] = max(size, self._scratch.get(name, 0))
            return cost.passing
        if packet in flop_registry:
            self.flops[dtype] += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet in _CPU_ATTENTION:
            self.flops[dtype] += _CPU_ATTENTION[packet](*args)
        return 0


_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda dout, q, k, v, *rest: (
        sdpa_backward_flop_count(dout.shape, q.shape, k.shape, v.shape)
    ),
}


class _Step:
    """One optimizer step of a model without memory, with the ledger told where it is."""

    def __init__(self, model: nn.Module, ledger: Ledger, autocast, accumulation: int, max_grad_norm: float):
        self.model, self.ledger, self.autocast = model, ledger, autocast
        self.accumulation, self.max_grad_norm = accumulation, max_grad_norm
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._mark_layers()

    def run(self, batch: dict[str, Any], optimizer: Callable) -> None:
        """The optimizer has made its state before: that is how every step but the first begins."""
        ledger = self.ledger
        frozen = any(not parameter.requires_grad for parameter in self.model.parameters())
        for parameter in self.model.parameters():
            ledger.hold(parameter, "adapters" if frozen and parameter.requires_grad else "weights")
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: ledger.hold(p.grad, "gradients"))
        for buffer in self.model.buffers():
            ledger.hold(buffer, "weights")
        for value in tree_leaves(batch):
            if isinstance(value, torch.Tensor):
                ledger.hold(value, "batch")
        update = optimizer(self.trained)
        with ledger:
            self._prime(update)
            for _ in range(min(self.accumulation, 2)):
                self._forward_backward(batch)
            self._enter("optimizer", "")
            if self.max_grad_norm:
                nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
            update.step()

    def _prime(self, update: torch.optim.Optimizer) -> None:
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter)
        update.step()
        update.zero_grad(set_to_none=True)
        for state in update.state.values():
            for value in tree_leaves(state):
                if isinstance(value, torch.Tensor):
                    self.ledger.hold(value, "optimizer")

    def _forward_backward(self, batch: dict[str, Any]) -> None:
        self._enter("forward", "embedding")
        loss = self._loss(batch) / self.accumulation
        self._enter("backward", "head and loss")
        loss.backward()

    def _loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss alone outlives the call, as in the Trainer: the logits that the model returns do not."""
        with torch.autocast("cpu", dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            outputs = self.model(**batch)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        loss = loss[0] if isinstance(loss, tuple) else loss
        if not isinstance(loss, torch.Tensor) or loss.dim() or not loss.requires_grad:
            raise InvalidInput("plan: the model gave no loss to differentiate; put labels into the batch")
        if self.autocast is not None and isinstance(outputs, Mapping) and "logits" in outputs:
            outputs["logits"].float()  # what accelerate makes of a model's results under mixed precision
        return loss

    def _enter(self, phase: str, place: str) -> None:
        self.ledger.phase, self.ledger.place = phase, place
        self.ledger.note()

    def _mark_layers(self) -> None:
        layers = layers_of(self.model)
        for i, layer in enumerate(layers):
            name = "first layer" if i == 0 else "last layer" if i == len(layers) - 1 else "inner layers"
            after = "head and loss" if i == len(layers) - 1 else None
            layer.register_forward_pre_hook(self._before_layer(name, i == 0), with_kwargs=True)
            layer.register_forward_hook(self._after_layer(name, after))

    def _before_layer(self, name: str, is_first: bool) -> Callable:
        def hook(module, args, kwargs):
            self._enter(self.ledger.phase, name)
            x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)), None)
            if is_first and x is not None and x.requires_grad and x.grad_fn is not None:
                x.register_hook(lambda grad: self._enter("backward", "embedding"))

        return hook

    def _after_layer(self, name: str, after: str | None) -> Callable:
        def hook(module, args, out):
            if self.ledger.phase == "forward" and after is not None:
                self._enter("forward", after)
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaf.register_hook(lambda grad: self._enter("backward", name))

        return hook
