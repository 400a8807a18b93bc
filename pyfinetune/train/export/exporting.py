"""`pyfinetune export`: a trained model in the form it is used in, proved before it is called finished.

    find_saved -> Reference -> write aside -> read back as a user would -> compare -> export.json -> the folder's name

| form | what it is | what is proved |
|---|---|---|
| adapter | PEFT's adapter, the tokenizer, the base's name | tensors and logits equal, bit by bit |
| merged | plain weights | the merge in float64; the file is those weights, rounded once; its logits, its text |
| merged-4bit | merged, then NF4 in bitsandbytes' layout | the same, the codes, and what they cost in loss |
| gguf | merged, through llama.cpp's converter | every tensor, name, the vocabulary, the hyperparameters |
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import pyfinetune as pf
from pyfinetune.errors import InvalidInput, NotProved, UserError
from pyfinetune.hf.merge import merge_dense
from pyfinetune.hf.originals import dense_copy
from pyfinetune.hf.probe import Widened
from pyfinetune.hf.quantizer import forget_quantization
from pyfinetune.linear4bit import Linear4bit
from pyfinetune.train import manifest
from pyfinetune.train.export import checks, files, proof, quality
from pyfinetune.train.export.rows import proof_rows
from pyfinetune.train.model import choose_device
from pyfinetune.train.saved import RECORD, Saved, find_saved, load_base, load_saved, load_tokenizer_of, with_folder

FORMS = ("adapter", "merged", "merged-4bit", "gguf")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Request:
    """What is asked of an export.

    Args:
        source: a run's output folder, an adapter's, or a model's.
        to: `adapter`, `merged`, `merged-4bit` or `gguf`.
        output_dir: where it goes; None takes the source with `-` and the form behind it.
        dtype: of the merged weights, by name; `auto` is that of the base model.
        adapter: which of several adapters.
        base: name or path of the base model, in place of the one that the adapter names.
        in_4bit: whether the base was in NF4 while the adapter learned; None takes the run's word.
        device: where to compute: `auto`, `cpu` or `cuda`.
        converter: llama.cpp's `convert_hf_to_gguf.py`.
        gguf_type: type of the GGUF file's matrices: `f32`, `f16`, `bf16` or `q8_0`.
    """

    source: str
    to: str = "merged"
    output_dir: str | None = None
    dtype: str = "auto"
    adapter: str | None = None
    base: str | None = None
    in_4bit: bool | None = None
    device: str = "auto"
    converter: str | None = None
    gguf_type: str = "f16"


@dataclass
class Exported:
    """What came of an export.

    Args:
        output_dir: its folder.
        to: its form.
        dtype: of its weights, in words.
        rows: where the rows are from that were compared.
        checks: what was compared, with its numbers.
        weights: file to its size and SHA-256.
        source: the adapter or model that it was made from, with its digest.
        versions: of the packages.
        seconds: that it took.
        base_in_4bit: whether the base of an adapter has to be loaded in 4 bits.
        notes: what could not be compared, and why.
    """

    output_dir: str
    to: str
    dtype: str
    rows: str = ""
    checks: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    base_in_4bit: bool = False
    notes: list[str] = field(default_factory=list)


def export(request: Request, say: Callable[[str], None] = lambda message: None) -> Exported:
    """Write a trained model in the form that is asked for, and prove that it is the model that was trained.

    Args:
        request: what is asked for.
        say: called with a sentence before each long step.

    Returns:
        What was written and what was proved; the same is in the folder's `export.json`.

    Raises:
        UserError: the request cannot be met; says why.
        NotProved: what was written is not the model that was trained; nothing is left of it.

    Example:
        >>> export(Request("runs/first", to="merged")).output_dir  # doctest: +SKIP
        'runs/first-merged'
    """
    start = time.monotonic()
    _check_request(request)
    saved = find_saved(request.source, adapter=request.adapter, base=request.base, in_4bit=request.in_4bit)
    _check_form(request, saved)
    final = Path(request.output_dir or f"{request.source.rstrip('/')}-{request.to}")
    if final.resolve() == saved.folder.resolve():
        raise UserError(f"--output-dir {final}: is what is exported", fix="give another folder")
    files.check_place(final)
    plan = _Export(request, saved, say)
    with files.staged(final) as stage:
        result = plan.write(stage)
        result.output_dir = str(final)
        result.seconds = round(time.monotonic() - start, 3)
        manifest.write_manifest(stage / RECORD, dataclasses.asdict(result))
    return result


class _Export:
    """One export, on its way."""

    def __init__(self, request: Request, saved: Saved, say: Callable[[str], None]):
        self.request, self.saved, self.say = request, saved, say
        self.device = choose_device(request.device)
        say(f"loading {saved.folder}" + (f" over {saved.base}" if saved.is_adapter else ""))
        self.tokenizer = load_tokenizer_of(saved)
        self.model = load_saved(saved, self.device)
        if saved.is_adapter and request.to != "adapter" and not hasattr(self.model, "merge_and_unload"):
            kind = self.model.active_peft_config.peft_type.value
            raise UserError(f"{saved.folder}: {kind} has no weights to merge", fix="export it with --to adapter")
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.kind, self.config = type(inner), inner.config
        self.dtype = DTYPES.get(request.dtype) or inner.dtype
        if request.to == "gguf":
            self.dtype = torch.float32  # the converter rounds, once
        self.generates = hasattr(inner, "can_generate") and inner.can_generate()
        if request.to == "gguf" and not self.generates:
            raise UserError(
                f"--to gguf: {self.kind.__name__} is no language model, and llama.cpp's converter takes those only",
                fix="export it with --to merged",
            )
        rows, self.words = proof_rows(saved, self.tokenizer, inner.config, self.generates)
        say(f"running it on {self.words}, in its own type and exactly")
        self.reference = proof.make_reference(self.model, rows, self.dtype)
        self.checks: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def write(self, stage: Path) -> Exported:
        """Write and prove; the folder then lacks its manifest only."""
        forms = {
            "adapter": self._adapter,
            "merged": self._merged,
            "merged-4bit": self._merged_4bit,
            "gguf": self._gguf,
        }
        words = forms[self.request.to](stage)
        files.write_card(stage, self.saved, self.request.to, f"Weights: {words}.")
        source = {"folder": str(self.saved.folder), "base": self.saved.base, "sha256": self.saved.digest}
        return Exported(
            str(stage),
            self.request.to,
            words,
            self.words,
            self.checks,
            files.weights_of(stage),
            source,
            manifest.versions(),
            base_in_4bit=self.saved.is_adapter and self.saved.in_4bit and self.request.to == "adapter",
            notes=self.notes,
        )

    def _adapter(self, stage: Path) -> str:
        from safetensors.torch import load_file

        self.say("writing the adapter, and reading it back")
        before = load_file(str(self.saved.folder / files.WEIGHTS))
        del self.model
        files.copy_adapter(self.saved, stage)
        self.tokenizer.save_pretrained(stage)
        copied = with_folder(self.saved, stage)
        self.checks.append(checks.check_tensors(files.WEIGHTS, load_file(str(stage / files.WEIGHTS)), before))
        again = load_saved(copied, self.device)
        self.checks.append(
            proof.check_equal("the adapter, read back", proof.logits_of(again, self.reference.rows), self.reference.own)
        )
        self._check_tokenizer(stage)
        names = {str(value.dtype).removeprefix("torch.") for value in before.values()}
        return f"adapter in {', '.join(sorted(names))}"

    def _merge(self) -> Any:
        """The model with its adapter in its weights, in the dtype of the export; proved to compute the same."""
        exact = getattr(torch, self.reference.exact)
        self.say(f"merging in {self.reference.exact}")
        model = dense_copy(self.model, torch.float32).to(exact)
        self.model = None
        if self.saved.is_adapter:
            try:
                with warnings.catch_warnings(), Widened() if exact is torch.float64 else contextlib.nullcontext():
                    # What the configuration says of them is settled below.
                    warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
                    model = merge_dense(model)
            except (InvalidInput, NotImplementedError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"{self.saved.folder}: this adapter cannot be merged: {str(error).splitlines()[0]}",
                    fix="export it with --to adapter",
                ) from error
        else:
            forget_quantization(model)
        checks.settle_ties(model)
        logits = proof.logits_of(model.eval(), self.reference.rows, exact=exact is torch.float64)
        self.checks.append(
            proof.check_same(
                f"the model merged in {self.reference.exact}",
                "is not the model that was trained",
                logits,
                self.reference.truth,
                torch.finfo(torch.float32 if exact is torch.float64 else self.dtype).eps,
            )
        )
        return proof.cast_weights(model, self.dtype)

    def _merged(self, stage: Path) -> str:
        self._prove_written(stage, self._merge())
        self._check_tokenizer(stage)
        return str(self.dtype).removeprefix("torch.")

    def _prove_written(self, stage: Path, merged: Any) -> tuple[Any, proof.Logits]:
        """Write the merged model, read it back, and hold it against memory and against the reference."""
        name = str(self.dtype).removeprefix("torch.")
        self.say(f"writing {name} weights, and reading them back")
        rounded = proof.exact_run(merged, self.reference)
        extra = proof.distances(rounded, self.reference.truth)
        files.write_model(stage, merged, self.tokenizer)
        again, loading = self.kind.from_pretrained(str(stage), use_safetensors=True, output_loading_info=True)
        checks.check_loading("the merged model", loading)
        again = again.to(self.device).eval()
        self.checks.append(checks.check_tensors("the merged model", again.state_dict(), merged.state_dict()))
        checks.check_ties(again, merged)
        self._check_read_back("the merged model", again, rounded)
        logits = proof.logits_of(again, self.reference.rows)
        what = f"the merged model in {name}, read back"
        self.checks.append(
            proof.check_close(what, logits, self.reference.same, self.reference, self.dtype, extra)
            | {"rounding_of_the_weights": max(extra.values())}
        )
        self._check_greedy(what, again, logits)
        return again, logits

    def _merged_4bit(self, stage: Path) -> str:
        settings = checks.quantization_of(self.model)
        merged = self._merge()
        self.say("quantizing, writing, and reading back")
        dense = {name: module for name, module in merged.named_modules() if isinstance(module, torch.nn.Linear)}
        weights = {name: module.weight.detach().clone() for name, module in dense.items()}
        quantized = pf.quantize(merged, **settings)
        exact = proof.exact_run(quantized, self.reference)
        files.write_model(stage, quantized, self.tokenizer)
        again = pf.load_4bit(str(stage), model_class=self.kind, dtype=self.dtype).to(self.device).eval()
        self.checks.append(checks.check_tensors("the 4-bit model", again.state_dict(), quantized.state_dict()))
        self.checks.append(checks.check_codes(again, weights))
        self._check_read_back("the 4-bit model", again, exact)
        logits = proof.logits_of(again, self.reference.rows)
        texts = proof.greedy_of(again, self.reference.rows)
        del again, quantized, merged
        self.checks.append(quality.agreement(logits, self.reference, texts))
        ours, own = (quality.token_losses(values, self.reference) for values in (logits, self.reference.own))
        self.checks.append(quality.judge_quantized(own, ours, self._losses_of_base(settings)))
        self._check_tokenizer(stage)
        double = ", double quantization" if settings["double_quant"] else ""
        return f"{settings['quant_type']} (bitsandbytes' layout, blocks of {settings['block_size']}{double})"

    def _losses_of_base(self, settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the base alone loses by being quantized, if it is a language model that can be had in full."""
        if not self.saved.is_adapter or not self.generates:
            self.notes.append("no base model to measure what quantizing alone costs: a tenth of the loss is allowed")
            return None
        base = load_base(self.saved, in_4bit=False).to(self.device)
        if any(isinstance(module, Linear4bit) for module in base.modules()):
            self.notes.append("the base model is 4-bit itself: a tenth of the loss is allowed")
            return None
        self.say("measuring what quantizing costs the base model")
        before = quality.token_losses(proof.logits_of(base, self.reference.rows), self.reference)
        known = {name for name, _ in base.named_modules()}
        skip = tuple(name for name in settings["skip"] if name == "lm_head" or name in known)
        pf.quantize(base, **{**settings, "skip": skip})
        return before, quality.token_losses(proof.logits_of(base, self.reference.rows), self.reference)

    def _gguf(self, stage: Path) -> str:
        from pyfinetune.train.export import gguf_file as gguf_export

        merged = self._merge()
        plain = stage / "merged"
        plain.mkdir()
        again, logits = self._prove_written(plain, merged)
        del merged
        path = stage / f"{self._short_name()}-{self.request.gguf_type.upper()}.gguf"
        self.say("running the converter")
        gguf_export.convert(plain, path, self.request.gguf_type, self.request.converter)
        self.say(f"reading {path.name} back")
        found = gguf_export.read_back(path, again, self.tokenizer)
        self.checks += found.checks
        own = self.reference.own
        decoded = gguf_export.with_weights(again, found.tensors)
        ours = proof.logits_of(decoded, self.reference.rows)
        texts = proof.greedy_of(decoded, self.reference.rows)
        self.checks.append(quality.agreement(ours, self.reference, texts))
        losses, before = (quality.token_losses(values, self.reference) for values in (ours, own))
        self.checks.append(
            {"what": "perplexity", "trained_model": before.mean().exp().item(), "export": losses.mean().exp().item()}
        )
        loaded, why_not = gguf_export.load_with_transformers(path, again)
        if loaded is None:
            self.notes.append(f"transformers does not load this file, so its logits are not compared: {why_not}")
        else:
            theirs = proof.logits_of(loaded.to(self.device).eval(), self.reference.rows)
            self.checks.append(gguf_export.check_loaded(theirs, ours, logits, self.reference))
        shutil.rmtree(plain)
        return f"GGUF, {found.words}"

    def _short_name(self) -> str:
        name = Path(self.request.source).resolve().name
        return "".join(c if c.isalnum() or c in "-_." else "-" for c in name) or "model"

    def _check_read_back(self, what: str, model: Any, exact: proof.Logits) -> None:
        """The weights being equal, other logits are of another configuration."""
        found = proof.exact_run(model, self.reference)
        fault = "computes something else than what was written, and its weights are right: its configuration is not"
        allowed = torch.finfo(torch.float32).eps
        self.checks.append(proof.check_same(f"{what}, read back,", fault, found, exact, allowed))

    def _check_greedy(self, what: str, model: Any, logits: proof.Logits) -> None:
        if self.reference.greedy:
            texts = proof.greedy_of(model, self.reference.rows)
            self.checks.append(proof.check_greedy(what, texts, self.reference, logits))

    def _check_tokenizer(self, stage: Path) -> None:
        """The tokenizer that was written is the one that was trained with."""
        again = load_tokenizer_of(dataclasses.replace(self.saved, folder=stage, base=None))
        if again.get_vocab() != self.tokenizer.get_vocab():
            raise NotProved("the tokenizer: another vocabulary was read back than was written")
        if again.chat_template != self.tokenizer.chat_template:
            raise NotProved("the tokenizer: another chat template was read back than was written")
        if again.eos_token_id != self.tokenizer.eos_token_id:
            raise NotProved(f"the tokenizer: its end token is {again.eos_token!r}, was {self.tokenizer.eos_token!r}")
        self.checks.append({"what": "tokenizer and chat template", "tokens": len(again), "error": 0.0, "allowed": 0.0})


