"""The folder of an export: made aside, sealed with its manifest, and given its name only when everything is proved."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyfinetune.errors import UserError
from pyfinetune.train.checkpoints import sync
from pyfinetune.train.data.files import hash_files
from pyfinetune.train.saved import ADAPTER, RECORD, WEIGHTS, Saved, head_config

_ADAPTER_FILES = (WEIGHTS, ADAPTER)


@contextlib.contextmanager
def staged(final: Path) -> Iterator[Path]:
    """A folder to write to, which takes the name of the export when the block ends, and vanishes when it fails.

    Args:
        final: the export's folder; an earlier export there is replaced.

    Returns:
        The folder beside it.

    Raises:
        UserError: something else is there.

    Example:
        >>> with staged(Path("out-merged")) as folder:  # doctest: +SKIP
        ...     model.save_pretrained(folder)
    """
    check_place(final)
    stage, aside = (final.parent / f".{final.name}.{word}" for word in ("exporting", "replaced"))
    final.parent.mkdir(parents=True, exist_ok=True)
    if aside.exists() and not final.exists():
        os.rename(aside, final)  # a killed export had put it there
    shutil.rmtree(stage, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        sync(stage)
        if final.exists():
            os.rename(final, aside)
        os.rename(stage, final)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def check_place(final: Path) -> None:
    """Refuse a folder that holds anything but an earlier export.

    Args:
        final: where the export is to go.

    Raises:
        UserError: it is a file, or a folder with other content.

    Example:
        >>> check_place(Path("no-such-folder"))
    """
    if final.exists() and not final.is_dir():
        raise UserError(f"--output-dir {final}: is a file", fix="give the path of a folder, existing or not")
    if final.is_dir() and any(final.iterdir()) and not (final / RECORD).is_file():
        raise UserError(
            f"--output-dir {final}: is not empty, and holds no earlier export",
            fix="give another folder with --output-dir",
        )


def copy_adapter(saved: Saved, stage: Path) -> None:
    """Write an adapter's files, its base named so that it is found from any folder.

    Args:
        saved: the adapter.
        stage: where to.

    Example:
        >>> copy_adapter(find_saved("runs/first"), Path("out"))  # doctest: +SKIP
    """
    for name in _ADAPTER_FILES:
        shutil.copyfile(saved.folder / name, stage / name)
    beside = head_config(saved)
    if beside is not None:
        shutil.copyfile(beside, stage / beside.name)
    path = stage / ADAPTER
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = str(Path(saved.base).resolve()) if Path(saved.base).is_dir() else saved.base
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_model(stage: Path, model: Any, tokenizer: Any) -> None:
    """Write a whole model and its tokenizer.

    Args:
        stage: where to.
        model: plain, or in 4 bits.
        tokenizer: with its chat template.

    Example:
        >>> write_model(Path("out"), model, tokenizer)  # doctest: +SKIP
    """
    model.config.use_cache = True
    model.save_pretrained(stage)
    tokenizer.save_pretrained(stage)


def write_card(stage: Path, saved: Saved, form: str, details: str) -> None:
    """Write the export's model card.

    Args:
        stage: where to.
        saved: what was exported.
        form: `adapter`, `merged`, `merged-4bit` or `gguf`.
        details: a sentence on the weights.

    Example:
        >>> write_card(Path("out"), saved, "merged", "bfloat16 weights.")  # doctest: +SKIP
    """
    from huggingface_hub import ModelCardData

    base = saved.base or (saved.record or {}).get("model", {}).get("name_or_path") or saved.folder.name
    relation = {"adapter": "adapter", "merged": "finetune", "merged-4bit": "quantized", "gguf": "quantized"}[form]
    library = {"adapter": "peft", "gguf": "gguf"}.get(form, "transformers")
    facts = ModelCardData(
        base_model=base, library_name=library, base_model_relation=relation, tags=["pyfinetune", form]
    )
    lines = [
        f"---\n{facts.to_yaml()}\n---",
        f"# {form} export",
        f"Fine-tuned from `{base}`. {details}",
        f"`{RECORD}` says what was compared with the trained model before this folder got its name, and how it was.",
    ]
    (stage / "README.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def weights_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file of weights.

    Args:
        folder: of an export.

    Returns:
        File name to `bytes` and `sha256`.

    Example:
        >>> weights_of(Path("no-such-folder"))
        {}
    """
    found = sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])
    return {path.name: {"bytes": path.stat().st_size, "sha256": hash_files([path])} for path in found}
