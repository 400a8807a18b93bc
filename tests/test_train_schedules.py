"""Schedules: what is frozen keeps its bits, what learns is what was drawn, and a resumed run ends at the same bits."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers
from tiny_model import make_model, tiny_fixture  # noqa: F401
from torch import nn
from trainer_runs import arguments, rows

import pyfinetune as pf
from pyfinetune.errors import UserError
from pyfinetune.train.config import parse_config
from pyfinetune.train.run import train
from pyfinetune.train.schedules import (
    FreezingSchedule,
    GradualUnfreezing,
    HalfFineTuning,
    depths,
    layerwise_groups,
    schedules_of,
)

ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}


class Watch(transformers.TrainerCallback):
    """Keeps every weight as it is before each step and after the last."""

    def __init__(self):
        self.weights, self.learning = [], []

    def _keep(self, model):
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._keep(model)
        self.learning.append({name for name, p in model.named_parameters() if p.requires_grad})

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._keep(model)


def run(model, folder, schedule, resume=None, **options):
    watch = Watch()
    settings = arguments(folder, **{**ADAMW, "max_steps": 6, **options})
    trainer = transformers.Trainer(model, settings, train_dataset=rows(), callbacks=[schedule, watch])
    trainer.train(resume_from_checkpoint=resume)
    return watch, trainer


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def other_models():
    """An encoder with a head, an encoder-decoder, and experts in lists of their own."""
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    yield transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **small)), 3
    yield (
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2)
        ),
        4,
    )
    lora = peft.get_peft_model(make_model(layers=3), peft.LoraConfig(target_modules="all-linear"))
    yield lora, 3


def test_depths_follow_the_structure():
    of = depths(make_model(layers=3))
    assert of.blocks == 3
    assert of.of["model.embed_tokens.weight"] == 0
    assert of.of["model.layers.0.self_attn.q_proj.weight"] == 1
    assert of.of["model.layers.2.mlp.down_proj.weight"] == 3
    assert of.of["model.norm.weight"] == of.of["lm_head.weight"] == 4
    for model, blocks in other_models():
        found = depths(model)
        assert found.blocks == blocks
        assert set(found.of) == {name for name, _ in model.named_parameters()}
        in_order = [depth for depth in found.of.values() if 1 <= depth <= blocks]
        assert in_order == sorted(in_order)
        assert set(in_order) == set(range(1, blocks + 1))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="Sequential has no list of blocks"):
        depths(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("every", [0, -3])
def test_a_round_has_a_step_at_least(every):
    with pytest.raises(UserError, match=f"every is {every}"):
        HalfFineTuning(every)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("kind", [HalfFineTuning, GradualUnfreezing])
def test_what_is_frozen_keeps_its_bits(kind, patched, tmp_path):
    """Named regression: weight decay and momentum that go on moving weights without a gradient."""
    model = make_model(layers=3)
    if patched:
        assert pf.patch(model).rows
    watch, _ = run(model, tmp_path, kind(every=2))
    assert len(watch.learning) == 6
    for step, learning in enumerate(watch.learning):
        moved = changed(watch.weights[step], watch.weights[step + 1])
        assert moved <= learning
        assert len(moved) > 0.9 * len(learning), "what learns does move"
        assert learning == watch.learning[step - step % 2], "a round lasts two steps"
    assert all(p.requires_grad for p in model.parameters()), "left as it was"


def test_half_of_every_block_learns_and_the_half_changes(tmp_path):
    model = make_model(layers=4)
    watch, _ = run(model, tmp_path, HalfFineTuning(every=1, seed=5))
    sizes = {name: p.numel() for name, p in model.named_parameters() if ".layers." in name}
    outside = {name for name, _ in model.named_parameters()} - set(sizes)
    shares = []
    for learning in watch.learning:
        assert outside <= learning
        for block in range(4):
            names = [name for name in sizes if f".layers.{block}." in name]
            assert 3 <= len(learning & set(names)) <= 6, "of four, three and two, near a half"
        shares.append(sum(sizes[name] for name in learning & set(sizes)) / sum(sizes.values()))
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.05)
    assert len({frozenset(learning) for learning in watch.learning}) == 6
    assert len(set.union(*watch.learning)) > 0.95 * (len(sizes) + len(outside)), "in six draws, nearly all"
    again, _ = run(make_model(layers=4), tmp_path, HalfFineTuning(every=1, seed=5))
    other, _ = run(make_model(layers=4), tmp_path, HalfFineTuning(every=1, seed=6))
    assert again.learning == watch.learning != other.learning


def test_unfreezing_goes_down_block_by_block(tmp_path):
    watch, _ = run(make_model(layers=3), tmp_path, GradualUnfreezing(every=1))
    head = {"model.norm.weight", "lm_head.weight"}
    assert watch.learning[0] == head
    for step, block in ((1, 2), (2, 1), (3, 0)):
        joined = watch.learning[step] - watch.learning[step - 1]
        assert joined
        assert all(f".layers.{block}." in name for name in joined)
    assert watch.learning[4] - watch.learning[3] == {"model.embed_tokens.weight"}
    assert watch.learning[5] == watch.learning[4]


def test_a_norm_alone_does_not_make_a_round(tmp_path):
    """A head that is tied to the embedding leaves but a norm above the blocks."""
    model = make_model(layers=2)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    watch, _ = run(model, tmp_path, GradualUnfreezing(every=3))
    assert {"model.norm.weight", "model.layers.1.mlp.up_proj.weight"} <= watch.learning[0]
    assert not any(".layers.0." in name for name in watch.learning[0])


@pytest.mark.parametrize("kind", [HalfFineTuning, GradualUnfreezing])
def test_a_resumed_run_ends_at_the_same_bits(kind, tmp_path):
    """The optimizer's state of frozen weights is kept over rounds, and over a stop in the middle of a round."""
    start = make_model(layers=3)
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 3}
    whole, trainer = run(copy.deepcopy(start), tmp_path, kind(every=2), **options)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    steps = {names[id(p)]: int(state["step"]) for p, state in trainer.optimizer.state.items()}
    taken = {name: sum(name in learning for learning in whole.learning) for name in steps}
    assert steps == taken, "each weight's state counts the steps that it learned in"
    assert len(set(taken.values())) > 1
    again, _ = run(copy.deepcopy(start), tmp_path, kind(every=2), resume=str(tmp_path / "checkpoint-5"), **options)
    assert len(again.learning) == 3
    assert changed(whole.weights[-1], again.weights[-1]) == set()


