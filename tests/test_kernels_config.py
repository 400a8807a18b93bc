"""How a Triton kernel's configuration is chosen: pruned, measured before, measured now, or by the model; and told."""

from __future__ import annotations

import importlib
import json
import re
import warnings

import pytest
import torch

import pyfinetune as pf

pytest.importorskip("triton")

from pyfinetune.bench.compilations import kernel_modules
from pyfinetune.kernels import config as kernel_config
from pyfinetune.kernels import measured, roofline
from pyfinetune.kernels.config import SHIPPED, Config, Family, autotuning, problems, remembered
from pyfinetune.kernels.gpus import GPUS, gpu_of
from pyfinetune.kernels.roofline import Work, seconds

SLOW, FAST = Work(10_000, 1e9, 4096), Work(10_000, 5e8, 4096)
SMALL = Config({"BLOCK": 64}, num_warps=4, num_stages=2, shared_bytes=10_000)
LARGE = Config({"BLOCK": 128}, num_warps=8, num_stages=3, shared_bytes=150_000)
WIDE = Config({"BLOCK": 128}, num_warps=4, num_stages=3, shared_bytes=90_000)
CONFIGS = [LARGE, WIDE, SMALL]
CAPABILITIES = tuple(GPUS)


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch):
    """No tables, no families but those that a test makes, and nothing remembered."""
    monkeypatch.setattr(kernel_config, "_tables", list)
    monkeypatch.setattr(kernel_config, "_remembered", [])
    monkeypatch.setattr(kernel_config, "_tuning", None)
    monkeypatch.setattr(kernel_config, "FAMILIES", {})
    monkeypatch.delenv("PYFINETUNE_AUTOTUNE_FILE", raising=False)


def family(*configs, fields=("itemsize",), name="k"):
    return Family(name, fields, lambda capability, *shape: list(configs))


def entry(config, **changes):
    launched = {"blocks": config.blocks, "num_warps": config.num_warps, "num_stages": config.num_stages}
    return {"kernel": "k", "capability": 90, "shape": {"itemsize": 2}, **launched, **changes}


def written(tmp_path, *entries):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"entries": list(entries)}), encoding="utf-8")
    return path


def use_table(monkeypatch, path, of_user=False):
    monkeypatch.setattr(kernel_config, "_tables", lambda: [(measured.read(path), of_user)])


class TestPruning:
    """What a GPU has no room for is never launched."""

    def test_by_shared_memory(self):
        assert family(*CONFIGS).choose(90, 2) == LARGE
        assert family(*CONFIGS, name="other").choose(86, 2) == WIDE
        with pytest.raises(ValueError, match=r"k2: no configuration fits sm_120: .* takes 150000 bytes .* of 101376"):
            family(LARGE, name="k2").choose(120, 2)

    def test_by_registers(self):
        greedy = Config({"BLOCK": 64}, num_warps=4, registers=256)
        many = Config({"BLOCK": 64}, num_warps=16, registers=136)  # 16 warps leave 128 to each thread
        assert family(greedy, many, SMALL).choose(90, 2) == SMALL
        assert kernel_config.why_not(greedy, 90) == "takes about 256 registers a thread of 255"
        assert kernel_config.why_not(many, 90) == "takes about 136 registers a thread of 128"
        assert kernel_config.why_not(many, 0) is None

    def test_a_gpu_that_is_not_listed_has_what_the_next_older_one_has(self):
        assert gpu_of(87) is GPUS[86]
        assert gpu_of(103) is GPUS[100]
        assert gpu_of(75) is GPUS[80]

    def test_one_name_is_one_kernel(self):
        family(SMALL)
        with pytest.raises(ValueError, match="k: two kernels of one name"):
            family(SMALL)


