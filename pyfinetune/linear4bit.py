"""`Linear4bit`, a linear layer whose weight is held in 4 bits, and `quantize`, which makes a model of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pyfinetune.errors import InvalidInput
from pyfinetune.ops import Packed4bit, dequantize_4bit, lora_linear, quantize_4bit
from pyfinetune.ops._checks import FLOATS
from pyfinetune.ops.nf4 import BLOCK_SIZES, QUANT_TYPES, check_packed

# Buffer of the module -> field of Packed4bit; a state dict spells "weight_" as "weight.", which is bitsandbytes' key.
_SCALES = {
    "weight_absmax": "absmax",
    "weight_quant_map": "quant_map",
    "weight_nested_absmax": "nested_absmax",
    "weight_nested_quant_map": "nested_quant_map",
    "weight_nested_offset": "nested_offset",
}
_TENSORS = ("codes", *_SCALES.values())
_STORED = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")  # the offset travels in the JSON
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def _state_key(quant_type: str) -> str:
    return f"quant_state.bitsandbytes__{quant_type}"


class Linear4bit(nn.Linear):
    """A linear layer whose weight is stored in 4 bits, in bitsandbytes' layout, and never decoded as a whole.

    y = x decode(weight)^T + bias

    `weight` holds the codes (uint8 [(numel + 1) // 2, 1]) and takes no gradient; the scales are buffers that stay in
    float32 under `.to(dtype)`. A state dict has bitsandbytes' keys, so checkpoints pass in both directions. A new
    module is all zeros until it is loaded; `from_linear` and `pf.quantize` make filled ones.

    Args:
        in_features: size of an input row.
        out_features: size of an output row.
        bias: whether there is a bias.
        quant_type: "nf4" or "fp4".
        double_quant: whether the scales are quantized to 8 bits.
        block_size: weights that share a scale.
        dtype: float32, float16 or bfloat16: the weight's dtype before it was quantized, and the bias's.
        device: where to put it; "meta" for loading with `assign=True`.

    Raises:
        InvalidInput: a wrong quant_type, block_size or dtype.

    Example:
        >>> layer = pf.Linear4bit.from_linear(torch.nn.Linear(128, 64))
        >>> layer(torch.randn(2, 128)).shape
        torch.Size([2, 64])

    Source: QLoRA, https://arxiv.org/abs/2305.14314; layout: bitsandbytes' QuantState.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quant_type: str = "nf4",
        double_quant: bool = True,
        block_size: int = 64,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        # nn.Linear's own constructor would allocate and initialise a dense weight.
        nn.Module.__init__(self)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_settings("Linear4bit", quant_type, block_size)
        if dtype not in FLOATS:
            raise InvalidInput(f"Linear4bit: dtype is {dtype}, needs float32, float16 or bfloat16")
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, in_features)
        self._set_packed(_empty_packed(shape, quant_type, double_quant, block_size, dtype, device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, quant_type: str = "nf4", double_quant: bool = True, block_size: int = 64
    ) -> Linear4bit:
        """Quantize a linear layer into a new module, which shares the layer's bias.

        Args:
            linear: the layer; it is left as it is.
            quant_type: "nf4" or "fp4".
            double_quant: also quantize the scales to 8 bits.
            block_size: weights that share a scale: 32, 64, 128, ..., 4096.

        Raises:
            InvalidInput: not a linear layer with a float weight, or a setting that does not exist.

        Example:
            >>> layer = pf.Linear4bit.from_linear(torch.nn.Linear(128, 64), block_size=128)
        """
        check_settings("Linear4bit.from_linear", quant_type, block_size)
        if not isinstance(linear, nn.Linear) or isinstance(linear, Linear4bit):
            raise InvalidInput(f"Linear4bit.from_linear: linear is {type(linear).__name__}, needs an nn.Linear")
        check_weight("Linear4bit.from_linear", "linear", linear.weight)
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = linear.in_features, linear.out_features
        new._set_packed(quantize_4bit(linear.weight, block_size, quant_type, double_quant))
        new.bias = linear.bias
        return new.train(linear.training)

    def _set_packed(self, packed: Packed4bit) -> None:
        """Take over a packed weight; its small tables are copied, since `Packed4bit`s share them."""
        # Layers that shared a table would lose it on saving: safetensors keeps one of several shared tensors.
        shared = ("quant_map", "nested_quant_map")
        self.weight = nn.Parameter(packed.codes, requires_grad=False)
        for buffer, field in _SCALES.items():
            value = getattr(packed, field)
            self.register_buffer(buffer, value.clone() if value is not None and field in shared else value)
        self.quant_type, self.block_size = packed.quant_type, packed.block_size
        self.nested_block_size, self.dtype_of_weight = packed.nested_block_size, packed.dtype

    @property
    def packed(self) -> Packed4bit:
        """The weight as the ops take it; the tensors are the module's own."""
        scales = [getattr(self, buffer) for buffer in _SCALES]
        shape = (self.out_features, self.in_features)
        settings = (self.block_size, self.nested_block_size, self.quant_type, shape, self.dtype_of_weight)
        return Packed4bit(self.weight, *scales, *settings)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are themselves quantized."""
        return self.weight_nested_absmax is not None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the weight had; PEFT makes new adapters in it, since the codes' dtype says nothing."""
        return self.dtype_of_weight

    @property
    def W_q(self) -> torch.Tensor:
        """The codes. PEFT decodes a layer that has this name with `dequantize()`, as DoRA needs it."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The decoded weight, [out_features, in_features].

        Args:
            dtype: float32, float16 or bfloat16; by default the dtype that the weight had.

        Example:
            >>> layer.dequantize(torch.float32).shape
            torch.Size([64, 128])
        """
        return dequantize_4bit(self.packed, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, self.packed, None, None, 1.0, self.bias)

    def reset_parameters(self) -> None:
        raise InvalidInput("Linear4bit: a quantized weight has no initialisation; load it or quantize a float layer")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"quant_type={self.quant_type}, block_size={self.block_size}, double_quant={self.double_quant}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Linear4bit:
        # `.to(bfloat16)`, `.half()` and the like cast floating tensors only: as integers the scales pass unharmed.
        floats = [
            name for name in _SCALES if getattr(self, name) is not None and getattr(self, name).is_floating_point()
        ]
        for name in floats:
            self._buffers[name] = self._buffers[name].view(torch.int32)
        try:
            super()._apply(fn, recurse)
        finally:
            for name in floats:
                if self._buffers[name].dtype == torch.int32:
                    self._buffers[name] = self._buffers[name].view(torch.float32)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        key = f"{prefix}weight"
        values = {key: self.weight, f"{prefix}bias": self.bias}
        values |= {f"{key}.{name}": getattr(self, f"weight_{name}") for name in _STORED}
        values[f"{key}.{_state_key(self.quant_type)}"] = _encode_state(self.packed)
        for name, value in values.items():
            if value is not None:
                destination[name] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        key, bias_key = f"{prefix}weight", f"{prefix}bias"
        known = {key, *(f"{key}.{name}" for name in (*_STORED, *map(_state_key, QUANT_TYPES)))}
        found = {name.removeprefix(key): value for name, value in state_dict.items() if name in known}
        assign = local_metadata.get("assign_to_params_buffers", False)
        try:
            missing = [f"{key}{name}" for name in missing_parts(found, self.quant_type, self.double_quant)]
            missing_keys += missing
            if not missing:
                self._take(decode_state(key, found, (self.out_features, self.in_features)), assign)
            if self.bias is not None and bias_key not in state_dict:
                missing_keys.append(bias_key)
            elif self.bias is not None:
                known.add(bias_key)
                self._take_bias(bias_key, state_dict[bias_key], assign)
        except InvalidInput as error:
            error_msgs.append(str(error))
        if strict:
            unexpected_keys += [name for name in state_dict if name.startswith(prefix) and name not in known]

    def _take(self, packed: Packed4bit, assign: bool) -> None:
        """Hold a loaded weight: the very tensors with `assign`, else copies where the old ones are."""
        if not assign:
            device = self.weight.device
            if device.type == "meta":
                raise InvalidInput("load_state_dict: the module is on the meta device; pass assign=True")
            copies = [value if value is None else value.detach().to(device, copy=True) for value in packed.tensors()]
            packed = dataclasses.replace(packed, **dict(zip(_TENSORS, copies, strict=True)))
        self._set_packed(packed)

    def _take_bias(self, key: str, value: torch.Tensor, assign: bool) -> None:
        if value.shape != self.bias.shape:
            raise InvalidInput(f"{key} is {list(value.shape)}, the module needs {list(self.bias.shape)}")
        if assign:
            self.bias = nn.Parameter(value.detach(), requires_grad=self.bias.requires_grad)
        else:
            with torch.no_grad():
                self.bias.copy_(value)


def _empty_packed(shape, quant_type, double_quant, block_size, dtype, device) -> Packed4bit:
    """An all-zero weight of this shape; on the meta device too."""
    settings = (block_size, quant_type, double_quant)
    sizes = quantize_4bit(torch.empty(shape, dtype=dtype, device="meta"), *settings)
    tables = quantize_4bit(torch.zeros(1), *settings)
    changes = {"quant_map": tables.quant_map.to(device), "nested_quant_map": tables.nested_quant_map}
    if double_quant:
        changes["nested_quant_map"] = tables.nested_quant_map.to(device)
    for field in ("codes", "absmax", "nested_absmax", "nested_offset"):
        like = getattr(sizes, field)
        changes[field] = None if like is None else torch.zeros(like.shape, dtype=like.dtype, device=device)
    return dataclasses.replace(sizes, **changes)


# --- bitsandbytes' state dict: four tensors, and the rest as JSON in a fifth


def _encode_state(packed: Packed4bit) -> torch.Tensor:
    """uint8: what bitsandbytes' `QuantState` writes beside the tensors, as UTF-8 JSON in its order of keys."""
    state: dict[str, Any] = {
        "quant_type": packed.quant_type,
        "blocksize": packed.block_size,
        "dtype": str(packed.dtype).removeprefix("torch."),
        "shape": packed.shape,
    }
    on_meta = packed.codes.is_meta
    if packed.double_quant:
        offset = 0.0 if on_meta else packed.nested_offset.item()
        state |= {"nested_blocksize": packed.nested_block_size, "nested_dtype": "float32", "nested_offset": offset}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    # A meta module knows no offset; the key is there, and like all its tensors it has no contents.
    return text.to("meta") if on_meta else text


def missing_parts(found: dict[str, torch.Tensor], quant_type: str, double_quant: bool) -> list[str]:
    """Keys that a complete weight has and `found` has not, each as what follows "weight".

    The settings say what is missing where nothing in `found` tells.
    """
    if "" in found and not any(found.keys() - {""}) and found[""].is_floating_point():
        return []  # a plain float weight, which decode_state refuses with the mend
    nested = [".nested_absmax", ".nested_quant_map"]
    need = ["", ".absmax", ".quant_map"]
    if any(name in found for name in nested) or (not found and double_quant):
        need += nested
    if not any(f".{_state_key(known)}" in found for known in QUANT_TYPES):
        need.append(f".{_state_key(quant_type)}")
    return [name for name in need if name not in found]


def decode_state(key: str, found: dict[str, torch.Tensor], shape: tuple[int, int]) -> Packed4bit:
    """The packed weight in a complete set of a state dict's entries."""
    codes = found[""]
    states = [name for quant_type in QUANT_TYPES if (name := f".{_state_key(quant_type)}") in found]
    if not states:
        raise InvalidInput(
            f"{key} is a {str(codes.dtype).removeprefix('torch.')} weight, and a Linear4bit holds 4-bit codes; load it "
            "into nn.Linear and call pf.quantize on the model"
        )
    try:
        state = json.loads(bytes(found[states[0]].cpu().tolist()).decode())
        quant_type, block_size, dtype = state["quant_type"], int(state["blocksize"]), _DTYPES[state["dtype"]]
        stored = tuple(int(size) for size in state["shape"])
        nested = ".nested_absmax" in found
        nested_block_size = int(state["nested_blocksize"]) if nested else 0
        offset = torch.tensor(float(state["nested_offset"]), device=codes.device) if nested else None
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise InvalidInput(f"{key}{states[0]} is no quantization state: {type(error).__name__}: {error}") from error
    if stored != shape:
        raise InvalidInput(f"{key} is {list(stored)}, the module needs {list(shape)}")
    if quant_type not in QUANT_TYPES:
        raise InvalidInput(f"{key}{states[0]}: quant_type is {quant_type!r}, needs one of {QUANT_TYPES}")
    if codes.dtype != torch.uint8 and codes.is_contiguous():
        codes = codes.view(-1).view(torch.uint8)  # bitsandbytes can store the bytes under another dtype, for FSDP
    tensors = [found.get(f".{name}") for name in _STORED]
    absmax, quant_map, nested_absmax, nested_quant_map = tensors
    scales = (nested_absmax, nested_quant_map, offset)
    check_packed(key, codes, absmax, quant_map, scales, block_size, nested_block_size, shape[0] * shape[1])
    codes = codes.reshape(-1, 1)
    return Packed4bit(codes, absmax, quant_map, *scales, block_size, nested_block_size, quant_type, shape, dtype)


# --- quantize


class SavedQuantization(dict):
    """What a quantized model's config says under `quantization_config`: the fields of a `BitsAndBytesConfig`.

    A dict, so that it is written without bitsandbytes being installed; `to_dict` is what PEFT asks of it.
    """

    def to_dict(self) -> dict[str, Any]:
        """A plain copy."""
        return dict(self)


def check_settings(where: str, quant_type: str, block_size: int) -> None:
    if quant_type not in QUANT_TYPES:
        raise InvalidInput(f"{where}: quant_type is {quant_type!r}, needs one of {QUANT_TYPES}")
    if block_size not in BLOCK_SIZES:
        raise InvalidInput(f"{where}: block_size is {block_size}, needs one of {BLOCK_SIZES}")


def check_weight(where: str, name: str, weight: torch.Tensor) -> None:
    if nn.parameter.is_lazy(weight) or weight.is_meta:
        raise InvalidInput(f"{where}: {name}.weight has no values yet (meta device); load the model first")
    if weight.dtype not in FLOATS:
        raise InvalidInput(f"{where}: {name}.weight is {weight.dtype}, needs float32, float16 or bfloat16")
    if not torch.isfinite(weight).all():
        raise InvalidInput(f"{where}: {name}.weight has NaN or infinite values")


def plain_linear(module: nn.Module) -> bool:
    """Whether the module computes x W^T + bias and nobody reads its weight behind its back."""
    return (
        isinstance(module, nn.Linear)
        and not isinstance(module, (Linear4bit, nn.modules.linear.NonDynamicallyQuantizableLinear))
        and type(module).forward is nn.Linear.forward
        and "forward" not in module.__dict__
        and not hasattr(module, "parametrizations")
        and not hasattr(module.weight, "quant_state")
    )


def _tied_weights(model: nn.Module) -> set[int]:
    """ids of the parameters that more than one module holds."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, count in seen.items() if count > 1}


def skipped(name: str, skip: Iterable[str]) -> bool:
    return any(f".{part}." in f".{name}." for part in skip)


def _refuse_adapters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__module__.split(".")[0] == "peft" or hasattr(module, "lora_A"):
            raise InvalidInput(
                f"quantize: the model already carries adapters ({name or 'the model'} is a {type(module).__name__}); "
                "call pf.quantize before get_peft_model"
            )
        if hasattr(module, "_hf_hook") and isinstance(module, nn.Linear):
            raise InvalidInput(
                f"quantize: {name} is dispatched by accelerate; load the model without device_map and quantize it first"
            )


def choose_targets(
    model: nn.Module, skip: Iterable[str], fits: Callable[[nn.Module], bool] = plain_linear
) -> tuple[list[tuple[str, nn.Module]], list[str]]:
    """The layers to quantize among those that fit, and the names of those that stay dense."""
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    names = [name for name, _ in model.named_modules()]
    for part in skip:
        if part != "lm_head" and not any(skipped(name, (part,)) for name in names):
            raise InvalidInput(f"quantize: skip names {part!r}, and the model has no such module")
    tied = _tied_weights(model)
    # What transformers itself keeps in float32 (T5 reads `wo.weight.dtype`, for one) stays dense here too.
    keep = (*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ()))
    head = model.get_output_embeddings() if "lm_head" in skip and hasattr(model, "get_output_embeddings") else None
    chosen, left = [], []
    for name, module in model.named_modules():
        if not fits(module):
            continue
        if module is head or skipped(name, keep) or id(module.weight) in tied:
            left.append(name)
        else:
            chosen.append((name, module))
    if not chosen:
        done = any(isinstance(module, Linear4bit) for module in model.modules())
        reason = "its linear layers are 4-bit already" if done else f"left out: {', '.join(left) or 'no linear layers'}"
        raise InvalidInput(f"quantize: nothing to quantize ({reason})")
    return chosen, left


def note_in_config(model: nn.Module, quant_type: str, double_quant: bool, left: list[str]) -> None:
    """Make `save_pretrained` write a checkpoint that bitsandbytes' loader recognises."""
    config = getattr(model, "config", None)
    present = getattr(config, "quantization_config", None)
    if not hasattr(model, "save_pretrained") or not (present is None or isinstance(present, SavedQuantization)):
        return
    compute = next((m.dtype_of_weight for m in model.modules() if isinstance(m, Linear4bit)), torch.float32)
    config.quantization_config = SavedQuantization(
        quant_method="bitsandbytes",
        load_in_4bit=True,
        load_in_8bit=False,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=str(compute).removeprefix("torch."),
        bnb_4bit_quant_storage="uint8",
        llm_int8_skip_modules=left,
    )


def quantize(
    model: nn.Module,
    quant_type: str = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    skip: Iterable[str] = ("lm_head",),
) -> nn.Module:
    """Turn a model's linear layers into `Linear4bit`, in place.

    Embeddings, norms, tied weights and what `skip` names stay as they are, as do layers that are 4-bit already.
    Nothing is frozen beside the quantized weights. A Hugging Face model's config then says `quant_method:
    bitsandbytes`, so that what `save_pretrained` writes is a bitsandbytes checkpoint.

    Args:
        model: any module; a Hugging Face model before `get_peft_model`.
        quant_type: "nf4" or "fp4".
        double_quant: also quantize the scales to 8 bits.
        block_size: weights that share a scale: 32, 64, 128, ..., 4096.
        skip: names of modules to leave: a whole path, or a part of one ("lm_head", "mlp", "layers.0"). "lm_head"
            means the output layer whatever its name.

    Returns:
        The model itself.

    Raises:
        InvalidInput: a setting that does not exist, a name in `skip` that the model has not, a weight without values
            or with NaN, a model that already carries adapters, or nothing to quantize. The model is then unchanged.

    Example:
        >>> model = pf.quantize(torch.nn.Sequential(torch.nn.Linear(128, 64)))
        >>> type(model[0]).__name__
        'Linear4bit'
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"quantize: model is {type(model).__name__}, needs an nn.Module")
    check_settings("quantize", quant_type, block_size)
    _refuse_adapters(model)
    chosen, left = choose_targets(model, skip)
    for name, linear in chosen:
        check_weight("quantize", name, linear.weight)
    for _, linear in chosen:
        packed = quantize_4bit(linear.weight, block_size, quant_type, double_quant)
        # The same object under a new class: hooks, names and whoever else holds the module stay right.
        linear.__class__ = Linear4bit
        linear._set_packed(packed)
    note_in_config(model, quant_type, double_quant, left)
    return model