def _check_request(request: Request) -> None:
    for option, value, known in (
        ("--to", request.to, FORMS),
        ("--dtype", request.dtype, ("auto", *DTYPES)),
        ("--gguf-type", request.gguf_type, GGUF_TYPES),
        ("--device", request.device, ("auto", "cpu", "cuda")),
    ):
        if value not in known:
            raise UserError(f"{option} {value}: no such choice", fix=f"choose among {', '.join(known)}")
    if request.to in ("adapter", "gguf") and request.dtype != "auto":
        reason = "an adapter keeps its type" if request.to == "adapter" else "--gguf-type says what a GGUF file holds"
        raise UserError(f"--dtype {request.dtype}: {reason}", fix="leave --dtype out")
    if request.to == "gguf":
        from pyfinetune.train.export import gguf_file as gguf_export

        gguf_export.require()
        gguf_export.find_converter(request.converter)


def _check_form(request: Request, saved: Saved) -> None:
    if request.to == "adapter" and not saved.is_adapter:
        raise UserError(f"{saved.folder}: is a whole model, without an adapter", fix="export it with --to merged")
    if request.to == "merged-4bit" and not saved.is_adapter and saved.in_4bit:
        raise UserError(
            f"{saved.folder}: is a 4-bit model already", fix="use it as it is, or export it with --to merged"
        )