class TestModel:
    gpu = GPUS[86]

    def time(self, work, warps=4, shared=0, registers=32, stages=2):
        return seconds(self.gpu, work, warps, shared, registers, stages)

    def test_memory_bounds_what_moves_much(self):
        moved = 1e9
        assert self.time(Work(100_000, moved, 8192)) == pytest.approx(moved / self.gpu.memory)
        # One block a multiprocessor with 512 bytes under way does not fill the latency.
        thin = self.time(Work(100_000, moved, 512), shared=60_000)
        assert thin == pytest.approx(moved * roofline.LATENCY / (82 * 512))

    def test_compute_bounds_what_multiplies_much(self):
        work = Work(82 * 8, 1e6, 65536, flops=1e12, tensor_cores=True)
        assert self.time(work, warps=8) == pytest.approx(1e12 / self.gpu.tensor)
        # One tile more than the multiprocessors divide evenly takes a ninth turn.
        more = Work(82 * 8 + 1, 1e6, 65536, flops=1e12, tensor_cores=True)
        assert self.time(more, warps=8) == pytest.approx(1e12 / self.gpu.tensor * 82 * 9 / (82 * 8 + 1))
        assert self.time(Work(82 * 8, 1e6, 65536, flops=1e12), warps=8) == pytest.approx(1e12 / self.gpu.plain)

    def test_a_long_chain_bounds_a_small_launch(self):
        assert self.time(Work(1, 1e3, 1e3, steps=100)) == pytest.approx(roofline.LATENCY * 51)
        assert self.time(Work(1, 1e3, 1e3, steps=100), stages=4) == pytest.approx(roofline.LATENCY * 26)

    def test_the_second_level_cache_bounds_what_is_asked_for_again(self):
        assert self.time(Work(100_000, 1e6, 8192, asked=1e12)) == pytest.approx(1e12 / self.gpu.cache)

    def test_what_does_not_fit_takes_forever(self):
        assert self.time(Work(1, 1, 1), shared=200_000) == float("inf")

    @pytest.mark.parametrize("capability", CAPABILITIES)
    def test_half_the_work_is_chosen(self, capability):
        slow, fast = (Config({"BLOCK": i}, work=work) for i, work in enumerate((SLOW, FAST)))
        found = family(slow, fast).chosen(capability, 2)
        assert (found.config, found.source) == (fast, "by the roofline model")

    def test_a_near_tie_keeps_the_modules_order(self):
        first = Config({"BLOCK": 1}, work=Work(10_000, 1.04e9, 4096))
        others = [Config({"BLOCK": i}, work=Work(10_000, moved, 4096)) for i, moved in ((2, 1.02e9), (3, 1e9))]
        ranked = family(first, *others).fitting(90, 2)
        assert ranked == [first, others[1], others[0]]

    def test_without_work_or_gpu_the_modules_order_counts(self):
        assert family(SMALL, WIDE).chosen(90, 2).source == "by the kernel's own order"
        slow, fast = (Config({"BLOCK": i}, work=work) for i, work in enumerate((SLOW, FAST)))
        assert family(slow, fast, name="interpreted").choose(0, 2) == slow
        assert family(SMALL, name="single").chosen(90, 2).source == "the only one that fits"


