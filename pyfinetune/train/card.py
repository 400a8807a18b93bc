"""The model card: README.md of the output folder, with the front matter that the hub and PEFT read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyfinetune.train.config import ADAPTER_LEN, LORA_METHODS, VIRTUAL_TOKENS
from pyfinetune.train.heads import HEADS, Head

_PACKAGES = ("pyfinetune", "torch", "transformers", "peft", "datasets", "tokenizers")


def model_card(record: dict[str, Any]) -> str:
    """Write a run's model card.

    Args:
        record: the content of `run.json`, with its result.

    Returns:
        Markdown with YAML front matter.

    Example:
        >>> model_card(record).splitlines()[0]  # doctest: +SKIP
        '---'
    """
    config, data, model, result = (record[key] for key in ("config", "data", "model", "result"))
    name, base = Path(config["output_dir"]).name, model["name_or_path"]
    train = data["train"]
    head = HEADS[record.get("head", {}).get("kind", "causal_lm")]
    lines = [
        f"---\n{_front_matter(record, name)}\n---",
        f"# {_plain(name)}",
        f"{_what(config)} {_code(base)}, trained with pyfinetune ({config['method']}).",
        "## Use",
        _use(config, head, base),
        *(["The base was in 4 bits (NF4) while the adapter learned."] if config["method"] == "qlora" else []),
        "## Training data",
        f"{_sources(config)}: {train['examples']:,} examples, {train['tokens']:,} tokens, of which"
        f" {train['learned_tokens']:,} are learned, as {train['rows']:,} rows of up to {config['max_length']:,} tokens"
        f" ({data['format']}; SHA-256 `{data['sha256']}`).",
        *_cut(train),
        "## Results",
        _results(record),
        "## Versions",
        "\n".join(f"- {name} {record['versions'][name]}" for name in _PACKAGES if name in record["versions"]),
        f"Trained for {result['steps']:,} steps on {_plain(record['device'])}, seed {record['seed']}. `run.json` holds"
        " every setting; `pyfinetune train --from run.json` repeats the run.",
    ]
    return "\n\n".join(lines) + "\n"


def _what(config: dict[str, Any]) -> str:
    """What was trained, up to the model's name."""
    method, virtual = config["method"], config.get("num_virtual_tokens") or VIRTUAL_TOKENS
    if method in LORA_METHODS:
        kind = "DoRA" if config.get("use_dora") or method == "dora" else "LoRA"
        stable = "rank-stabilised " if config.get("use_rslora") or method == "rslora" else ""
        return f"A {stable}{kind} adapter (rank {config['lora_r']}) for"
    return {
        "full": "All weights of",
        "prompt_tuning": f"A learned prompt of {virtual} virtual tokens for",
        "prefix_tuning": f"A learned prefix of {virtual} virtual tokens for",
        "ia3": "Learned scales of keys, values and feed-forward inputs, (IA)^3, for",
        "adaption_prompt": f"Adaption prompts of {config.get('adapter_len') or ADAPTER_LEN} tokens for",
    }[method]


def _use(config: dict[str, Any], head: Head, base: str) -> str:
    """Lines of Python that load the result."""
    name, folder = head.auto_class, repr(config["output_dir"])
    last = f"tokenizer = AutoTokenizer.from_pretrained({folder})"
    # transformers itself takes LoRA's folders, PEFT all of its own.
    is_plain = config["method"] == "full" or config["method"] in LORA_METHODS
    if config["method"] != "full" and head.kind not in ("causal_lm", "seq2seq_lm"):
        lines = [
            "from peft import PeftModel",
            f"from transformers import AutoConfig, {name}, AutoTokenizer",
            f"config = AutoConfig.from_pretrained({folder})  # the head's size and the names of its classes",
            f"base = {name}.from_pretrained({base!r}, config=config)",
            f"model = PeftModel.from_pretrained(base, {folder})",
        ]
    elif is_plain:
        lines = [f"from transformers import {name}, AutoTokenizer", f"model = {name}.from_pretrained({folder})"]
    else:
        peft_class = name.replace("Auto", "AutoPeft", 1)
        lines = [f"from peft import {peft_class}", "from transformers import AutoTokenizer"]
        lines.append(f"model = {peft_class}.from_pretrained({folder})")
    return "\n".join(["```python", *lines, last, "```"])


