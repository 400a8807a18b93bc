"""Fast, trustworthy kernels for fine-tuning language models.

    import pyfinetune as pf

    report = pf.patch(model)       # swap the kernels into a Hugging Face / PEFT model
    print(report)                  # what was swapped, what was left and why
    report.undo()                  # exactly as before

`pf.ops` holds the ops, `pf.quantize` makes 4-bit models, `pf.info()` says what this machine can run. Importing this
package costs torch and the native module; transformers and peft are imported by the functions that need them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyfinetune import _native, ops
from pyfinetune.errors import BackendUnavailable, InvalidInput, PyfinetuneError, UserError
from pyfinetune.ops import Packed4bit
from pyfinetune.ops._op import explain, use_backend

if TYPE_CHECKING:
    from pyfinetune.hf.loading import load_4bit
    from pyfinetune.hf.patch import patch
    from pyfinetune.hf.peft_lora import lora_config
    from pyfinetune.hf.quantizer import Config4bit
    from pyfinetune.hf.verify import verify
    from pyfinetune.linear4bit import Linear4bit, quantize
    from pyfinetune.machine import info
    from pyfinetune.planner import plan

__version__ = _native.native.__version__

# Names whose modules are loaded when first asked for.
_LAZY = {
    "Config4bit": "pyfinetune.hf.quantizer",
    "Linear4bit": "pyfinetune.linear4bit",
    "quantize": "pyfinetune.linear4bit",
    "info": "pyfinetune.machine",
    "load_4bit": "pyfinetune.hf.loading",
    "lora_config": "pyfinetune.hf.peft_lora",
    "patch": "pyfinetune.hf.patch",
    "plan": "pyfinetune.planner",
    "verify": "pyfinetune.hf.verify",
}

__all__ = [
    "BackendUnavailable",
    "Config4bit",
    "InvalidInput",
    "Linear4bit",
    "Packed4bit",
    "PyfinetuneError",
    "UserError",
    "explain",
    "info",
    "load_4bit",
    "lora_config",
    "ops",
    "patch",
    "plan",
    "quantize",
    "use_backend",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pyfinetune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