class TestMeasuredBefore:
    def test_an_entry_is_honoured(self, monkeypatch, tmp_path):
        use_table(monkeypatch, written(tmp_path, entry(SMALL)))
        k = family(*CONFIGS)
        assert k.choose(90, 2) == SMALL
        assert k.chosen(90, 2).source == "measured before, measured.json"
        assert k.choose(100, 2) == LARGE
        assert k.choose(90, 4) == LARGE
        assert family(*CONFIGS, name="other").choose(90, 2) == LARGE

    def test_one_that_does_not_fit_is_refused_and_named(self, monkeypatch, tmp_path):
        use_table(monkeypatch, written(tmp_path, entry(WIDE), entry(LARGE, capability=86)))
        said = "entry 2 (k on sm_86, itemsize=2): not used, as it takes 150000 bytes of shared memory of 101376"
        k = family(*CONFIGS)
        with pytest.warns(RuntimeWarning, match=re.escape(said)):
            assert k.choose(86, 2) == WIDE
        with warnings.catch_warnings():  # once is enough
            warnings.simplefilter("error")
            assert k.choose(86, 2) == WIDE

    def test_a_stale_one_is_refused_and_named(self, monkeypatch, tmp_path):
        use_table(monkeypatch, written(tmp_path, entry(SMALL, blocks={"BLOCK": 32})))
        with pytest.warns(RuntimeWarning, match="entry 1 .k on sm_90.*is no configuration of the kernel any more"):
            assert family(*CONFIGS).choose(90, 2) == LARGE

    def test_problems_of_a_whole_file(self, tmp_path):
        family(*CONFIGS)
        stale, foreign = entry(SMALL, num_warps=1), entry(SMALL, kernel="nope")
        misshapen, unfit = entry(SMALL, shape={"cols": 2}), entry(LARGE, capability=120)
        found = problems(written(tmp_path, entry(SMALL, capability=80), stale, foreign, misshapen, unfit))
        assert [text.partition(": entry ")[2][0] for text in found] == ["2", "3", "4", "5"]
        for text, said in zip(found, ("any more", "there is not", "needs a shape of itemsize", "150000"), strict=True):
            assert said in text

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{", "cannot be read as JSON"),
            ("[]", 'needs an object with a list "entries"'),
            ('{"entries": [1]}', "entry 1 is no object"),
            (json.dumps({"entries": [entry(SMALL, capability="90")]}), "entry 1 (k): needs 'capability', an integer"),
            (json.dumps({"entries": [entry(SMALL, num_warps=True)]}), "needs 'num_warps', an integer"),
            (json.dumps({"entries": [entry(SMALL, shape={"itemsize": 2.5})]}), "shape.itemsize is 2.5, no integer"),
            (json.dumps({"entries": [entry(SMALL), entry(WIDE)]}), "entry 2 (k on sm_90, itemsize=2): the same as"),
        ],
    )
    def test_a_file_that_is_no_table_is_refused(self, tmp_path, text, said):
        path = tmp_path / "measured.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=f"measured.json.*{re.escape(said)}"):
            measured.read(path)

    def test_writing_keeps_what_is_there(self, tmp_path):
        path = written(tmp_path, entry(SMALL), entry(SMALL, capability=86))
        path.write_text(json.dumps({"about": ["kept"], **json.loads(path.read_text())}), encoding="utf-8")
        measured.write(path, [entry(WIDE, ms=0.5), entry(WIDE, kernel="a")])
        made = json.loads(path.read_text(encoding="utf-8"))
        assert made["about"] == ["kept"]
        assert made["entries"] == [entry(WIDE, kernel="a"), entry(SMALL, capability=86), entry(WIDE, ms=0.5)]
        assert [p.name for p in tmp_path.iterdir()] == ["measured.json"]
        measured.write(tmp_path / "new" / "own.json", [entry(SMALL)])
        assert len(measured.read(tmp_path / "new" / "own.json")) == 1

    def test_nothing_is_written_over_a_file_of_another_kind(self, tmp_path):
        path = tmp_path / "notes.json"
        path.write_text('{"mine": 1}', encoding="utf-8")
        with pytest.raises(ValueError, match=r"notes\.json"):
            measured.write(path, [entry(SMALL)])
        assert path.read_text(encoding="utf-8") == '{"mine": 1}'


