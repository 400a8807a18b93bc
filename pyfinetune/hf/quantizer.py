"""`Config4bit`, transformers' way to load a model into `Linear4bit`: the configuration, and the quantizers behind it.

Layers are found on the model's skeleton, before it has weights. transformers then brings the weights one by one; each
is quantized as it comes, and its layer changes class. A bitsandbytes checkpoint takes the same way, without quantizing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pyfinetune.errors import InvalidInput, PyfinetuneError
from pyfinetune.linear4bit import (
    Linear4bit,
    check_settings,
    check_weight,
    choose_targets,
    decode_state,
    missing_parts,
    note_in_config,
    plain_linear,
    skipped,
)
from pyfinetune.ops import Packed4bit, quantize_4bit
from pyfinetune.ops.nf4 import QUANT_TYPES

try:
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise PyfinetuneError(
        f"Config4bit needs transformers 5.5 or newer ({error}): pip install 'pyfinetune[hf]'"
    ) from error

_METHOD = "pyfinetune_4bit"
_FROM_BITSANDBYTES = "pyfinetune_from_bitsandbytes"
# What a checkpoint has beside "weight"; the longest name first, since a name is matched by the first that fits.
_PARTS = [
    *(f".quant_state.bitsandbytes__{quant_type}" for quant_type in QUANT_TYPES),
    *(".nested_quant_map", ".nested_absmax", ".quant_map", ".absmax"),
]

_TRIM_EVERY = 128 << 20  # bytes of dense weights


@register_quantization_config(_METHOD)
class Config4bit(QuantizationConfigMixin):
    """What to load in 4 bits, and how: a `quantization_config` for transformers' `from_pretrained`.

    Each linear layer is quantized to `pf.Linear4bit` as its weight is read, so that no more than one dense weight
    exists at a time; the result is what `pf.quantize` would make of the dense model, bit for bit. Computation is in the
    model's dtype. `device_map` is honoured; without it the model is on the CPU until it is moved. The model is saved
    as a bitsandbytes checkpoint. bitsandbytes itself is not needed. To load such a checkpoint: `pf.load_4bit`.

    Args:
        quant_type: "nf4" or "fp4".
        double_quant: also quantize the scales to 8 bits.
        block_size: weights that share a scale: 32, 64, 128, ..., 4096.
        skip: names of modules to leave dense: a whole path, or a part of one ("lm_head", "mlp", "layers.0"). "lm_head"
            means the output layer whatever its name.

    Raises:
        InvalidInput: a setting that does not exist.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("path/to/model", quantization_config=pf.Config4bit())
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        double_quant: bool = True,
        block_size: int = 64,
        skip: Iterable[str] = ("lm_head",),
    ):
        check_settings("Config4bit", quant_type, block_size)
        self.quant_method = _METHOD
        self.quant_type, self.double_quant, self.block_size = quant_type, bool(double_quant), block_size
        self.skip = (skip,) if isinstance(skip, str) else tuple(skip)

    def __repr__(self) -> str:
        return (
            f"Config4bit(quant_type={self.quant_type!r}, double_quant={self.double_quant}, "
            f"block_size={self.block_size}, skip={self.skip!r})"
        )


@register_quantization_config(_FROM_BITSANDBYTES)
class _FromBitsandbytes(Config4bit):
    """The same for a checkpoint that is 4-bit already: its layers say themselves how they were quantized."""

    def __init__(self, skip: Iterable[str] = (), double_quant: bool = False, storage: torch.dtype = torch.uint8):
        super().__init__(double_quant=double_quant, skip=skip)
        self.quant_method = _FROM_BITSANDBYTES
        self.storage = storage  # what the bytes of the codes were written as


def from_bitsandbytes(saved: dict[str, Any]) -> Config4bit:
    """The configuration that loads a 4-bit bitsandbytes checkpoint, from what its config.json says.

    Args:
        saved: the fields of a `BitsAndBytesConfig`.

    Example:
        >>> from_bitsandbytes({"quant_method": "bitsandbytes", "load_in_4bit": True})
    """
    skip = saved.get("llm_int8_skip_modules") or ("lm_head",)
    storage = getattr(torch, str(saved.get("bnb_4bit_quant_storage")).removeprefix("torch."), torch.uint8)
    return _FromBitsandbytes(skip, bool(saved.get("bnb_4bit_use_double_quant")), storage)


def _fits(module: nn.Module) -> bool:
    """Whether the module can become a `Linear4bit`; transformers' `Conv1D` is a linear layer stored transposed."""
    return plain_linear(module) or type(module) is Conv1D


