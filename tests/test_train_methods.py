"""Every method of training: what is frozen keeps its bits, what should learn moves, and a stop changes nothing."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft_models import assert_close
from tiny_model import save_tiny, tiny_fixture  # noqa: F401

import pyfinetune as pf
from pyfinetune.errors import UserError
from pyfinetune.train.answers import answer
from pyfinetune.train.card import model_card
from pyfinetune.train.config import parse_config
from pyfinetune.train.loop import build_trainer, training_arguments
from pyfinetune.train.methods import has_virtual_tokens
from pyfinetune.train.model import load_model
from pyfinetune.train.planning import settings_of
from pyfinetune.train.preflight import examine
from pyfinetune.train.run import prepare_model, prepare_rows, read_data, train
from pyfinetune.train.tokenizing import Document, load_tokenizer

# PEFT asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

CPU = torch.device("cpu")
FEW = {"num_virtual_tokens": 3}
METHODS = {
    "lora": {},
    "rslora": {},
    "dora": {},
    "qlora": {},
    "qlora with DoRA": {"method": "qlora", "use_dora": True},
    "full": {},
    "prompt_tuning": FEW,
    "prefix_tuning": FEW,
    "ia3": {},
    "adaption_prompt": {"adapter_len": 3},
}
SLOW = {
    "lora with rsLoRA, DoRA and dropout": {"use_rslora": True, "use_dora": True, "lora_dropout": 0.2},
    "qlora with both, packed": {"method": "qlora", "use_rslora": True, "use_dora": True, "packing": True},
    "dora, unpatched": {"method": "dora", "patch": False},
    "full with dropout": {"method": "full", "dropout": 0.3},
    "full, half of it": {"method": "full", "freeze": "half", "freeze_every": 1},
    "lora, unfrozen gradually": {"freeze": "gradual", "freeze_every": 1, "layerwise_lr_decay": 0.5},
    "ia3, packed": {"method": "ia3", "packing": True},
    "ia3, unfrozen gradually": {"method": "ia3", "freeze": "gradual", "freeze_every": 1},
    "ia3 on chosen layers": {"method": "ia3", "target_modules": ["q_proj", "down_proj"]},
    "adaption_prompt, top layer, packed": {"method": "adaption_prompt", "adapter_layers": 1, "packing": True},
    "prompt_tuning from a text": {
        "method": "prompt_tuning",
        "num_virtual_tokens": 7,
        "prompt_tuning_init_text": "Add.",
    },
    "prefix_tuning from a text": {
        "method": "prefix_tuning",
        "num_virtual_tokens": 7,
        "prompt_tuning_init_text": "Add.",
    },
    "prefix_tuning, unpatched": {"method": "prefix_tuning", "patch": False, **FEW},
}
LEARNS = {
    "full": "",
    "prompt_tuning": "prompt_encoder",
    "prefix_tuning": "prompt_encoder",
    "ia3": "ia3_l",
    "adaption_prompt": "adaption_",
}


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> str:
    """Twenty additions of very different lengths."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=" * (1 + (a + b) % 4), "completion": str(a + b)} for a in range(5) for b in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def settings(model: str, data: str, out: Path, method: str = "lora", **change):
    trainer = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_steps": 4, **change.pop("trainer", {})}
    values = {"model_name_or_path": model, "train_file": data, "output_dir": str(out), "method": method}
    values |= {"max_length": 64, "lora_r": 4, "save_steps": 2, "device": "cpu", "report": False}
    return parse_config({**values, **change, "trainer": trainer})


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


class Watch(transformers.TrainerCallback):
    """Keeps the model, and digests of all of its tensors at the start and at the end."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = model
        self.trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.before = self.digests()

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.after = self.digests()

    def digests(self) -> dict[str, str]:
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: digest(tensor) for name, tensor in tensors if tensor.numel()}


def load(config):
    """What a user loads from the output folder."""
    from peft import PeftConfig, PeftModel

    if config.method == "full":
        return transformers.AutoModelForCausalLM.from_pretrained(config.output_dir)
    base = load_model(config.model_name_or_path, method=config.method, device=CPU)
    adapter = PeftConfig.from_pretrained(config.output_dir)
    given = {"config": pf.lora_config(adapter)} if config.method == "qlora" else {}
    return PeftModel.from_pretrained(base, config.output_dir, **given)


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (path,) = (out / name for name in ("model.safetensors", "adapter_model.safetensors") if (out / name).is_file())
    return load_file(path)


def losses_of(out: Path) -> dict[int, float]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def same(a, b) -> bool:
    """Whether two nests of values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


