"""Shapes that cases are made for: those of the usual models, or a plain M,N,K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyfinetune.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
TOKENS, QUICK_TOKENS, DOCUMENT = 1024, 128, 256
_MODEL = "model:"


def short(dtype: torch.dtype) -> str:
    """The dtype's name in tables and on the command line."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def dtype_named(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        UserError: there is none.
    """
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class Model:
    """What of a causal language model its ops' shapes follow from."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False


MODELS = {
    "smollm2-135m": Model(576, 1536, 30, 9, 3, 64, 49152, tied=True),
    "qwen2.5-0.5b": Model(896, 4864, 24, 14, 2, 64, 151936, tied=True),
    "qwen3-0.6b": Model(1024, 3072, 28, 16, 8, 128, 151936, tied=True),
    "llama-3.2-1b": Model(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "tinyllama-1.1b": Model(2048, 5632, 22, 32, 4, 64, 32000),
    "qwen3-1.7b": Model(2048, 6144, 28, 16, 8, 128, 151936, tied=True),
    "gemma-2-2b": Model(2304, 9216, 26, 8, 4, 256, 256000, tied=True),
    "llama-3.2-3b": Model(3072, 8192, 28, 24, 8, 128, 128256, tied=True),
    "qwen3-4b": Model(2560, 9728, 36, 32, 8, 128, 151936, tied=True),
    "mistral-7b": Model(4096, 14336, 32, 32, 8, 128, 32768),
    "llama-3.1-8b": Model(4096, 14336, 32, 32, 8, 128, 128256),
    "qwen3-8b": Model(4096, 12288, 36, 32, 8, 128, 151936),
    "llama-3.1-70b": Model(8192, 28672, 80, 64, 8, 128, 128256),
}


@dataclass(frozen=True)
class Sizes:
    """What one `--shapes` asks for.

    Args:
        label: as it was written.
        tokens: rows.
        model: the model's dimensions, or None for a plain M,N,K.
        out, inner: N and K of a plain M,N,K.
    """

    label: str
    tokens: int
    model: Model | None = None
    out: int = 0
    inner: int = 0

    @property
    def documents(self) -> list[int]:
        """The tokens in packed documents of 256, the last one shorter."""
        whole, rest = divmod(self.tokens, DOCUMENT)
        return [DOCUMENT] * whole + [rest] * bool(rest)


def model_named(name: str) -> Model:
    """The dimensions of a model.

    Raises:
        UserError: it is not in the table.
    """
    found = MODELS.get(name.lower())
    if found is None:
        raise UserError(f"{name}: is no model that the benchmark knows", fix=f"choose from: {', '.join(MODELS)}")
    return found


def parse(text: str, tokens: int | None = None, quick: bool = False) -> Sizes:
    """Read one `--shapes`.

    Args:
        text: `model:NAME`, or `M,N,K`: M rows, a weight of N rows and K columns.
        tokens: rows for a model; 1024, or 128 with `quick`, without it.
        quick: see there.

    Raises:
        UserError: it is neither, or a number is not a positive one.

    Example:
        >>> parse("16,4096,4096").out
        4096
    """
    if text.startswith(_MODEL):
        return Sizes(text, tokens or (QUICK_TOKENS if quick else TOKENS), model_named(text.removeprefix(_MODEL)))
    try:
        rows, out, inner = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--shapes {text}: is neither model:NAME nor M,N,K",
            fix=f"pyfinetune bench --shapes 16,4096,4096, or --shapes model:NAME with {', '.join(MODELS)}",
        ) from None
    if min(rows, out, inner) < 1:
        raise UserError(f"--shapes {text}: M, N and K have to be 1 or more")
    if tokens is not None:
        raise UserError(f"--tokens {tokens}: M of --shapes {text} says how many rows there are")
    return Sizes(text, rows, None, out, inner)


def parse_all(texts: Sequence[str], tokens: int | None, quick: bool) -> list[Sizes]:
    """Read every `--shapes`; see `parse`.

    Raises:
        UserError: one of them is wrong, or `--tokens` is not positive or has nothing to say.
    """
    if tokens is not None and tokens < 1:
        raise UserError(f"--tokens {tokens}: has to be 1 or more")
    return [parse(text, tokens, quick) for text in texts]