class TestMeasuring:
    """`clock` runs the launch, which returns the configuration's milliseconds."""

    def launch(self, config, seen=None):
        if seen is not None:
            seen.append(config)
        return {str(LARGE): 3.0, str(WIDE): 1.0, str(SMALL): 2.0}[str(config)]

    def test_only_when_asked(self):
        seen = []
        assert family(*CONFIGS).choose(90, 2, launch=lambda config: self.launch(config, seen)) == LARGE
        assert (seen, remembered()) == ([], [])

    def test_the_fastest_is_remembered(self):
        k = family(*CONFIGS)
        with autotuning(clock=lambda call: call()):
            assert k.choose(0, 2) == LARGE  # nothing to launch
            assert k.choose(0, 2, launch=self.launch) == WIDE
            assert k.choose(0, 2, launch=None) == WIDE
            seen = []
            assert k.choose(0, 2, launch=lambda config: self.launch(config, seen)) == WIDE
        assert seen == []
        assert k.chosen(0, 2).source == "measured in this process, 1 ms"
        assert remembered() == [entry(WIDE, capability=0) | {"ms": 1.0}]

    def test_at_most_six(self):
        seen = []
        configs = [Config({"BLOCK": 2**i}) for i in range(9)]
        with autotuning(clock=lambda call: call()):
            family(*configs).choose(0, 2, launch=lambda config: seen.append(config) or 1.0)
        assert seen == configs[:6]

    def test_not_for_longer_than_allowed(self):
        with autotuning(clock=lambda call: call(), seconds=-1):
            assert family(*CONFIGS).choose(0, 2, launch=self.launch) == LARGE

    def test_not_while_a_graph_is_captured(self, monkeypatch):
        capturing = [True]
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
        k = family(*CONFIGS)
        with autotuning(clock=lambda call: call()):
            assert k.choose(90, 2, launch=self.launch) == LARGE
            capturing[0] = False
            assert k.choose(90, 2, launch=self.launch) == WIDE

    def test_what_is_read_and_written_is_copied_once(self):
        made, seen = [], []

        def launch(config, to="the result"):
            seen.append(to)
            return 1.0

        with autotuning(clock=lambda call: call()):
            family(*CONFIGS).choose(0, 2, launch=launch, aside=lambda: made.append("a copy") or "a copy")
        assert made == ["a copy"]
        assert seen == ["a copy"] * 3

    def test_what_does_not_run_is_not_the_fastest(self):
        from triton.runtime.errors import OutOfResources

        def launch(config):
            if config == WIDE:
                raise OutOfResources(1, 0, "shared memory")
            return self.launch(config)

        with autotuning(clock=lambda call: call()):
            assert family(*CONFIGS).choose(0, 2, launch=launch) == SMALL

    def test_without_a_gpu_nothing_is_timed_by_default(self):
        with autotuning():
            assert family(*CONFIGS).choose(0, 2, launch=self.launch) == LARGE

    def test_the_users_file_is_written_when_asked_and_settles_the_next_process(self, monkeypatch, tmp_path):
        path = tmp_path / "own.json"
        monkeypatch.setenv("PYFINETUNE_AUTOTUNE_FILE", str(path))
        with autotuning(clock=lambda call: call()):
            family(*CONFIGS).choose(0, 2, launch=self.launch)
        assert len(measured.read(path)) == 1
        use_table(monkeypatch, path, of_user=True)
        kernel_config.FAMILIES.clear()
        again = family(*CONFIGS)
        with autotuning(clock=lambda call: call()):
            assert again.choose(0, 2, launch=lambda config: pytest.fail("measured again")) == WIDE

    def test_the_variables(self, monkeypatch, tmp_path):
        for text, on in (("1", True), ("0", False), ("", False)):
            monkeypatch.setenv("PYFINETUNE_AUTOTUNE", text)
            assert (kernel_config._asked_to_tune() is not None) == on
        monkeypatch.setenv("PYFINETUNE_AUTOTUNE", "yes")
        with pytest.raises(ValueError, match="PYFINETUNE_AUTOTUNE='yes'"):
            kernel_config._asked_to_tune()


class TestKernels:
    """Every family of the kernel modules, for GPUs that are not here."""

    @pytest.fixture
    def families(self, monkeypatch):
        monkeypatch.undo()
        for module in kernel_modules():
            importlib.import_module(f"pyfinetune.kernels.{module}")
        return kernel_config.FAMILIES

    def test_all_are_compiled(self, families):
        for capability in CAPABILITIES:
            for module in kernel_modules():
                list(importlib.import_module(f"pyfinetune.kernels.{module}").compilations(capability))
        used = {name for name, f in families.items() if f._known}
        assert used == set(families)

    def test_measured_json_has_no_problems(self, families):
        assert problems(SHIPPED) == []

    def test_alternatives_fit_and_are_no_duplicates(self, families):
        for f in families.values():
            for capability, shape in list(f._known):
                fitting = f.fitting(capability, *shape)
                assert len({str(config) for config in fitting}) == len(fitting), (f.name, shape)
                for config in fitting:
                    assert kernel_config.why_not(config, capability) is None


