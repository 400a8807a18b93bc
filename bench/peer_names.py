"""The peers that benchmarks know: what they are called, which packages they need, and which of them a run measures."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from pyfinetune.errors import UserError

EAGER, COMPILED = "eager", "torch.compile"
MASK, LOOP, VARLEN, FLEX, FLASH = (
    "dense mask",
    "SDPA per document",
    "torch varlen (FA2)",
    "flex attention",
    "flash-attn",
)
HUGGING_FACE, STEP, STEP_4BIT = "Hugging Face", "transformers + PEFT", "transformers + PEFT + bitsandbytes"
PEFT, PEFT_4BIT, BITSANDBYTES = "PEFT", "PEFT + bitsandbytes", "bitsandbytes"
TRL_HEAD, TRL_STEP, LIGER, UNSLOTH = "TRL's fused head", "TRL's SFTTrainer", "Liger", "Unsloth"


@dataclass(frozen=True)
class Peer:
    """One row of the list of peers.

    Args:
        labels: what it, or what is made of it, is called in tables.
        packages: (module, name in the package index) of what has to be installed.
        gpu: whether it runs on NVIDIA GPUs only.
        on_request: why it is only measured when it is asked for; a full run does so for a few cases unasked.
    """

    labels: tuple[str, ...]
    packages: tuple[tuple[str, str], ...] = (("torch", "torch"),)
    gpu: bool = False
    on_request: str = ""

    @property
    def version(self) -> str | None:
        """Versions of its packages, or None where one is missing."""
        try:
            found = [importlib.metadata.version(name) for module, name in self.packages if _installed(module)]
        except importlib.metadata.PackageNotFoundError:
            return None
        return ", ".join(found) if len(found) == len(self.packages) else None

    def why_missing(self, device: str) -> str | None:
        """Why it cannot run on the device ("cpu" or "cuda"), or None."""
        absent = [name for module, name in self.packages if not _installed(module)]
        reasons = [f"{', '.join(absent)} not installed"] if absent else []
        reasons += ["runs on NVIDIA GPUs only"] if self.gpu and device != "cuda" else []
        return "; ".join(reasons) or None


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


_COMPILES = "compiles for tens of seconds a case"
PEERS = {
    "eager": Peer((EAGER,)),
    "compile": Peer((COMPILED,), on_request=_COMPILES),
    "sdpa-mask": Peer((MASK,)),
    "sdpa-loop": Peer((LOOP,)),
    "torch-varlen": Peer((VARLEN,), gpu=True),
    "flex": Peer((FLEX,), on_request=_COMPILES),
    "flash-attn": Peer((FLASH,), (("flash_attn", "flash-attn"),), gpu=True),
    "transformers": Peer((HUGGING_FACE, STEP, STEP_4BIT), (("transformers", "transformers"),)),
    "peft": Peer((PEFT, PEFT_4BIT, STEP, STEP_4BIT), (("peft", "peft"),)),
    "bitsandbytes": Peer((BITSANDBYTES, PEFT_4BIT, STEP_4BIT), (("bitsandbytes", "bitsandbytes"),)),
    "trl": Peer((TRL_HEAD, TRL_STEP), (("trl", "trl"),)),
    "liger": Peer((LIGER,), (("liger_kernel", "liger-kernel"),), gpu=True),
    "unsloth": Peer((UNSLOTH,), (("unsloth", "unsloth"),), gpu=True),
}


@dataclass(frozen=True)
class Choice:
    """Which peers to measure.

    Args:
        peers: keys of `PEERS`; without any, all that need no asking for.
        full: a full run, which measures those that do, too, in the cases that are marked for it.
    """

    peers: tuple[str, ...] = ()
    full: bool = False

    def __post_init__(self) -> None:
        for name in self.peers:
            if name not in PEERS:
                raise UserError(f"--peer {name}: is not one of {', '.join(PEERS)}")

    def includes(self, label: str, marked: bool = False) -> bool:
        """Whether a peer of that label is measured in a case; `marked` says that a full run compiles for it."""
        if self.peers:
            return any(label in PEERS[name].labels for name in self.peers)
        asking = any(label in peer.labels for peer in PEERS.values() if peer.on_request)
        return not asking or (self.full and marked)


def peer_list(device: str, chosen: Sequence[str] = ()) -> dict[str, dict[str, str | None]]:
    """Every peer with its version, why it is missing on this device, and why it was left out.

    Args:
        device: "cpu" or "cuda".
        chosen: the peers that were asked for, if any.

    Example:
        >>> peer_list("cpu")["flash-attn"]["missing"]
        'flash-attn not installed; runs on NVIDIA GPUs only'
    """
    rows = {}
    for name, peer in PEERS.items():
        left_out = None
        if chosen and name not in chosen:
            left_out = "not asked for"
        elif not chosen and peer.on_request:
            left_out = f"{peer.on_request}: ask for it with --peer {name}; a full run measures it in a few cases"
        rows[name] = {"version": peer.version, "missing": peer.why_missing(device), "left_out": left_out}
    return rows