def _features(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer or a `Conv1D`."""
    if type(module) is Conv1D:
        return module.nf, module.nx
    return module.out_features, module.in_features


def _module_of(model: nn.Module, name: str) -> nn.Module:
    """The module that holds a parameter of this name."""
    return model.get_submodule(name.rpartition(".")[0])


def _first(value: Any) -> torch.Tensor:
    """transformers collects the tensors of one name in a list."""
    return value[0] if isinstance(value, list) else value


def _return_memory() -> None:
    """Give the operating system what has been freed.

    The C library keeps the holes that dense weights leave between 4-bit ones: loading would in the end take nearly as
    much memory as the dense model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def _hold(module: nn.Module, packed: Packed4bit) -> nn.Parameter:
    """Make a linear layer one in 4 bits, in place; returns its weight."""
    module.out_features, module.in_features = _features(module)
    module.__class__ = Linear4bit
    module._set_packed(packed)
    for tensor in (module.weight, *module.buffers(recurse=False)):
        tensor._is_hf_initialized = True  # or transformers would fill it with random numbers
    return module.weight


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):
    """Quantizes each weight as transformers reads it."""

    requires_calibration = False

    def __init__(self, quantization_config: Config4bit, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._targets: set[int] = set()
        self._errors: list[InvalidInput] = []
        self._fused = False
        self._freed = 0

    # --- what transformers asks

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise InvalidInput("device_map: a 4-bit model cannot be offloaded to disk; use GPUs and the CPU")

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        # The weights are not tied yet, and only their names say that they will be.
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        tied = {id(model.get_parameter(name)) for name in {*tied, *tied.values()}}

        def fits(module: nn.Module) -> bool:
            return _fits(module) and id(module.weight) not in tied

        self._targets = self._find_targets(model, fits)

    def _find_targets(self, model: nn.Module, fits: Callable[[nn.Module], bool]) -> set[int]:
        """ids of the modules that will be in 4 bits."""
        chosen, _ = choose_targets(model, self.quantization_config.skip, fits)
        return {id(module) for _, module in chosen}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return param_name.endswith(".weight") and id(_module_of(model, param_name)) in self._targets

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Bytes a weight, from which transformers plans the devices."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        config = self.quantization_config
        return 0.5 + (1 + 4 / 256 if config.double_quant else 4) / config.block_size

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._errors:
            more = f" (and {len(self._errors) - 1} more such layers)" if len(self._errors) > 1 else ""
            raise InvalidInput(f"{self._errors[0]}{more}") from self._errors[0]
        layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
        if not layers:
            raise InvalidInput("Config4bit: the checkpoint has no weight for any of the layers that were to be 4-bit")
        if any(layer.weight.is_meta for layer in layers):
            raise InvalidInput("device_map: the model does not fit, and a 4-bit model cannot be offloaded to disk")
        _return_memory()
        self._forget_conversions(model)
        model.config.quantization_config = None  # the loading configuration, which is not what gets saved
        left = [name for name, module in model.named_modules() if _fits(module)]
        note_in_config(model, layers[0].quant_type, layers[0].double_quant, left)
        # Without `is_loaded_in_4bit`: where a model has it, transformers imports bitsandbytes to count parameters.
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return to_dense(model, dtype)

    # --- what the operations ask

    def quantize(self, model: nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Put a dense weight into its layer; returns what the layer then holds under that name."""
        if not self.param_needs_quantization(model, name):
            return weight
        module, config = _module_of(model, name), self.quantization_config
        if isinstance(module, Linear4bit):
            return module.weight  # a layer that the checkpoint has under two names
        if weight.shape != module.weight.shape:
            self._targets.discard(id(module))
            return weight  # transformers reports the mismatch
        try:
            check_weight("Config4bit", name.removesuffix(".weight"), weight)
        except InvalidInput as error:
            weight = self._refuse(error, weight.shape, weight.device)
        self._freed += weight.nbytes
        if self._freed > _TRIM_EVERY:
            self._freed = 0
            _return_memory()
        weight = weight.T.contiguous() if type(module) is Conv1D else weight
        return _hold(module, quantize_4bit(weight, config.block_size, config.quant_type, config.double_quant))

    def _refuse(self, error: InvalidInput, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Zeros in place of a weight that cannot be had; the error is raised once all weights have been read.

        Raised here it would become a line of a table that transformers prints.
        """
        self._errors.append(error)
        return torch.zeros(shape, device=device)

    def note_fused(self) -> None:
        """The checkpoint holds some weight as a part of a larger one."""
        self._fused = True

    def _forget_conversions(self, model: nn.Module) -> None:
        """Save under the model's own names where 4-bit weights cannot be put together to what the checkpoint held."""
        conversions = getattr(model, "_weight_conversions", None)
        if conversions:
            ours = (_Quantize, _Read)
            model._weight_conversions = [
                each
                for each in conversions
                if not isinstance(each, WeightConverter)
                or not (self._fused or any(isinstance(operation, ours) for operation in each.operations))
            ]


class _Quantize(ConversionOps):
    """The step in transformers' loading that quantizes."""

    def __init__(self, hf_quantizer: _Quantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], model: nn.Module, **kwargs: Any) -> dict:
        if list(input_dict) != list(target_patterns):
            self.hf_quantizer.note_fused()
        return {name: self.hf_quantizer.quantize(model, name, _first(value)) for name, value in input_dict.items()}


@register_quantizer(_FROM_BITSANDBYTES)
class _Reader(_Quantizer):
    """Takes the layers of a bitsandbytes checkpoint as they are."""

    def __init__(self, quantization_config: Config4bit, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True  # transformers saw no such entry: `load_4bit` has taken it out of the model's config

    def _find_targets(self, model: nn.Module, fits: Callable[[nn.Module], bool]) -> set[int]:
        # Only for planning devices; which layers are 4-bit is seen as they come.
        skip, storage = self.quantization_config.skip, self.quantization_config.storage
        found = [module for name, module in model.named_modules() if fits(module) and not skipped(name, skip)]
        if storage.is_floating_point:
            for module in found:  # older versions of transformers cast floats to what the skeleton has
                module.weight = nn.Parameter(module.weight.to(storage), requires_grad=False)
        return {id(module) for module in found}

    def get_weight_conversions(self) -> list[WeightConverter]:
        sources = [*(f"weight{part}" for part in _PARTS), "weight"]
        return [WeightConverter(source_patterns=sources, target_patterns="weight", operations=[_Read(self)])]

    def take(self, model: nn.Module, name: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """Put what a checkpoint has of one weight into its layer; returns what the layer holds under that name."""
        if set(parts) == {""} and parts[""].is_floating_point():
            return self._dense(model, name, parts[""])
        module = _module_of(model, name)
        if isinstance(module, Linear4bit):
            return module.weight
        if not _fits(module):
            self._errors.append(InvalidInput(f"{name} is 4-bit in the checkpoint, and {type(module).__name__} is not"))
            return parts[""]
        try:
            missing = missing_parts(parts, "nf4", double_quant=self.quantization_config.double_quant)
            if missing:
                raise InvalidInput(f"{name}: the checkpoint has no {', '.join(name + part for part in missing)}")
            return _hold(module, decode_state(name, parts, _features(module)))
        except InvalidInput as error:
            device = next(iter(parts.values())).device
            return _hold(module, quantize_4bit(self._refuse(error, _features(module), device)))

    def _dense(self, model: nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
        # transformers casts no weight that passes through an operation; what it keeps in float32 was saved so.
        keep = [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
        keep += getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        if skipped(name, keep):
            return weight
        expected = self.param_needs_quantization(model, name)
        return weight.to(model.dtype if expected else model.get_parameter_or_buffer(name).dtype)


class _Read(ConversionOps):
    """The step in transformers' loading that puts the parts of a 4-bit weight together."""

    def __init__(self, hf_quantizer: _Reader):
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict) -> _Read:
        return self  # transformers copies it for every weight, and with it would go the quantizer that gathers errors

    def convert(self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, **kwargs: Any) -> dict:
        parts = {key.removeprefix("weight"): _first(value) for key, value in input_dict.items()}
        return {full_layer_name: self.hf_quantizer.take(model, full_layer_name, parts)}


def to_dense(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn a model's `Linear4bit` layers back into `nn.Linear`, in place, with the weights that they decode to.

    Args:
        model: a model without adapters; for one with adapters there is `pyfinetune.hf.merge.merge_dense`.
        dtype: float32, float16 or bfloat16, to which the whole model is brought; by default a Hugging Face model
            stays in its dtype, and in other models each weight gets the one that it had.

    Returns:
        The model itself.

    Raises:
        InvalidInput: the model carries adapters.

    Example:
        >>> to_dense(pf.load_4bit("path/to/model")).save_pretrained("path/to/copy")
    """
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise InvalidInput("to_dense: the model carries adapters; pyfinetune.hf.merge.merge_dense takes them along")
    decode_rest(model, dtype or getattr(model, "dtype", None))
    forget_quantization(model)
    return in_dtype(model, dtype)


def decode_rest(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Every `Linear4bit` of the model as an `nn.Linear`."""
    for layer in [module for module in model.modules() if isinstance(module, Linear4bit)]:
        set_dense(layer, layer.dequantize(dtype), layer.bias)


def set_dense(layer: Linear4bit, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Make a 4-bit layer an `nn.Linear` with this weight and bias, in place."""
    for name in list(layer._buffers):
        del layer._buffers[name]
    for name in ("quant_type", "block_size", "nested_block_size", "dtype_of_weight"):
        delattr(layer, name)
    layer.__class__ = nn.Linear
    layer.weight = nn.Parameter(weight.detach())
    layer.bias = None if bias is None else nn.Parameter(bias.detach().to(weight.dtype))


def forget_quantization(model: nn.Module) -> None:
    """Take away the marks of a quantized model, so that it is saved as a plain one."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    elif getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        del model.config.quantization_config


def in_dtype(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The model with everything in one dtype, if one was asked for that it does not have."""
    return model if dtype in (None, getattr(model, "dtype", None)) else model.to(dtype)
