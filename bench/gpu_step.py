"""A whole QLoRA training step of a large model with random weights: its speed beside PEFT's, and the memory it takes.

The model in 16 bits never exists: it is built on the meta device, and each layer's weight is made and quantized alone.
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import pyfinetune as pf
from pyfinetune.bench import peers
from pyfinetune.bench.bench_step import packed_batch
from pyfinetune.bench.gpu_timing import GpuCase
from pyfinetune.bench.harness import OURS, Setup, Verdict

RANK, CHECKED_STEPS = 16, 3
DENSE_PEER, PEER = "transformers + PEFT, bf16 base", "transformers + PEFT + bitsandbytes"
_GIB = 2**30
_STD = 0.02  # of every random weight, as Llama's own initialisation
_LEARNING_RATE = 1e-3
# What a step of each needs to know, by the names of LlamaConfig: Llama-3.1-8B, Llama-3.2-3B, and one for a rehearsal.
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0, "tie_word_embeddings": False}
SIZES: dict[str, dict[str, Any]] = {
    "8B": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "3B": LLAMA
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"tie_word_embeddings": True},
    "tiny": LLAMA
    | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"vocab_size": 512, "num_key_value_heads": 2},
}


def _llama_config(size: str):
    from transformers import LlamaConfig

    shapes = dict(SIZES[size])
    theta = shapes.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    return LlamaConfig(**shapes, rope_parameters=rope, max_position_embeddings=8192, use_cache=False)


def _empty_model(size: str) -> nn.Module:
    """The model in bfloat16 without any memory."""
    from transformers import LlamaForCausalLM

    config = _llama_config(size)
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def _fill_rest(model: nn.Module, device: torch.device) -> None:
    """Values for what is still on the meta device: embeddings, norms, the head, and tables of positions."""
    made: dict[int, nn.Parameter] = {}  # tied weights are one parameter, and stay one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    values = empty.normal_(std=_STD) if parameter.dim() > 1 else empty.fill_(1.0)
                    made[id(parameter)] = nn.Parameter(values, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)


def build_base(size: str, device: torch.device) -> nn.Module:
    """A random model with 4-bit linear layers, made one layer at a time.

    Args:
        size: a key of `SIZES`.
        device: where it lives.
    """
    model = _empty_model(size)
    head = model.get_output_embeddings()
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    for name, linear in linears:
        dense = nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=torch.bfloat16, device="meta")
        dense = dense.to_empty(device=device).requires_grad_(False)
        dense.weight.normal_(std=_STD)
        model.set_submodule(name, pf.Linear4bit.from_linear(dense))
        del dense
    _fill_rest(model, device)
    return model


def _peer_base(ours: nn.Module, size: str, make: Callable[[pf.Linear4bit], nn.Module]) -> nn.Module:
    """The same model with layers as a peer would have them; everything else is shared."""
    model = _empty_model(size)
    layers = dict(ours.named_modules())
    for name, module in list(model.named_modules()):
        mine = layers[name]
        if isinstance(mine, pf.Linear4bit):
            model.set_submodule(name, make(mine))
        else:
            module._parameters.update(mine._parameters)
    model.model.rotary_emb = ours.model.rotary_emb
    return model


def _dense_linear(layer: pf.Linear4bit) -> nn.Module:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.bfloat16, device="meta")
    linear.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
    return linear


def _bnb_linear(layer: pf.Linear4bit) -> nn.Module:
    """bitsandbytes' layer with the very same codes and scales."""
    bnb, _ = peers.find("bitsandbytes")
    state = {name.removeprefix("weight."): value for name, value in layer.state_dict().items() if name != "weight"}
    linear = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    linear.weight = bnb.nn.Params4bit.from_prequantized(layer.weight.data, state, device=str(layer.weight.device))
    linear.weight.module = linear
    return linear


def add_adapters(model: nn.Module) -> nn.Module:
    """Adapters on every linear layer but the head, checkpointed layers, in training mode."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, pf.lora_config(config))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # a fresh B is zero, which hides both mistakes and work
            std = parameter.shape[1] ** -0.5 if "lora_A" in name else _STD / 4
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted.train()


class Trained:
    """A model with its optimizer, in float32 over the adapters alone.

    Args:
        model: what `add_adapters` returned.
        batch: what it is called with, always the same.
    """

    def __init__(self, model: nn.Module, batch: dict[str, torch.Tensor]):
        self.model, self.batch = model, batch
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(wanted, lr=_LEARNING_RATE, fused=batch["input_ids"].is_cuda)

    def step(self) -> torch.Tensor:
        """Forward, backward and update; the loss before it, on the device."""
        with torch.enable_grad():
            loss = self.model(**self.batch).loss
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def losses(self) -> list[float]:
        """The first losses of a run."""
        return torch.stack([self.step() for _ in range(CHECKED_STEPS)]).tolist()


def _texts(losses: list[float]) -> str:
    return ", ".join(f"{loss:.4f}" for loss in losses)


def judge(losses: list[float], theirs: list[float] | None) -> Verdict:
    """Whether a run learns its batch, and its losses are a peer's as far as bfloat16 can tell."""
    if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        return Verdict(False, f"losses {_texts(losses)} do not fall")
    if theirs is None:
        return Verdict(True, f"losses {_texts(losses)}")
    gap = max(abs(a - b) / abs(b) for a, b in zip(losses, theirs, strict=True))
    return Verdict(gap <= torch.finfo(torch.bfloat16).eps, f"losses {_texts(losses)}; the peer's {_texts(theirs)}")


def _peer_of(ours: nn.Module, size: str) -> tuple[str, nn.Module, dict[str, str]]:
    """A peer's name and model, and what is missing for a better one."""
    why = peers.why_missing("bitsandbytes")
    if why is None:
        return PEER, _peer_base(ours, size, _bnb_linear), {}
    return DENSE_PEER, _peer_base(ours, size, _dense_linear), {PEER: why}