def test_a_schedule_of_ones_own(tmp_path):
    class OnlyNorms(FreezingSchedule):
        def trainable(self, round):
            return {name for name in self.parameters if "norm" in name}

    watch, _ = run(make_model(), tmp_path, OnlyNorms(every=100))
    moved = changed(watch.weights[0], watch.weights[-1])
    assert moved
    assert all("norm" in name for name in moved)


class TestLayerwise:
    def groups(self, model):
        decayed = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() < 2]
        return [{"params": decayed, "weight_decay": 0.1, "lr": 1e-3}, {"params": rest, "weight_decay": 0.0, "lr": 1e-3}]

    def test_rates_fall_with_depth(self):
        model = make_model(layers=3)
        split = layerwise_groups(model, self.groups(model), 0.5)
        of = depths(model).of
        rates = {id(p): (group["lr"], group["weight_decay"]) for group in split for p in group["params"]}
        assert sum(len(group["params"]) for group in split) == len(rates) == len(list(model.parameters()))
        for name, parameter in model.named_parameters():
            assert rates[id(parameter)] == (1e-3 * 0.5 ** (4 - of[name]), 0.1 if parameter.dim() > 1 else 0.0)

    def test_the_deepest_that_learns_has_the_full_rate(self):
        model = peft.get_peft_model(make_model(layers=3), peft.LoraConfig(target_modules="all-linear"))
        trained = [p for p in model.parameters() if p.requires_grad]
        split = layerwise_groups(model, [{"params": trained, "lr": 1.0}], 0.5)
        assert [group["lr"] for group in split] == [0.25, 0.5, 1.0]

    def test_one_changes_nothing(self):
        model = make_model()
        assert {group["lr"] for group in layerwise_groups(model, self.groups(model), 1)} == {1e-3}

    @pytest.mark.parametrize("decay", [0, -1, 1.5, float("nan")])
    def test_a_rate_that_grows_is_refused(self, decay):
        with pytest.raises(UserError, match="layerwise_lr_decay is"):
            layerwise_groups(make_model(), [], decay)


class TestRuns:
    """The same, as a run's YAML file asks for it."""

    def config(self, tiny, tmp_path, name, **changes):
        (tmp_path / "sums.jsonl").write_text(
            "".join(json.dumps({"prompt": f"{i} + 1 =", "completion": f"{i + 1}"}) + "\n" for i in range(16))
        )
        trainer = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
        content = {"model_name_or_path": tiny, "train_file": str(tmp_path / "sums.jsonl"), "method": "full"}
        content |= {"output_dir": str(tmp_path / name), "max_length": 64, "device": "cpu", "report": False}
        return parse_config({**content, "trainer": trainer, **changes})

    @pytest.mark.parametrize("freeze", ["half", "gradual"])
    def test_what_is_frozen_keeps_its_bits(self, tiny, tmp_path, freeze):
        watch = Watch()
        train(self.config(tiny, tmp_path, "out", freeze=freeze, freeze_every=2), callbacks=[watch])
        assert len({frozenset(learning) for learning in watch.learning}) == 3
        for step, learning in enumerate(watch.learning):
            moved = changed(watch.weights[step], watch.weights[step + 1])
            assert moved
            assert moved <= learning
        assert changed(watch.weights[0], watch.weights[2]) < changed(watch.weights[0], watch.weights[-1])

    def test_rates_fall_with_depth(self, tiny, tmp_path):
        seen = []

        class Rates(transformers.TrainerCallback):
            def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
                seen.append([group["lr"] for group in optimizer.param_groups])

        changes = {"layerwise_lr_decay": 0.5, "method": "lora"}
        train(self.config(tiny, tmp_path, "out", **changes), callbacks=[Rates()])
        assert all(rates == [rates[1] / 2, rates[1]] for rates in seen)
        assert seen[0][1] == 1e-3 > seen[-1][1], "the schedule goes on over both"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"freeze": "half", "method": "lora"}, "freeze: half is for method: full; lora has frozen"),
            ({"freeze_every": 3}, "freeze_every belongs to freeze"),
            ({"freeze": "thirds"}, "freeze: 'thirds' will not do"),
            ({"freeze": "half", "freeze_every": 0}, "freeze_every: 0 will not do"),
            ({"layerwise_lr_decay": 1.5}, "layerwise_lr_decay: 1.5 will not do"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path, changes, message):
        with pytest.raises(UserError, match=message):
            self.config("m", tmp_path, "out", **changes)

    def test_rounds_fit_the_run(self, tmp_path):
        model = make_model(layers=3)
        for freeze, every in (("half", 100), ("gradual", 100)):
            (schedule,) = schedules_of(self.config("m", tmp_path, "out", freeze=freeze), model, 1000)
            assert schedule.every == every
        assert schedules_of(self.config("m", tmp_path, "out"), model, 1000) == []
        (schedule,) = schedules_of(self.config("m", tmp_path, "out", freeze="half"), model, 3)
        assert schedule.every == 1
