"""What `pyfinetune export` prints: sizes, what was proved, and the commands that use it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from pyfinetune.train.export.exporting import Exported


def export_lines(result: Exported) -> list[str]:
    """The result of an export, for people.

    Args:
        result: what `export` returned.

    Returns:
        Lines of text.

    Example:
        >>> print("\\n".join(export_lines(export(Request("runs/first")))))  # doctest: +SKIP
    """
    size = sum(entry["bytes"] for entry in result.weights.values())
    count = len(result.weights)
    lines = [
        f"exported: {result.output_dir} ({result.to}: {result.dtype}), {_size(size)} in {count} file{'s'[: count != 1]}"
        " of weights",
        f"proved, read back from the disk, on {result.rows}:",
        *(f"  {_check_line(check)}" for check in result.checks),
        *(f"  not compared: {note}" for note in result.notes),
        "use it:",
        *(f"  {line}" for line in commands(result)),
    ]
    return lines


def commands(result: Exported) -> list[str]:
    """Command lines that use an export.

    Args:
        result: what `export` returned.

    Returns:
        Commands, with what they need behind them.

    Example:
        >>> commands(Exported("out", "gguf", "", weights={"m.gguf": {}}))
        ['llama-cli -m out/m.gguf']
    """
    folder = shlex.quote(result.output_dir)
    if result.to == "gguf":
        path = Path(result.output_dir) / next(name for name in result.weights if name.endswith(".gguf"))
        return [f"llama-cli -m {shlex.quote(str(path))}"]
    chat = f"pyfinetune chat {folder}"
    if result.to == "adapter":
        return [chat, f"`transformers serve` takes no adapter: export {folder} --to merged for it"]
    needs = " bitsandbytes" if result.to == "merged-4bit" else ""
    path = shlex.quote(str(Path(result.output_dir).resolve()))
    return [chat, f"transformers serve {path}    # pip install 'transformers[serving]'{needs}"]


def _check_line(check: dict[str, Any]) -> str:
    what = check["what"]
    if what.startswith("exact logits"):
        return f"{what} off by at most {check['error']:.1e} of their norm, allowed {check['allowed']:.1e}"
    if "bit by bit" in what or ("tensors" in check and check.get("allowed") == 0.0):
        unit = "rows" if "rows" in check else "tensors"
        return f"{what}: all {check[unit]} {unit} equal"
    if "trained_model" in check and "error" in check:
        return (
            f"{what}: off by at most {check['error']:.1e} of their norm, allowed {check['allowed']:.1e}"
            f" (the trained model itself {check['trained_model']:.1e})"
        )
    if "texts" in check:
        return f"{what}: {check['equal']} of {check['texts']} equal" + (
            "" if check["equal"] == check["texts"] else ", the others part where two tokens are within the errors"
        )
    if "added_loss" in check:
        by_base = check["added_by_quantizing_the_base"]
        beside = "" if by_base is None else f"; quantizing the base adds {by_base:+.4f}"
        return (
            f"loss {check['loss']:.4f} becomes {check['loss_of_export']:.4f}, perplexity {check['perplexity']:.3f}"
            f" becomes {check['perplexity_of_export']:.3f}{beside}, {check['allowed']:.4f} allowed"
        )
    if "same_most_likely" in check:
        texts = (
            f"; greedy text: {check['greedy_tokens_equal']} of {check['greedy_tokens']} tokens before it parts"
            if check["greedy_texts"]
            else ""
        )
        return (
            f"{check['same_most_likely']:.1%} of {check['positions']:,} positions have the same most likely token,"
            f" logits differ by up to {check['largest_difference']:.2e}{texts}"
        )
    if "export" in check:
        return f"perplexity {check['trained_model']:.3f} becomes {check['export']:.3f}"
    if "types" in check:
        steps = check["error_in_steps"]
        return f"{what}: {check['tensors']}, " + (f"off by at most {steps:.2f} steps" if steps else "exact")
    count = next((check[key] for key in ("keys", "tokens") if key in check), "")
    return f"{what}: {count} equal"


def _size(count: int) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