def _build_step(device: torch.device, size: str, documents: int, length: int) -> Setup:
    """A step of ours and of the peer, of the same weights, adapters and tokens."""
    base = build_base(size, device)
    name, other, missing = _peer_of(base, size)
    batch = packed_batch([length] * documents, SIZES[size]["vocab_size"], device)
    runs = {OURS: Trained(add_adapters(base), batch), name: Trained(add_adapters(other), batch)}
    report = pf.patch(runs[OURS].model)

    @functools.cache
    def losses(name):
        return runs[name].losses()

    def check_ours():
        theirs = None
        with contextlib.suppress(Exception):  # its own row says why it does not run
            theirs = losses(name)
        verdict = judge(losses(OURS), theirs)
        return Verdict(verdict.ok, f"{verdict.detail}; {report.swapped} modules swapped, {report.left} left")

    check = {OURS: check_ours, name: lambda: judge(losses(name), None)}
    calls = {name: (lambda i, run=run: run.step()) for name, run in runs.items()}
    return Setup(calls, check, missing)


def step_flops(size: str, documents: int, length: int) -> float:
    """Of the products of one step: every layer forward, again for its backward pass, and the gradient of its input."""
    shapes, tokens = SIZES[size], documents * length
    width, inner, heads = shapes["hidden_size"], shapes["intermediate_size"], shapes["num_attention_heads"]
    kv_width = width * shapes["num_key_value_heads"] // heads
    pairs = [(width, width)] * 2 + [(width, kv_width)] * 2 + [(width, inner)] * 3
    dense = sum(a * b for a, b in pairs)
    adapters = sum(RANK * (a + b) for a, b in pairs)
    # Scores and values take two products forward and five backward; half of each is masked.
    attention = 9.0 * width * documents * length**2
    layer = tokens * (6.0 * dense + 8.0 * adapters) + attention
    return shapes["num_hidden_layers"] * layer + 4.0 * tokens * width * shapes["vocab_size"]


def step_cases(quick: bool) -> list[GpuCase]:
    """The row of the table."""
    size, documents, length = ("tiny", 2, 32) if quick else ("8B", 2, 2048)
    return [
        GpuCase(
            "step",
            f"QLoRA step, Llama {size}, random weights, r {RANK}, checkpointed, {documents}x{length} tokens packed",
            functools.partial(_build_step, size=size, documents=documents, length=length),
            flops=step_flops(size, documents, length),
            goal="≥ 80 % of roofline, ≥ 2x HF + PEFT + bitsandbytes",
            tokens=documents * length,
        )
    ]


# --- the same on a card with less memory


@contextlib.contextmanager
def _capped(device: torch.device, gibibytes: int):
    """The process may take no more of the GPU than a card of this size has."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.set_per_process_memory_fraction(min(gibibytes * _GIB / total, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _memory_peaks(device: torch.device) -> dict[str, float]:
    """Megabytes that tensors took at most, and that the allocator held for them."""
    if device.type != "cuda":
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"peak_mb": allocated / 2**20, "reserved_mb": reserved / 2**20}


def planned_mb(size: str, documents: int, length: int, device: torch.device) -> dict[str, Any]:
    """What `pf.plan` says that the tensors of such a step take, in megabytes, before there is a model.

    Args:
        size: of the model, a key of `SIZES`.
        documents, length: the packed tokens of the step.
        device: where the step will run.
    """
    from pyfinetune.train.planning import Settings, step_plan

    with tempfile.TemporaryDirectory() as folder:
        _llama_config(size).save_pretrained(folder)
        settings = Settings(
            *(folder, "qlora", torch.bfloat16, None, device.type),
            batch_size=1,
            length=documents * length,
            documents=documents,
            checkpointing=True,
            r=RANK,
            clip=0.0,
        )
        return {"planned_mb": step_plan(settings).peak / 2**20}


@dataclass(frozen=True)
class CappedStep:
    """Whether a step runs where a card of some size would have to do.

    Args:
        size: of the model, a key of `SIZES`.
        documents, length: the packed tokens of the step.
        gibibytes: of the card.
    """

    size: str
    documents: int
    length: int
    gibibytes: int
    op = "step"

    @property
    def name(self) -> str:
        return (
            f"QLoRA step, Llama {self.size}, {self.documents}x{self.length} tokens packed, under {self.gibibytes} GiB"
        )

    def _trained(self, device: torch.device) -> dict[str, Any]:
        base = build_base(self.size, device)
        batch = packed_batch([self.length] * self.documents, SIZES[self.size]["vocab_size"], device)
        run = Trained(add_adapters(base), batch)
        report = pf.patch(run.model)
        verdict = judge(run.losses(), None)
        return {"ok": verdict.ok, "detail": f"{verdict.detail}; {report.swapped} modules swapped, {report.left} left"}

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Build and train under the cap; running out of memory is a result like any other."""
        with _capped(device, self.gibibytes):
            try:
                result = self._trained(device)
            except torch.OutOfMemoryError as error:
                result = {"ok": False, "out_of_memory": True, "detail": " ".join(str(error).split())[:300]}
            result |= _memory_peaks(device) | planned_mb(self.size, self.documents, self.length, device)
        row = {"op": self.op, "case": self.name, "goal": "runs", "bound": None, "floor_ms": None}
        return row | {"missing": {}, "ran_on": [], "results": {OURS: result}}


def capped_cases(quick: bool, size: str, gibibytes: int) -> list[CappedStep]:
    """The one row of a card of this size."""
    return [CappedStep("tiny", 2, 32, gibibytes) if quick else CappedStep(size, 2, 2048, gibibytes)]
