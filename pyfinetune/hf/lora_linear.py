"""PEFT's LoRA linear layers: which can run on `pf.ops.lora_linear`, the classes that do, and the probe before it."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._subclasses import FakeTensor

from pyfinetune.hf.changes import ClassSwap
from pyfinetune.hf.peft_lora import LoraLinear4bit
from pyfinetune.hf.probe import Candidate, Proof, compare, has_hooks, run_with_grads, twin_of, why_fixed
from pyfinetune.linear4bit import Linear4bit
from pyfinetune.ops import Packed4bit, dequantize_4bit, lora_linear, lora_linear_group
from pyfinetune.ops._checks import FLOATS
from pyfinetune.ops._op import explain


def compute_dtype_of(x: torch.Tensor) -> torch.dtype:
    """The dtype that a linear layer would compute in: autocast's where that is on, else x's."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


class FastLora:
    """The forward that the swapped classes share: one op where it computes what PEFT would, else PEFT's own.

    PEFT computes float32 adapters over a bfloat16 base in float32, casting x up and the update down. The op computes
    in x's dtype, as PEFT itself does under autocast.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        call = None if args or kwargs else self.call(x)
        if call is None:
            return super().forward(x, *args, **kwargs)
        return self._result(lora_linear(x, *call), x)

    def call(self, x: torch.Tensor) -> tuple | None:
        """What `lora_linear` is called with behind x; None where PEFT's own forward has to run."""
        name = _only_active(self)
        if name is None or x.dtype not in FLOATS or adapter_why_not(self, name) or _hooked(self, name):
            return None
        base = self.base_layer
        weight = self.base_weight(base, x)
        if weight is None:
            return None
        dropout, variant = self.lora_dropout[name], self.lora_variant.get(name)
        active = isinstance(dropout, nn.Dropout) and dropout.training and (variant is None or self.training)
        adapter = (self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
        magnitude = None if variant is None else self.lora_magnitude_vector[name].weight
        # With no seed given the op draws one from torch's generator, once: checkpointing replays it.
        return weight, *adapter, base.bias, dropout.p if active else 0.0, None, magnitude

    def _result(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y

    @staticmethod
    @abc.abstractmethod
    def base_weight(base: nn.Module, x: torch.Tensor) -> torch.Tensor | Packed4bit | None:
        """What the op takes as the base weight, or None where PEFT's path has to run."""

    @staticmethod
    @abc.abstractmethod
    def decoded(base: nn.Module) -> torch.Tensor:
        """The base weight [out, in] as the original forward would see it."""

    @staticmethod
    @abc.abstractmethod
    def probe_dtype(base: nn.Module) -> torch.dtype:
        """The dtype of x that the layer is made for."""

    @staticmethod
    @abc.abstractmethod
    def storage(base: nn.Module) -> tuple:
        """What distinguishes base weights of one shape from each other."""

    @staticmethod
    def base_why_not(base: nn.Module) -> str | None:
        """The reason why the op cannot take this base at all, or None."""
        return None


def shared_input(modules: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of several layers of one input: one op where all of them run on ours, else one after the other."""
    # Called past the module's own call, hooks on it would not be heard.
    calls = [m.call(x) if isinstance(m, FastLora) and not has_hooks(m) else None for m in modules]
    if any(call is None for call in calls):
        return [module(x) for module in modules]
    weights, lora_as, lora_bs, scalings, biases, dropout_ps, seeds, magnitudes = (
        list(part) for part in zip(*calls, strict=True)
    )
    ys = lora_linear_group(x, weights, lora_as, lora_bs, scalings, biases, dropout_ps, seeds, magnitudes)
    return [module._result(y, x) for module, y in zip(modules, ys, strict=True)]


class FastLinear(FastLora, PeftLinear):
    """PEFT's LoRA layer over `nn.Linear`, on `pf.ops.lora_linear`."""

    label = "nn.Linear"
    original = PeftLinear

    @staticmethod
    def base_weight(base: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        # Without autocast a mismatch is an error in torch, and is left to torch to raise.
        return base.weight if base.weight.dtype == x.dtype or compute_dtype_of(x) != x.dtype else None

    @staticmethod
    def decoded(base: nn.Module) -> torch.Tensor:
        return base.weight.detach()

    @staticmethod
    def probe_dtype(base: nn.Module) -> torch.dtype:
        return base.weight.dtype

    @staticmethod
    def storage(base: nn.Module) -> tuple:
        return base.weight.dtype, base.weight.requires_grad

    @staticmethod
    def base_why_not(base: nn.Module) -> str | None:
        weight = base.weight
        plain = type(weight) in (nn.Parameter, FakeTensor) and weight.dtype in FLOATS
        return None if plain else f"the base weight is a {type(weight).__name__} of {weight.dtype}"


class FastLoraLinear4bit(FastLora, LoraLinear4bit):
    """PEFT's LoRA layer over `Linear4bit`, on `pf.ops.lora_linear`."""

    label = "pf.Linear4bit"
    original = LoraLinear4bit

    @staticmethod
    def base_weight(base: nn.Module, x: torch.Tensor) -> Packed4bit:
        return base.packed

    @staticmethod
    def decoded(base: nn.Module) -> torch.Tensor:
        return base.dequantize()

    @staticmethod
    def probe_dtype(base: nn.Module) -> torch.dtype:
        return base.dtype_of_weight

    @staticmethod
    def storage(base: nn.Module) -> tuple:
        return base.dtype_of_weight, base.quant_type, base.block_size, base.double_quant


def _only_active(module: PeftLinear) -> str | None:
    """The one adapter that runs in this layer, or None if there is none, or several, or they are off or merged."""
    if module.disable_adapters or module.merged or not getattr(module, "cast_input_dtype_enabled", True):
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    return names[0] if len(names) == 1 else None


def adapter_why_not(module: PeftLinear, name: str) -> str | None:
    """The reason why the op does not compute what this adapter does, or None."""
    lora_a, lora_b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    variant = module.lora_variant.get(name)
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return f"its adapter weights are in a {type(lora_a).__name__} and a {type(lora_b).__name__}, not in nn.Linear"
    if lora_b.bias is not None or lora_a.bias is not None:
        return "the adapter has a bias (lora_bias)"
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"the adapter is a {type(variant).__name__}"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"the adapter's dropout is a {type(dropout).__name__}"
    if type(dropout) is nn.Dropout and dropout.p >= 1:
        return "the adapter's dropout is 1"
    if lora_a.weight.dtype not in FLOATS or lora_b.weight.dtype not in FLOATS:
        return f"the adapter is {lora_a.weight.dtype}"
    if variant is not None and type(module.lora_magnitude_vector[name]) is not DoraLinearLayer:
        return f"the DoRA layer is a {type(module.lora_magnitude_vector[name]).__name__}"
    if getattr(module, "fan_in_fan_out", False):
        return "the base weight is stored transposed (fan_in_fan_out)"
    return None


def _hooked(module: PeftLinear, name: str) -> bool:
    """Whether someone listens to a child that the op would run past."""
    children = [module.base_layer, module.lora_A[name], module.lora_B[name], module.lora_dropout[name]]
    if name in module.lora_magnitude_vector:
        children.append(module.lora_magnitude_vector[name])
    return any(map(has_hooks, children))


# --- finding the layers


def _fast_class(module: BaseTunerLayer, base: nn.Module) -> type[FastLora] | None:
    """The class that would replace the module's, or None; exact types only."""
    if type(module) is PeftLinear and type(base) is nn.Linear:
        return FastLinear
    if type(module) in (PeftLinear, LoraLinear4bit) and type(base) is Linear4bit:
        return FastLoraLinear4bit
    if type(module).__module__ == "peft.tuners.lora.bnb" and type(base).__name__ == "Linear4bit":
        from pyfinetune.hf.lora_bnb import FastBnbLinear4bit, replaces

        return FastBnbLinear4bit if replaces(module, base) else None
    return None


def _why_not(module: BaseTunerLayer, base: nn.Module, fast: type[FastLora] | None) -> str | None:
    """The reason why the module keeps its class, or None."""
    if isinstance(module, FastLora):
        return "already patched"
    if fast is None:
        return f"no kernel for {_qualified(module)} over {_qualified(base)}"
    if module.base_layer is not base:
        return "adapters are nested"
    fixed = why_fixed(module)
    if fixed is not None:
        return fixed
    if not len(module.lora_A):
        return "it has no LoRA adapter"
    reasons = [adapter_why_not(module, name) for name in module.lora_A]
    return fast.base_why_not(base) or (reasons[0] if all(reasons) else None)


def _qualified(module: nn.Module) -> str:
    kind = type(module)
    return f"{kind.__module__.removeprefix('peft.tuners.')}.{kind.__name__}"


def _kind(module: nn.Module, base: nn.Module, fast: type[FastLora] | None) -> str:
    fast = type(module) if isinstance(module, FastLora) else fast
    return f"LoRA over {fast.label}" if fast else _qualified(module)


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every adapter layer of PEFT in the model, with what would replace it or why nothing does."""
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        base = module.get_base_layer()
        fast = _fast_class(module, base)
        reason = _why_not(module, base, fast)
        signature = None if reason else _signature(module, base, fast)
        change = None if reason else ClassSwap(module, fast)
        prove = functools.partial(_prove, module, fast)
        yield Candidate(_kind(module, base, fast), name, module, change, reason, signature, prove)


# --- the proof


def _provable(module: PeftLinear) -> list[str]:
    return [name for name in module.lora_A if adapter_why_not(module, name) is None]


def _signature(module: PeftLinear, base: nn.Module, fast: type[FastLora]) -> tuple:
    """Layers that agree in this are proved by one probe."""
    bias = None if base.bias is None else (base.bias.dtype, base.bias.requires_grad)
    adapters = frozenset(
        (
            module.r[name],
            module.lora_A[name].weight.dtype,
            module.lora_B[name].weight.dtype,
            name in module.lora_variant,
            module.scaling[name],
        )
        for name in _provable(module)
    )
    size = (base.in_features, base.out_features, str(base.weight.device))
    return type(module), fast, *size, bias, fast.storage(base), adapters


def _prove(module: PeftLinear, fast: type[FastLora]) -> tuple[Proof, str]:
    """Probe each adapter of a layer: the proof with the largest error, or the first that failed; and the backend."""
    proofs, backend = [], ""
    # Building the stand-ins must not move torch's generator.
    with torch.random.fork_rng(devices=[]):
        for name in _provable(module):
            for shape in ((3,), (2, 20)):  # few rows and many go through different kernels
                proof, backend = _probe(module, fast, name, shape)
                proofs.append(proof)
                if proof.reason:
                    return proof, backend
    return max(proofs, key=lambda proof: proof.error or 0.0), backend


def _probe(module: PeftLinear, fast: type[FastLora], name: str, shape: tuple[int, ...]) -> tuple[Proof, str]:
    """Outputs and gradients of the op, of the original forward, and of the original forward in float64."""
    base = module.get_base_layer()
    dtype, decoded = fast.probe_dtype(base), fast.decoded(base)
    inputs = _random_inputs(module, name, decoded, dtype, shape)
    x, dout = inputs["x"], inputs.pop("dout")
    weight = fast.base_weight(base, x)
    if isinstance(weight, Packed4bit) and not torch.equal(decoded, dequantize_4bit(weight, decoded.dtype)):
        rows = f"rows of {base.in_features}, blocks of {weight.block_size}"
        return Proof(None, f"{fast.label} decodes this weight wrongly ({rows}), so outputs would change"), ""
    dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    original = _stand_in(module, type(module), name, dense)

    def run(target: nn.Module, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        def call(leaves):
            leaves = dict(leaves)
            return torch.func.functional_call(target, leaves, (leaves.pop("x"),))

        return run_with_grads(call, values, dout)

    def cast(to: torch.dtype) -> dict[str, torch.Tensor]:
        values = {key: _recast(value, to) for key, value in inputs.items()}
        return values | {"base_layer.weight": _recast(decoded, to, base.weight.requires_grad)}

    # The op casts the adapters to x's dtype as autocast does; so the original is run with adapters of that dtype.
    theirs = run(original, cast(dtype))
    # Beyond 2^27 elements a float64 copy of the weight might not fit; for 16 bits float32 is exact enough.
    wide = decoded.numel() <= 2**27 or dtype == torch.float32
    exact = run(original, cast(torch.float64 if wide else torch.float32))
    actual = dict(module.named_parameters())
    values = {key: value if key == "x" else _recast(value, actual[key].dtype) for key, value in inputs.items()}
    if isinstance(weight, torch.Tensor):
        values["base_layer.weight"] = _recast(decoded, weight.dtype, weight.requires_grad)
    proof = compare(run(_stand_in(module, fast, name, twin_of(base)), values), theirs, exact, dtype)
    adapter = (values[f"lora_A.{name}.weight"], values[f"lora_B.{name}.weight"], module.scaling[name])
    return proof, explain("lora_linear", x, weight, *adapter).backend


def _recast(value: torch.Tensor, dtype: torch.dtype, requires_grad: bool | None = None) -> torch.Tensor:
    return value.detach().to(dtype).requires_grad_(value.requires_grad if requires_grad is None else requires_grad)


def _random_inputs(
    module: PeftLinear, name: str, weight: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """x, dout and every adapter parameter at random, such that base, update and bias weigh about the same.

    The values are exact in `dtype`, so that casting them to a wider one is no error.
    """
    out_features, in_features = weight.shape
    rank, bias = module.r[name], module.get_base_layer().bias
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0, requires_grad: bool = True) -> torch.Tensor:
        values = torch.randn(size, generator=generator) * scale
        return values.to(dtype).to(weight.device).requires_grad_(requires_grad)

    size = (weight.float().square().mean().item() * in_features) ** 0.5 or 1.0
    update = size / (math.sqrt(rank) * max(abs(module.scaling[name]), 1e-3))
    inputs = {
        "x": normal(*shape, in_features),
        f"lora_A.{name}.weight": normal(rank, in_features, scale=in_features**-0.5),
        f"lora_B.{name}.weight": normal(out_features, rank, scale=update),
        "dout": normal(*shape, out_features, requires_grad=False),
    }
    if bias is not None:
        inputs["base_layer.bias"] = normal(out_features, scale=size, requires_grad=bias.requires_grad)
    if name in module.lora_variant:
        magnitude = size * (1 + normal(out_features, requires_grad=False).abs())
        inputs[f"lora_magnitude_vector.{name}.weight"] = magnitude.requires_grad_()
    return inputs


def _stand_in(module: PeftLinear, kind: type, name: str, base: nn.Module) -> nn.Module:
    """The layer as it would be with one adapter active, over `base`, with empty parameters to be filled by a call."""
    twin = twin_of(module)
    twin.__class__ = kind
    rank = module.r[name]
    parts = {
        "lora_A": nn.Linear(base.in_features, rank, bias=False, device="meta"),
        "lora_B": nn.Linear(rank, base.out_features, bias=False, device="meta"),
        "lora_dropout": nn.Identity(),
    }
    if name in module.lora_variant:
        parts["lora_magnitude_vector"] = DoraLinearLayer(fan_in_fan_out=False)
        parts["lora_magnitude_vector"].weight = nn.Parameter(torch.empty(base.out_features, device="meta"))
    for part, child in parts.items():
        twin._modules[part] = nn.ModuleDict({name: child})
    twin._modules["base_layer"] = base
    twin.__dict__.update(
        _active_adapter=[name], _disable_adapters=False, merged_adapters=[], _caches={}, training=False
    )
    return twin
