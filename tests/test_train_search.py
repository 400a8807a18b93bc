"""`hpo:`: what may be searched, a search that is stopped and goes on, and the YAML file that comes of it."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_model import tiny_fixture  # noqa: F401

import pyfinetune.train.search as search_module
from pyfinetune.errors import PyfinetuneError, UserError
from pyfinetune.train.config import load_config, parse_config
from pyfinetune.train.run import TrainResult
from pyfinetune.train.search import search, search_lines

RATE = {"low": 1e-5, "high": 1e-2, "log": True}


def values(out: Path, model: str = "m", data: str = "a.jsonl", trials: int = 3, **hpo) -> dict:
    return {
        "model_name_or_path": model,
        "train_file": data,
        "output_dir": str(out),
        "max_length": 64,
        "test_size": 0.2,
        "device": "cpu",
        "hpo": {"trials": trials, "search": {"trainer.learning_rate": RATE, "lora_r": [2, 4]}, **hpo},
        "trainer": {"max_steps": 2, "per_device_train_batch_size": 4},
    }


@pytest.fixture
def loss_of(monkeypatch):
    """Trials that cost nothing: the held-out loss is a function of the configuration."""
    seen = []

    def install(function):
        def train(config, console=None, callbacks=()):
            seen.append(config)
            loss = function(config)
            return loss if isinstance(loss, TrainResult) else TrainResult(config.output_dir, steps=2, eval_loss=loss)

        monkeypatch.setattr(search_module, "train", train)
        return seen

    return install


def far_from_best(config) -> float:
    return abs(config.trainer["learning_rate"] - 1e-3) + config.lora_r


class TestTheSection:
    @pytest.mark.parametrize(
        ("hpo", "message"),
        [
            ({"search": {}}, "hpo: search"),
            ({"search": {"lora_r": []}}, "lora_r has no value"),
            ({"search": {"lora_rank": [8]}}, "unknown key 'lora_rank'"),
            ({"search": {"trainer.learning_rte": RATE}}, "trainer: learning_rte is not a training argument"),
            ({"search": {"lora_r": [8, 0]}}, "lora_r: 0"),
            ({"search": {"lora_r": {"low": 8, "high": 4}}}, r"low \(8.*has to be less than high"),
            ({"search": {"trainer.learning_rate": {**RATE, "low": 0}}}, "log needs low to be above 0"),
            ({"search": {"lora_r": {"low": 2, "high": 8, "steps": 2}}}, "hpo: search: lora_r: unknown key 'steps'"),
            ({"search": {"test_size": [0.1, 0.2]}}, "test_size cannot be searched"),
            ({"search": {"seed": [1, 2]}}, "seed cannot be searched"),
            ({"search": {"trainer.seed": [1, 2]}}, "trainer: seed has a key of its own"),
            ({"search": {"trainer.max_steps": [1, 2]}}, "trainer.max_steps is set and searched"),
            ({"trials": 0}, "hpo: trials: 0"),
            ({"trails": 4}, "hpo: unknown key 'trails'"),
            ({"search": None}, "hpo: search"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path, hpo, message):
        with pytest.raises(UserError, match=message) as caught:
            parse_config(values(tmp_path, **hpo))
        assert caught.value.fix

    def test_it_needs_held_out_rows(self, tmp_path):
        given = values(tmp_path)
        del given["test_size"]
        with pytest.raises(UserError, match="hpo needs held-out rows"):
            parse_config(given)


class TestTheSearch:
    def test_it_finds_the_best_of_its_trials(self, tmp_path, loss_of):
        configs = loss_of(far_from_best)
        config = parse_config(values(tmp_path / "out", trials=8))
        result = search(config)
        assert result.trials == len(configs) == 8
        assert {config.lora_r for config in configs} == {2, 4}
        assert len({config.trainer["learning_rate"] for config in configs}) == 8
        assert all(1e-5 <= config.trainer["learning_rate"] <= 1e-2 for config in configs)
        assert all(config.trainer["max_steps"] == 2 and config.hpo is None for config in configs)
        assert result.best_loss == min(map(far_from_best, configs))
        best = load_config(result.best_config)
        assert far_from_best(best) == result.best_loss
        assert best.output_dir == str(tmp_path / "out" / "best")
        assert best.report
        assert f"pyfinetune train {result.best_config}" in search_lines(result, "")[-1]

    def test_run_again_it_has_nothing_to_do_and_more_trials_are_added(self, tmp_path, loss_of, capsys):
        configs = loss_of(far_from_best)
        first = search(parse_config(values(tmp_path / "out")))
        assert search(parse_config(values(tmp_path / "out"))) == first
        assert len(configs) == 3
        search(parse_config(values(tmp_path / "out", trials=5)))
        assert len({config.trainer["learning_rate"] for config in configs}) == 5
        assert "Trials, the best first" in capsys.readouterr().err
        with pytest.raises(UserError, match="holds another search: max_length was 64 there and is 32 now"):
            search(parse_config({**values(tmp_path / "out"), "max_length": 32}))

    @pytest.mark.parametrize("how", ["stopped", "killed"])
    def test_a_trial_under_way_goes_on_in_its_own_folder(self, tmp_path, loss_of, how):
        def stop_at_the_second(config):
            if len(configs) != 2:
                return far_from_best(config)
            if how == "killed":
                raise KeyboardInterrupt
            return TrainResult(config.output_dir, interrupted=True)

        configs = loss_of(stop_at_the_second)
        config = parse_config(values(tmp_path / "out"))
        if how == "killed":
            with pytest.raises(KeyboardInterrupt):
                search(config)
        else:
            stopped = search(config)
            assert stopped.interrupted
            assert stopped.trials == 1
            assert search_lines(stopped, "again") == ["stopped after 1 trials", "go on with: again"]
        assert search(config).trials == 3
        assert len(configs) == 4
        assert configs[2] == configs[1]
        assert len({config.output_dir for config in configs}) == 3

    def test_trials_that_fail_are_counted_and_told(self, tmp_path, loss_of, capsys):
        def fails(config):
            if config.lora_r == 2:
                raise PyfinetuneError("the loss became nan")
            return 1.0

        configs = loss_of(fails)
        assert search(parse_config(values(tmp_path / "out", trials=8))).trials == len(configs) == 8
        assert "trial failed: the loss became nan" in capsys.readouterr().err
        only = {"lora_r": [2]}
        with pytest.raises(PyfinetuneError, match="none of 2 trials came to its end: the loss became nan"):
            search(parse_config(values(tmp_path / "none", trials=2, search=only)))

    def test_a_trial_that_does_worse_than_the_others_is_pruned(self, tmp_path, monkeypatch, capsys):
        """Four trials, each with two evaluations; the last begins far worse than the others did."""
        losses = iter([(3.0, 2.0), (3.1, 2.1), (3.2, 2.2), (9.0, 1.0)])
        stopped = []

        def train(config, console=None, callbacks=()):
            control = SimpleNamespace(should_training_stop=False)
            for step, loss in enumerate(next(losses), start=1):
                for _ in range(2):  # the second is the one after the last step, of the same weights
                    state = SimpleNamespace(global_step=step, max_steps=2)
                    callbacks[0].on_evaluate(None, state, control, metrics={"eval_loss": loss})
                if control.should_training_stop:
                    stopped.append(step)
                    break
            return TrainResult(config.output_dir, steps=step, eval_loss=loss)

        monkeypatch.setattr(search_module, "train", train)
        result = search(parse_config(values(tmp_path / "out", trials=4, pruning=True)))
        assert stopped == [1]
        assert (result.trials, result.best_loss) == (4, 2.0)
        assert "pruned at step 1: held-out loss 9.0000" in capsys.readouterr().err

    def test_whole_numbers_steps_and_lists_of_lists(self, tmp_path, loss_of):
        configs = loss_of(lambda config: float(config.lora_r))
        space = {
            "lora_r": {"low": 4, "high": 12, "step": 4},
            "lora_alpha": {"low": 8, "high": 9},
            "target_modules": [["q_proj"], ["q_proj", "v_proj"], "all-linear"],
        }
        result = search(parse_config(values(tmp_path / "out", trials=6, search=space)))
        assert {config.lora_r for config in configs} <= {4, 8, 12}
        assert any(config.lora_alpha % 1 for config in configs)  # a key of fractions, whatever the ends look like
        assert result.best_values["target_modules"] in space["target_modules"]
        assert load_config(result.best_config).target_modules == result.best_values["target_modules"]

    def test_without_optuna_the_line_that_installs_it_is_given(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "optuna", None)
        with pytest.raises(UserError, match="hpo: needs optuna") as caught:
            search(parse_config(values(tmp_path / "out")))
        assert caught.value.fix == "pip install 'pyfinetune[hpo]'"

    def test_several_processes_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match="a search runs in one process"):
            search(parse_config(values(tmp_path / "out")))


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_a_real_search_and_the_run_that_comes_of_it(tiny, sums, tmp_path):
    from typer.testing import CliRunner

    from pyfinetune.cli import app
    from pyfinetune.train import run

    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(values(tmp_path / "out", tiny, sums, trials=2)))
    before = signal.getsignal(signal.SIGINT)
    done = CliRunner().invoke(app, ["train", str(path), "--json"])
    assert done.exit_code == 0, done.output
    assert signal.getsignal(signal.SIGINT) is before
    result = json.loads(done.stdout)
    assert result["trials"] == 2
    assert not list((tmp_path / "out").glob("trial-*/checkpoint-*"))
    assert len(list((tmp_path / "out").glob("trial-*/adapter_model.safetensors"))) == 2
    best = run.train(load_config(result["best_config"]))
    assert best.eval_loss == result["best_loss"]
    assert (tmp_path / "out" / "best" / "report.html").is_file()