class TestExplain:
    def args(self):
        return pf.ops.quantize_4bit(torch.randn(64, 64), 64)

    def test_a_gpu_that_is_not_here(self, monkeypatch):
        monkeypatch.undo()
        explanation = pf.explain("dequantize_4bit", self.args(), capability=86)
        triton = next(choice for choice in explanation.choices if choice.backend == "triton")
        assert triton.launches == (
            "nf4_decode: BLOCKS=64 warps=4 stages=2, by the roofline model [itemsize=4 block_size=64 numel=65536]",
        )
        assert f"    {triton.launches[0]}" in str(explanation).splitlines()
        assert explanation.backend == pf.explain("dequantize_4bit", self.args()).backend

    def test_the_users_file_is_told_and_a_mistake_in_it_too(self, monkeypatch, tmp_path):
        monkeypatch.undo()
        from pyfinetune.kernels.nf4 import DECODE

        path, shape = tmp_path / "own.json", {"itemsize": 4, "block_size": 64, "numel": 65536}
        other = DECODE.fitting(86, *shape.values())[-1]
        monkeypatch.setenv("PYFINETUNE_AUTOTUNE_FILE", str(path))
        monkeypatch.setattr(kernel_config, "_tables", kernel_config._tables.__wrapped__)
        for text, source in (
            (json.dumps({"entries": [entry(other, kernel="nf4_decode", capability=86, shape=shape)]}), "own.json"),
            ('{"entries": [{}]}', None),
        ):
            path.write_text(text, encoding="utf-8")
            monkeypatch.setattr(DECODE, "_known", {})
            if source is None:
                with pytest.raises(ValueError, match=r"own\.json: entry 1 \(None\): needs 'kernel', a text"):
                    pf.explain("dequantize_4bit", self.args(), capability=86)
            else:
                told = str(pf.explain("dequantize_4bit", self.args(), capability=86))
                assert f"nf4_decode: {other}, measured before, {source} [" in told

    def test_each_op_has_something_to_say(self, monkeypatch):
        monkeypatch.undo()
        packed, x = pf.ops.quantize_4bit(torch.randn(128, 64)), torch.randn(10, 64)
        q, cu = torch.randn(10, 4, 64), torch.tensor([0, 10], dtype=torch.int32)
        labels, a, b = torch.zeros(10, dtype=torch.int64), torch.randn(8, 64), torch.randn(128, 8)
        calls = {
            "quantize_4bit": (x,),
            "rms_norm": (x, torch.ones(64)),
            "rope": (q, q, x, x),
            "swiglu": (x, x),
            "lora_linear": (x, packed, a, b, 2.0),
            "lora_linear_group": (x, [packed, packed], [a, a], [b, b], [2.0, 1.0]),
            "linear_cross_entropy": (x, torch.randn(100, 64), labels),
            "varlen_attn": (q, q, q, cu),
        }
        for capability in (80, 120):
            for op, args in calls.items():
                choices = pf.explain(op, *args, capability=capability).choices
                (triton,) = (choice for choice in choices if choice.backend == "triton")
                assert triton.launches, op
                assert not any(choice.launches for choice in choices if choice is not triton)
                double = [arg.double() if torch.is_tensor(arg) and arg.is_floating_point() else arg for arg in args]
                if op in ("rms_norm", "swiglu", "rope"):
                    assert not any(c.launches for c in pf.explain(op, *double, capability=capability).choices)

    @pytest.mark.parametrize("capability", [75, "86", 8.6])
    def test_a_capability_that_no_kernel_is_for(self, capability):
        with pytest.raises(pf.InvalidInput, match=r"explain: capability is .* needs 80 or more"):
            pf.explain("dequantize_4bit", self.args(), capability=capability)
