"""What is trained in place of a model's own weights: the adapter that a run's `method` asks PEFT for.

    RunConfig, model -> add_method -> PEFT model

LoRA and its kin are `model.add_adapters`; here are the methods beside it. Prompt and prefix tuning learn virtual tokens
that stand before each row, (IA)^3 learns scales of keys, values and feed-forward inputs, and an adaption prompt
(LLaMA-Adapter) adds to each attention layer what a few learned tokens would have given it, behind a gate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pyfinetune.errors import UserError
from pyfinetune.train.config import ADAPTER_LEN, LORA_METHODS, RunConfig
from pyfinetune.train.model import add_adapters, check_targets, linear_names, whole_modules, wrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SCALED = ("k_proj", "v_proj", "down_proj")  # by (IA)^3, in models that PEFT does not know by name


def add_method(
    model: PreTrainedModel, config: RunConfig, task_type: str | None = "CAUSAL_LM", fresh: Sequence[str] = ()
) -> Any:
    """Freeze a model and add what the run's method trains; `full` leaves it as it is.

    Args:
        model: what `model.load_model` returned, or a model on the meta device.
        config: the run's configuration.
        task_type: PEFT's name of the task.
        fresh: paths of modules that no checkpoint has, which are trained whole.

    Returns:
        The PEFT model.

    Raises:
        UserError: the method does not fit the model.

    Example:
        >>> add_method(model, config).print_trainable_parameters()  # doctest: +SKIP
    """
    if config.method == "full":
        return model
    if config.method in LORA_METHODS:
        return add_adapters(
            model,
            r=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.target_modules,
            rslora=config.rslora,
            dora=config.dora,
            task_type=task_type,
            fresh=fresh,
        )
    settings = _SETTINGS[config.method](model, config, task_type)
    if hasattr(settings, "modules_to_save"):
        settings.modules_to_save = whole_modules(model, task_type, fresh)
    try:
        adapted = wrap(model, settings)
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"method: {config.method} does not fit a {model.config.model_type}: {' '.join(str(error).split())}",
            fix="set method: lora, which fits every model with linear layers",
        ) from error
    if config.method == "prefix_tuning":
        _begin_prefix(adapted, config)
    return adapted


def has_virtual_tokens(model: Any) -> bool:
    """Whether a model puts virtual tokens of its own before each row.

    Args:
        model: any model, with or without adapters.

    Returns:
        True for PEFT's prompt and prefix tuning.

    Example:
        >>> has_virtual_tokens(torch.nn.Linear(1, 1))
        False
    """
    from peft import PeftModel

    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


@contextlib.contextmanager
def before_training(model: Any) -> Iterator[None]:
    """Let a model answer as its base does: virtual tokens that have learned nothing would only disturb it.

    The other methods begin as no change at all, and are left on.

    Args:
        model: a model before its first step.

    Example:
        >>> with before_training(model):  # doctest: +SKIP
        ...     trainer.evaluate()
    """
    with model.disable_adapter() if has_virtual_tokens(model) else contextlib.nullcontext():
        yield


def _prompt(model: PreTrainedModel, config: RunConfig, task_type: str) -> Any:
    """Embeddings of the given text, or of tokens drawn from the vocabulary, to begin with."""
    from peft import PromptTuningConfig, PromptTuningInit

    text = config.prompt_tuning_init_text
    given = {"prompt_tuning_init_text": text, "tokenizer_name_or_path": config.model_name_or_path} if text else {}
    return PromptTuningConfig(
        task_type=task_type,
        num_virtual_tokens=config.virtual_tokens,
        prompt_tuning_init=PromptTuningInit.TEXT if text else PromptTuningInit.SAMPLE_VOCAB,
        **given,
    )


def _prefix(model: PreTrainedModel, config: RunConfig, task_type: str) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(task_type=task_type, num_virtual_tokens=config.virtual_tokens)


def _begin_prefix(model: Any, config: RunConfig) -> None:
    """Set a prefix to the keys and values of real tokens; random ones, of no size that the model knows, learn slowly.

    Source: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (2021), section 7.4.
    """
    base, weight = model.get_base_model(), model.prompt_encoder[model.active_adapter].embedding.weight
    if base.device.type == "meta" or base.config.is_encoder_decoder or not base.can_generate():
        return
    count = config.virtual_tokens
    if config.prompt_tuning_init_text:
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(config.model_name_or_path)(config.prompt_tuning_init_text)["input_ids"]
        ids = torch.tensor((found * count)[:count])
    else:
        ids = torch.randint(base.get_input_embeddings().num_embeddings, (count,))
    was_training = base.training
    base.eval()
    with torch.no_grad():
        layers = base(input_ids=ids[None].to(base.device), use_cache=True).past_key_values.layers
        try:
            states = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
            flat = states.permute(3, 0, 1, 2, 4).reshape(weight.shape)  # [tokens, layers * 2 * heads * head_dim]
        except RuntimeError as error:
            raise UserError(
                f"method: prefix_tuning does not fit a {base.config.model_type}: its layers keep keys and values of"
                " different shapes",
                fix="set method: prompt_tuning or lora",
            ) from error
        weight.copy_(flat)
    base.train(was_training)


def _ia3(model: PreTrainedModel, config: RunConfig, task_type: str) -> Any:
    from peft import IA3Config
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

    targets, known = config.target_modules, model.config.model_type in KNOWN
    if isinstance(targets, list):
        check_targets(model, targets)
    if targets == "all-linear":
        targets = None if known else _usual(model)
    feedforward = None if known else [name for name in targets or () if name.rsplit(".", 1)[-1] == _SCALED[-1]]
    return IA3Config(task_type=task_type, target_modules=targets, feedforward_modules=feedforward)


def _usual(model: PreTrainedModel) -> list[str]:
    names = linear_names(model)
    if not set(_SCALED) <= set(names):
        raise UserError(
            f"method: ia3: where keys and values are is not known of a {model.config.model_type}",
            fix=f"set target_modules to a list out of {', '.join(names)}",
        )
    return list(_SCALED)


def _adaption_prompt(model: PreTrainedModel, config: RunConfig, task_type: str) -> Any:
    from peft import AdaptionPromptConfig

    layers = model.config.get_text_config().num_hidden_layers
    if (config.adapter_layers or 1) > layers:
        raise UserError(
            f"adapter_layers: {config.adapter_layers} is more than the {layers} layers of the model",
            fix=f"set adapter_layers: {layers} or less, or leave it out for all",
        )
    return AdaptionPromptConfig(
        task_type=task_type,
        adapter_len=config.adapter_len or ADAPTER_LEN,
        adapter_layers=config.adapter_layers or layers,
    )


_SETTINGS = {
    "prompt_tuning": _prompt,
    "prefix_tuning": _prefix,
    "ia3": _ia3,
    "adaption_prompt": _adaption_prompt,
}
