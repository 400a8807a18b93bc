"""Cases of a whole training step: a random model with adapters, forward and backward, as PEFT runs it and patched."""

from __future__ import annotations

import functools

import torch

from pyfinetune.bench import step_models
from pyfinetune.bench.breakdown import ATTENTION, HEAD, LINEAR
from pyfinetune.bench.harness import OURS, Case, Passes, Setup, Target, Verdict
from pyfinetune.bench.shapes import Sizes, short
from pyfinetune.bench.step_models import Recipe

# The shapes of a 135M-parameter Llama, and of one small enough for a quick look.
_FULL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
_QUICK = _FULL | {"vocab_size": 1024, "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2}
_QUICK |= {"num_attention_heads": 3, "num_key_value_heads": 1}


def packed_batch(documents: list[int], vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    """One row of packed documents; a single one needs no positions."""
    ids = torch.randint(vocabulary, (1, sum(documents)), device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in documents])[None]
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}


def _forward(model: torch.nn.Module, batch: dict[str, torch.Tensor], _number: int = 0) -> torch.Tensor:
    with torch.enable_grad():
        return model(**batch).loss


def _backward(model: torch.nn.Module, _number: int, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, [parameter for parameter in model.parameters() if parameter.requires_grad])


def _step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The loss and every adapter's gradient."""
    loss = _forward(model, batch)
    return [loss.detach(), *_backward(model, 0, loss)]


def _error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Norm of the difference over all gradients, relative to theirs."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found[1:], exact[1:], strict=True))
    return (difference / sum(float(b.double().square().sum()) for b in exact[1:])) ** 0.5


def build(device: torch.device, recipe: Recipe, documents: list[int]) -> Setup:
    """The step of every way to train such a model; all have the same weights and adapters."""
    ways = step_models.make(recipe, device)
    vocabulary = recipe.vocabulary
    batch = packed_batch(documents, vocabulary, device)
    small = packed_batch([min(length, 64) for length in documents[:2]], vocabulary, device)
    exact = _step(ways.exact, small)
    ways.exact = None  # it is the largest of them
    plain = _step(ways.models[ways.plain], small)
    usual, eps = _error(plain, exact), torch.finfo(recipe.dtype).eps

    def judge(name: str) -> Verdict:
        found = plain if name == ways.plain else _step(ways.models[name], small)
        error, gap = _error(found, exact), abs(float(found[0] - exact[0]))
        ok = error <= 2 * usual + eps and gap <= 1.5 * abs(float(plain[0] - exact[0])) + eps
        detail = f"gradients off by {error:.2%} of their norm, {ways.plain} by {usual:.2%}"
        return Verdict(ok, detail + (f"; {ways.swapped} modules swapped" if name == OURS else ""))

    setup = Setup({}, {}, dict(ways.missing))
    for name, model in ways.models.items():
        setup.calls[name] = Passes(functools.partial(_forward, model, batch), functools.partial(_backward, model))
        setup.check[name] = functools.partial(judge, name)
        setup.resident_mb[name] = step_models.megabytes(model)
    return setup


def _work(recipe: Recipe, documents: list[int]) -> dict[str, float]:
    """Operations that no implementation can do without, by where they are."""
    model, tokens = recipe.dimensions, sum(documents)
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    layer = 2 * model.hidden * (queries + keys) + 3 * model.hidden * model.inner
    # Scores and values, once forward and two and a half times backward, half of each masked.
    scores = 7.0 * queries * sum(length**2 for length in documents)
    return {
        LINEAR: 4.0 * tokens * layer * model.layers,
        HEAD: 4.0 * tokens * model.vocab * model.hidden,
        ATTENTION: scores * model.layers,
    }


def case_of(recipe: Recipe, documents: list[int], target: Target | None = None, label: str | None = None) -> Case:
    """A step of the recipe over one row of packed documents."""
    work = _work(recipe, documents)
    if len(documents) == 1:
        packed = f"{documents[0]} tokens"
    elif len(set(documents)) == 1:
        packed = f"{len(documents)} x {documents[0]} tokens packed"
    else:
        packed = f"{sum(documents)} tokens in {len(documents)} documents packed"
    method = {"lora": "LoRA", "qlora": "QLoRA", "dora": "DoRA"}[recipe.method]
    name = f"training step, {label or recipe.label}, {method} r {recipe.rank}, {short(recipe.dtype)}, {packed}"
    sizes = {sum(documents), recipe.dimensions.hidden, recipe.dimensions.inner}
    return Case(
        "step",
        name,
        functools.partial(build, recipe=recipe, documents=documents),
        flops=sum(work.values()),
        dtype=recipe.dtype,
        target=target,
        tokens=sum(documents),
        parts=work,
        vocabulary=None if recipe.vocabulary in sizes else recipe.vocabulary,
    )


def _case(documents: int, length: int, target: Target | None, shapes: dict[str, int] = _FULL) -> Case:
    recipe = Recipe("llama", {"model_type": "llama", **shapes, "tie_word_embeddings": True})
    return case_of(recipe, [length] * documents, target, f"Llama {'135M' if shapes is _FULL else 'tiny'}")


def cases(quick: bool = False) -> list[Case]:
    """The rows of the table; `quick` is smaller, and without targets, which are stated for the full shapes."""
    if quick:
        return [_case(1, 128, None, _QUICK), _case(4, 64, None, _QUICK)]
    return [
        _case(1, 1024, Target(1.9, 1.7)),
        _case(4, 256, Target(2.2, 1.9)),
        _case(8, 256, Target(3.0, 2.6)),
        _case(16, 256, Target(4.5, 4.0)),
    ]


def shaped(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """Without rows: a whole model is asked for by `--model`, which says how it is trained, too."""
    return []


def requested(model: str, method: str, packed: bool, layers: int | None, sizes: Sizes, dtype: torch.dtype) -> Case:
    """The step that `pyfinetune bench step --model` asks for.

    Args:
        model: a name of `shapes.MODELS`, a `config.json`, its folder, or a model's name.
        method: "lora", "qlora" or "dora".
        packed: in documents of 256 tokens instead of one.
        layers: so many of the model's layers, or None for all.
        sizes: how many tokens.
        dtype: of the model; the adapters are float32, as PEFT makes them.

    Raises:
        UserError: the model or the method is not known, or does not fit into memory.
    """
    recipe = step_models.recipe_of(model, method, layers, dtype)
    documents = sizes.documents if packed else [sizes.tokens]
    return case_of(recipe, documents)