@pytest.mark.parametrize("name", [*METHODS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_method_keeps_its_invariants(tiny, sums, tmp_path, name):
    change = {**METHODS, **SLOW}[name]
    method = change.get("method", name.partition(" ")[0].strip(","))
    change = {key: value for key, value in change.items() if key != "method"}
    watch = Watch()
    config = settings(tiny, sums, tmp_path / "out", method, **change)
    result = train(config, callbacks=[watch])
    assert result.steps == 4

    moved = {key for key in watch.before if watch.before[key] != watch.after[key]}
    if config.freeze == "half":  # four draws leave out a few
        assert moved < watch.trained
        assert len(moved) > 0.7 * len(watch.trained)
        moved = watch.trained
    assert moved == watch.trained, "what is frozen keeps its bits, and all that learns moves"
    part = LEARNS.get(method, "lora_")
    assert watch.trained == {key for key, _ in watch.model.named_parameters() if part in key}
    if config.dora:
        assert any("lora_magnitude_vector" in key for key in watch.trained)

    again = settings(tiny, sums, tmp_path / "again", method, resume=str(tmp_path / "out" / "checkpoint-2"), **change)
    assert train(again).resumed_from.endswith("checkpoint-2")
    assert same(weights_of(tmp_path / "again"), weights_of(tmp_path / "out"))
    states = [torch.load(tmp_path / name / "checkpoint-4" / "optimizer.pt") for name in ("out", "again")]
    assert states[0]["state"]
    assert same(*states)
    assert losses_of(tmp_path / "again") == {step: losses_of(tmp_path / "out")[step] for step in (3, 4)}

    ids = torch.randint(0, 300, (2, 11), generator=torch.Generator().manual_seed(5))
    loaded = load(config).eval()
    plain = loaded(input_ids=ids).logits
    if config.patch:
        pf.patch(loaded)
    with torch.no_grad():
        logits = watch.model.eval()(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, logits)
    torch.testing.assert_close(plain, logits + 0, rtol=1e-4, atol=1e-4)


def rows_of(*lengths: int) -> list[list[Document]]:
    """Rows of one document each, half of it learned."""
    draw = np.random.default_rng(0)
    return [[Document(draw.integers(1, 300, n).astype(np.int32), np.arange(n) >= n // 2)] for n in lengths]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_padded_batch_with_virtual_tokens_is_its_rows_alone(tiny, sums, tmp_path, method, patched):
    """Named regression: position ids that PEFT drops with a warning, or counts from the wrong token."""
    model = prepare_model(settings(tiny, sums, tmp_path, method, num_virtual_tokens=5, patch=False), CPU)[0].train()
    rows = rows_of(5, 16, 11)
    total = sum(int(row[0].learned.sum()) for row in rows)

    def alone(model) -> dict[str, torch.Tensor]:
        loss = 0.0
        for (document,) in rows:
            ids = torch.from_numpy(document.input_ids).long()
            logits = model(input_ids=ids[None]).logits[0, -len(ids) :]
            losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
            loss = loss + losses[torch.from_numpy(document.learned)[1:]].sum() / total
        (grad,) = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        return {"loss": loss.detach(), "grad": grad}

    eager = alone(model)
    model.double()
    exact = alone(model)
    model.float()
    if patched:
        assert pf.patch(model).swapped
    section = {"per_device_train_batch_size": 3, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0}
    section |= {"max_grad_norm": 0.0, "save_strategy": "no"}
    arguments = training_arguments(
        settings(tiny, sums, tmp_path, method, trainer=section), train_rows=3, held_out=False
    )
    (parameter,) = (p for p in model.parameters() if p.requires_grad)
    before = parameter.detach().clone()
    trainer = build_trainer(model, arguments, rows, tokenizer=load_tokenizer(tiny), max_length=64)
    batch = trainer.data_collator(rows)
    assert batch["num_tokens"] == 32
    assert "position_ids" not in batch
    trainer.train()
    loss = torch.tensor(trainer.state.log_history[0]["loss"])
    # The step subtracts the gradient, which rounds at the weight's size: a half of its last place each.
    stepped = {name: part["grad"].to(torch.float64) for name, part in (("eager", eager), ("exact", exact))}
    half = torch.finfo(torch.float32).eps * before.abs().max()
    grad = (before - parameter.detach()).double()
    allowed = (
        2 * (stepped["eager"] - stepped["exact"]).abs().max() + half + torch.finfo(torch.float32).eps * grad.abs().max()
    )
    assert (grad - stepped["exact"]).abs().max() <= allowed
    assert_close({"loss": loss}, {"loss": eager["loss"]}, {"loss": exact["loss"]}, torch.float32)


def shaken(model):
    """Gates of 0 and scales of 1 would hide a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "ia3", "dora"])
def test_the_kernels_change_no_number(tiny, sums, tmp_path, method):
    """Whatever is swapped in around a method of PEFT's computes what was there; what is left says why."""
    model, report = prepare_model(settings(tiny, sums, tmp_path, method, **METHODS[method]), CPU)
    assert report.swapped
    assert all(row.reason for row in report.rows if row.status == "left")
    verdict = pf.verify(shaken(model), steps=1)
    assert verdict.ok, str(verdict)


def test_the_kernels_change_no_number_behind_a_gate(tiny, sums, tmp_path):
    """A gate's gradient is one number, in which float32 may be right by luck; all gradients are judged together."""
    model = shaken(prepare_model(settings(tiny, sums, tmp_path, "adaption_prompt", patch=False), CPU)[0])
    ids = torch.randint(0, 300, (2, 48))

    def found(model) -> dict[str, torch.Tensor]:
        out = model(input_ids=ids, labels=ids)
        grads = torch.autograd.grad(out.loss, [p for p in model.parameters() if p.requires_grad])
        return {"loss": out.loss.detach(), "grads": torch.cat([grad.flatten() for grad in grads])}

    eager, exact = found(model), found(copy.deepcopy(model).double())
    report = pf.patch(model)
    assert report.swapped
    assert all(row.reason for row in report.rows if row.status == "left")
    assert_close(found(model), eager, exact, torch.float32)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "adaption_prompt"])
def test_an_answer_is_the_most_likely_token_by_token(tiny, sums, tmp_path, method):
    """With a cache as without one, whatever PEFT makes of positions and masks on the way."""
    model = shaken(prepare_model(settings(tiny, sums, tmp_path, method, **METHODS[method]), CPU)[0]).eval()
    tokenizer, ids = load_tokenizer(tiny), [5, 9, 17, 30]
    found = answer(model, tokenizer, ids)
    for _ in range(40):
        with torch.no_grad():
            ids = [*ids, int((model(input_ids=torch.tensor([ids])).logits + 0)[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert len(ids) > 10
    assert found == " ".join(tokenizer.decode(ids[4:], skip_special_tokens=True).split())


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_the_loss_before_is_the_base_models(tiny, sums, tmp_path, method):
    """Untrained virtual tokens would make the base look worse than it is, and the training better."""

    def run(method, **change):
        return train(settings(tiny, sums, tmp_path / method, method, test_size=0.2, **change))

    change = {"report": True, "report_examples": 1}
    result = run(method, trainer={"max_steps": 8, "learning_rate": 3e-2}, **FEW, **change)
    assert result.eval_loss_before == pytest.approx(run("lora", trainer={"max_steps": 1}).eval_loss_before, rel=1e-6)
    assert result.eval_loss < result.eval_loss_before
    samples = [json.loads((tmp_path / name / "examples.json").read_text()) for name in (method,)]
    assert samples[0][0]["after"]
    card = (tmp_path / method / "README.md").read_text()
    assert f"A learned {method.partition('_')[0] if method[:4] == 'prom' else 'prefix'} of 3 virtual tokens" in card
    assert "AutoPeftModelForCausalLM" in card
    assert "base_model:adapter:" in card


def test_a_prefix_begins_as_keys_and_values_of_its_text(tiny, sums, tmp_path):
    """With as many tokens as the text has, the model answers as if the text stood before the row."""
    text = "The quick brown fox"
    ids = load_tokenizer(tiny)(text)["input_ids"]
    row = torch.randint(0, 300, (1, 9))
    base = load_model(tiny, device=CPU).eval()
    expected = base(input_ids=torch.cat([torch.tensor([ids]), row], dim=1)).logits[:, len(ids) :]
    for method in ("prompt_tuning", "prefix_tuning"):
        config = settings(tiny, sums, tmp_path, method, num_virtual_tokens=len(ids), prompt_tuning_init_text=text)
        model = prepare_model(config, CPU)[0].eval()
        assert has_virtual_tokens(model)
        found = model(input_ids=row).logits[:, -9:]
        torch.testing.assert_close(found + 0, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "prompt_tuning", "packing": True}, "packing: true does not go with method: prompt_tuning"),
        ({"method": "prefix_tuning", "packing": True}, "set packing: false"),
        ({"method": "prompt_tuning", "freeze": "gradual"}, "freeze parts a model by its layers"),
        ({"method": "prefix_tuning", "layerwise_lr_decay": 0.9}, "layerwise_lr_decay parts a model by its layers"),
        ({"method": "prefix_tuning", "trainer": {"gradient_checkpointing": True}}, "keeps its prefix in the cache"),
        ({"method": "ia3", "use_dora": True}, "use_dora is for method: lora and rslora and dora and qlora"),
        ({"method": "full", "use_rslora": True}, "use_rslora is for method"),
        ({"method": "lora", "num_virtual_tokens": 5}, "num_virtual_tokens is for method"),
        ({"method": "ia3", "adapter_len": 5}, "adapter_len is for method: adaption_prompt, and method is ia3"),
        ({"method": "prompt_tuning", "num_virtual_tokens": 0}, "num_virtual_tokens: 0 will not do"),
        ({"method": "prompt_tuning", "prompt_tuning_init_text": ""}, "prompt_tuning_init_text: '' will not do"),
        ({"method": "adapter"}, "method: 'adapter' is not available"),
        ({"method": "lora", "dropout": 1.0}, "dropout: 1.0 will not do"),
    ],
)
def test_keys_that_do_not_go_together(sums, tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        settings("m", sums, tmp_path, **change)
    assert message in str(caught.value)


def test_what_does_not_fit_a_model_is_named(tiny, sums, tmp_path):
    def prepare(model=tiny, **change):
        prepare_model(settings(model, sums, tmp_path / "out", **change), CPU)

    with pytest.raises(UserError, match="adapter_layers: 9 is more than the 2 layers"):
        prepare(method="adaption_prompt", adapter_layers=9)
    with pytest.raises(UserError, match="no layer of the model is called 'qproj'"):
        prepare(method="ia3", target_modules=["qproj"])
    with pytest.raises(UserError, match="max_length: 520 is beyond the 512 positions"):
        prepare(method="prompt_tuning", max_length=510, num_virtual_tokens=10)
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    small = GPTNeoXConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    other = tmp_path / "neox"
    GPTNeoXForCausalLM(small).save_pretrained(other)
    with pytest.raises(UserError, match="method: adaption_prompt does not fit a gpt_neox") as caught:
        prepare(str(other), method="adaption_prompt")
    assert "method: lora" in caught.value.fix


def test_preflight_knows_every_method(tiny, sums, tmp_path):
    counts = {}
    for name in METHODS:
        change = dict(METHODS[name])
        method = change.pop("method", name)
        config = settings(tiny, sums, tmp_path / "out", method, **change)
        found = examine(config)
        assert found.ok, found.problems
        counts[name] = found.model["trainable_parameters"]
        model = prepare_model(config.model_copy(update={"patch": False}), CPU)[0]
        assert counts[name] == sum(p.numel() for p in model.parameters() if p.requires_grad), name
    assert counts["dora"] > counts["lora"] == counts["rslora"] == counts["qlora"]
    assert counts["prompt_tuning"] == 3 * 64
    assert counts["prefix_tuning"] == 3 * 2 * 2 * 32  # tokens, layers, keys and values, of two heads of 16
    assert counts["adaption_prompt"] == 2 * (3 * 64 + 1)


def test_which_methods_are_planned(tiny, sums, tmp_path):
    assert (
        settings_of(settings(tiny, sums, tmp_path, "dora")).method,
        settings_of(settings(tiny, sums, tmp_path, "dora")).dora,
    ) == ("lora", True)
    assert settings_of(settings(tiny, sums, tmp_path, "rslora")) == settings_of(settings(tiny, sums, tmp_path, "lora"))
    assert settings_of(settings(tiny, sums, tmp_path, "qlora", use_dora=True)).dora
    for method in ("prompt_tuning", "prefix_tuning", "ia3", "adaption_prompt"):
        with pytest.raises(UserError, match=f"plan: method '{method}' cannot be predicted"):
            settings_of(settings(tiny, sums, tmp_path, method))
    with pytest.raises(UserError, match=r"dropout: 0\.1 cannot be predicted"):
        settings_of(settings(tiny, sums, tmp_path, dropout=0.1))


class TestNoise:
    """NEFTune, through `trainer: neftune_noise_alpha`."""

    @pytest.mark.parametrize(
        ("method", "patch"),
        [("lora", True), ("full", False), pytest.param("prompt_tuning", True, marks=pytest.mark.slow)],
    )
    def test_training_is_noisy_and_nothing_else(self, tiny, sums, tmp_path, method, patch):
        watch = Watch()
        change = {"test_size": 0.2, "patch": patch, "eval_steps": 2}
        noise = {"trainer": {"neftune_noise_alpha": 5.0}}
        quiet = train(settings(tiny, sums, tmp_path / "quiet", method, **change))
        noisy = train(settings(tiny, sums, tmp_path / "noisy", method, **change, **noise), callbacks=[watch])
        assert losses_of(tmp_path / "noisy")[1] != losses_of(tmp_path / "quiet")[1], "noise in training"
        assert noisy.eval_loss_before == quiet.eval_loss_before, "none in evaluation"

        config = settings(tiny, sums, tmp_path / "noisy", method, **change)
        data = read_data(config)
        tokenizer = load_tokenizer(tiny, data_format=data.format)
        rows = prepare_rows(data, tokenizer, config)
        arguments = training_arguments(config, train_rows=len(rows.train), held_out=True)
        model = load(config)
        if patch:
            pf.patch(model)
        trainer = build_trainer(model, arguments, rows.train, rows.held_out, tokenizer=tokenizer, max_length=64)
        assert trainer.evaluate()["eval_loss"] == noisy.eval_loss

        embedding = watch.model.get_input_embeddings()
        assert not embedding._forward_hooks, "the embedding is as it was"
        assert not hasattr(embedding, "neftune_noise_alpha")

        resume = str(tmp_path / "noisy" / "checkpoint-2")
        train(settings(tiny, sums, tmp_path / "again", method, **change, **noise, resume=resume))
        assert same(weights_of(tmp_path / "again"), weights_of(tmp_path / "noisy"))


def test_weight_decay_shrinks_matrices_that_learn_and_no_others(tiny, sums, tmp_path):
    """A row of the embedding that no token asks for has no gradient: AdamW takes lr * weight_decay of it each step."""
    section = {"weight_decay": 0.5, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    train(settings(tiny, sums, tmp_path / "full", "full", trainer=section))
    before = load_model(tiny, device=CPU).model
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full").model
    rows = load_tokenizer(tiny)(Path(sums).read_text())["input_ids"]
    unused = sorted(set(range(before.embed_tokens.num_embeddings)) - set(rows) - {0})[-20:]
    shrunk = before.embed_tokens.weight[unused] * (1 - 1e-2 * 0.5) ** 4
    torch.testing.assert_close(after.embed_tokens.weight[unused], shrunk)

    watch = Watch()
    train(settings(tiny, sums, tmp_path / "lora", trainer=section), callbacks=[watch])
    assert {name for name in watch.before if watch.before[name] != watch.after[name]} == watch.trained


@pytest.mark.parametrize("method", ["prefix_tuning", "ia3"])
def test_early_stopping_ends_with_the_best_weights(tiny, sums, tmp_path, method):
    """Named regression: prompt learning that cannot load its best weights back."""
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"prompt": "1+1=", "completion": "The lazy dog, in May."}))
    section = {"max_steps": 12, "learning_rate": 100.0, "lr_scheduler_type": "constant"}
    change = {"validation_file": str(held), "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 2}
    result = train(settings(tiny, sums, tmp_path / "out", method, trainer=section, **change))
    assert result.steps < 12
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record and record["step"]}
    assert result.eval_loss == pytest.approx(min(found.values()), rel=1e-6)
    assert result.steps >= min(found, key=found.get) + 2


def test_a_card_for_each_method(tiny, sums, tmp_path):
    train(settings(tiny, sums, tmp_path / "out", "dora", use_rslora=True))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "A rank-stabilised DoRA adapter (rank 4) for" in (tmp_path / "out" / "README.md").read_text()
    for method, words in (("ia3", "(IA)^3"), ("adaption_prompt", "Adaption prompts of 10 tokens")):
        text = model_card(record | {"config": record["config"] | {"method": method}})
        assert words in text
        assert "AutoPeftModelForCausalLM" in text