def _front_matter(record: dict[str, Any], name: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    config, result = record["config"], record["result"]
    base, method = record["model"]["name_or_path"], config["method"]
    full = method == "full"
    dataset = config["dataset_name"] or ", ".join(Path(file).name for file in _files(config))
    pipeline = HEADS[record.get("head", {}).get("kind", "causal_lm")].pipeline
    metrics = {"loss": result["eval_loss"], "perplexity": result["perplexity"]}
    metrics |= {metric: score["value"] for metric, score in (result.get("metrics") or {}).items()}
    metrics = {metric: value for metric, value in metrics.items() if value is not None}
    evaluated = [
        EvalResult(pipeline, config["dataset_name"] or "custom", f"{dataset} (held out)", metric, value)
        for metric, value in metrics.items()
    ]
    tags = ["pyfinetune", method, *(["lora"] if method in LORA_METHODS else [])]
    tags += [] if full else [f"base_model:adapter:{base}"]
    facts = ModelCardData(
        base_model=base,
        library_name="transformers" if full else "peft",
        pipeline_tag=pipeline,
        tags=list(dict.fromkeys(tags)),
        datasets=[config["dataset_name"]] if _on_the_hub(config["dataset_name"]) else None,
        metrics=list(metrics) if evaluated else None,
        model_name=name,
        eval_results=evaluated or None,
    )
    return facts.to_yaml()


def _on_the_hub(dataset_name: str | None) -> bool:
    return dataset_name is not None and not Path(dataset_name).exists()


def _files(config: dict[str, Any]) -> list[str]:
    given = config["train_file"] or []
    return [given] if isinstance(given, str) else given


def _sources(config: dict[str, Any]) -> str:
    return ", ".join(_code(source) for source in [*_files(config), *filter(None, [config["dataset_name"]])])


def _cut(train: dict[str, int]) -> list[str]:
    if not (train["cut_short"] or train["dropped"]):
        return []
    return [f"{train['cut_short']:,} answers were cut short, and {train['dropped']:,} rows left out, by that length."]


def _results(record: dict[str, Any]) -> str:
    result = record["result"]
    if result["eval_loss"] is None:
        return "Nothing was held out, so nothing was measured."
    rows = ["| held-out rows | base model | this model |", "|---|---|---|"]
    unit = record.get("head", {}).get("unit", "token")
    pairs = ((f"loss per {unit}", "eval_loss_before", "eval_loss"), ("perplexity", "perplexity_before", "perplexity"))
    for words, before, after in pairs:
        if result[after] is None:
            continue
        first = "" if result[before] is None else f"{result[before]:.4f}"
        rows.append(f"| {words} | {first} | {result[after]:.4f} |")
    metrics, floor = result.get("metrics") or {}, result.get("floor") or {}
    if metrics:
        rows += ["", f"| held-out rows | floor: {_plain(floor['what'])} | this model | 95 % |", "|---|---|---|---|"]
        rows += [
            f"| {name} | {floor[name]:.3f} | {score['value']:.3f} | {score['low']:.3f} to {score['high']:.3f} |"
            for name, score in metrics.items()
        ]
    elif "loss" in floor:
        rows += ["", f"Floor: a loss of {floor['loss']:.4f}, guessing {_plain(floor['what'])}."]
    return "\n".join(rows)


def _plain(text: str) -> str:
    """Text on one line, in which nothing is markup."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|!" else c for c in " ".join(text.split()))


def _code(text: str) -> str:
    """Text on one line as code, whatever is in it."""
    line = " ".join(str(text).split())
    return f"`` {line} ``" if "`" in line else f"`{line}`"
