"""What the benchmark can be asked for, and what it measures beside time: passes, memory, where a step's time goes."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from pyfinetune.bench import bench_step, cases_of, fused_peers, module_of, op_names, step_models
from pyfinetune.bench import request as request_module
from pyfinetune.bench.breakdown import ATTENTION, DECODE, GROUPS, HEAD, LINEAR, time_by_group
from pyfinetune.bench.harness import OURS, Case, Passes, Setup, Verdict, interleave, measure
from pyfinetune.bench.memory import peak_mb
from pyfinetune.bench.peer_names import COMPILED, EAGER, FLASH, FLEX, LIGER, PEERS, UNSLOTH, VARLEN, Choice, peer_list
from pyfinetune.bench.request import Request
from pyfinetune.bench.shapes import DTYPES, MODELS, Model, parse
from pyfinetune.errors import UserError
from pyfinetune.machine import info

CPU = torch.device("cpu")
CUDA = torch.device("cuda")  # a name only; nothing is put there
RATES = {"copy_gbs": 10.0, "gemm_bf16_gflops": 400.0, "gemm_fp32_gflops": 100.0}
TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(autouse=True)
def small_yardsticks(monkeypatch):
    monkeypatch.setattr("pyfinetune.bench.ceilings._COPY_BYTES", 1 << 20)
    monkeypatch.setattr("pyfinetune.bench.ceilings._GEMM_SIZE", 64)


class TestShapes:
    @pytest.mark.parametrize("name", MODELS)
    def test_every_model_has_cases_of_every_op(self, name):
        cases = Request(shapes=(f"model:{name}",)).cases()
        assert {case.op for case in cases} == set(op_names()) - {"step"}
        assert all(max(case.flops, case.bytes) > 0 for case in cases)
        model = MODELS[name]
        assert model.heads % model.kv_heads == 0
        (head,) = [case for case in cases if case.op == "linear_cross_entropy" and "ignored" not in case.name]
        assert head.flops == 4.0 * 1024 * model.hidden * model.vocab

    def test_a_plain_shape_and_more_than_one(self):
        request = Request(("nf4", "lora_linear"), shapes=("3,64,128", "5,64,128"))
        cases = request.cases()
        assert len({(case.op, case.name) for case in cases}) == len(cases)
        assert sum(case.name.startswith("LoRA linear 64x128, M 3") for case in cases) == 1
        assert Request(shapes=("3,64,128",)).left_out() == ["rope", "step", "varlen_attn"]

    def test_documents(self):
        assert parse("model:qwen3-4b", 600).documents == [256, 256, 88]
        assert parse("model:qwen3-4b", quick=True).tokens == 128

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("op", sorted(set(op_names()) - {"step"}))
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_odd_shapes_are_right(self, monkeypatch, op, dtype):
        monkeypatch.setitem(MODELS, "tiny", Model(64, 96, 2, 2, 1, 64, 300))
        cases = Request((op,), shapes=("model:tiny",), tokens=70, dtype=dtype).cases()
        if op not in ("rope", "varlen_attn"):
            cases += Request((op,), shapes=("5,64,128",), dtype=dtype).cases()
        for case in cases:
            measured = measure(case, CPU, RATES, 0.0, once=False)
            assert measured["results"][OURS]["ok"], (case.name, measured["results"][OURS])


class TestRequest:
    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            (Request(("nf5",)), "no benchmark for 'nf5'.*choose from: glu"),
            (Request(shapes=("model:gpt-5",)), "no model that the benchmark knows.*llama-3.2-1b"),
            (Request(shapes=("1,2",)), "neither model:NAME nor M,N,K"),
            (Request(shapes=("1,2,x",)), "neither model:NAME nor M,N,K"),
            (Request(shapes=("0,64,64",)), "have to be 1 or more"),
            (Request(shapes=("1,64,64",), tokens=8), "--tokens 8: M of --shapes"),
            (Request(shapes=("model:qwen3-4b",), tokens=0), "--tokens 0: has to be 1 or more"),
            (Request(tokens=8), "--tokens: needs"),
            (Request(("rope",), shapes=("1,64,64",)), "bench rope: there are no cases of 1,64,64"),
            (Request(("step",), shapes=("model:qwen3-4b",)), "fix: pyfinetune bench step --model NAME"),
            (Request(dtype="int4"), "--dtype int4: is not one of bf16, fp32, fp16"),
            (Request(backend="tpu"), "--backend tpu: is not one of cuda, triton, cpu, reference"),
            (Request(peers=("unslot",)), "--peer unslot: is not one of eager, compile"),
            (Request(peers=("flash-attn",)), "--peer flash-attn: cannot run here.*NVIDIA"),
            (Request(device="tpu"), "neither cpu nor cuda"),
            (Request(method="lora"), "--method: needs --model"),
            (Request(packed=True), "--packed: needs --model"),
            (Request(("nf4",), model="qwen3-4b"), "--model: is for a whole step, nf4 is not"),
            (Request(model="qwen3-4b", shapes=("1,2,3",)), "--model: is for a whole step, --shapes is not"),
            (Request(model="qwen3-4b", method="galore"), "--method galore: is not one of lora, qlora, dora"),
            (Request(model="qwen3-4b", layers=37), "--layers 37: qwen3-4b has 36 layers"),
            (Request(model="qwen3-4b", tokens=1), "needs 2 or more"),
            (Request(model="/no/such/config.json"), "is no configuration that can be read"),
        ],
    )
    def test_mistakes(self, request_, message):
        with pytest.raises(UserError, match=f"(?s){message}"):
            request_.check()

    def test_what_this_machine_lacks(self, monkeypatch):
        facts = info() | {
            "gpus": [],
            "backends": {"cuda": "no GPU", "triton": "no GPU", "cpu": None, "reference": None},
        }
        monkeypatch.setattr(request_module, "info", lambda: facts)
        with pytest.raises(UserError, match="sees no GPU"):
            Request(device="cuda").check()
        with pytest.raises(UserError, match=r"(?s)--backend triton: cannot run here: no GPU.*cpu, reference"):
            Request(backend="triton").check()

    def test_travels_as_json(self):
        request = Request(("nf4",), True, ("1,2,3",), None, "bf16", "cpu", ("peft",), seconds=0.5)
        assert Request.from_json(request.to_json()) == request

    def test_dtype(self):
        kinds = {case.op: case.dtype for case in Request(dtype="fp32", quick=True).cases()}
        assert set(kinds) == set(op_names()) - {"step"}
        assert set(kinds.values()) == {torch.float32}
        names = [case.name for case in Request(("nf4",), dtype="fp32").cases()]
        assert names == ["decode NF4 4096² to fp32"]  # of the table, where it has some

    def test_a_model_that_does_not_fit(self):
        (case,) = Request(model="llama-3.1-70b").cases()
        with pytest.raises(UserError, match=r"(?s)70.*GB.*fewer layers: --layers"):
            case.build(CPU)


class TestPeers:
    def test_list(self):
        rows = peer_list("cpu", ())
        assert set(rows) == set(PEERS)
        assert rows["eager"] == {"version": torch.__version__, "missing": None, "left_out": None}
        assert "NVIDIA GPUs only" in rows["liger"]["missing"]
        assert "--peer compile" in rows["compile"]["left_out"]
        assert peer_list("cpu", ("eager",))["peft"]["left_out"] == "not asked for"

    def test_choice(self):
        assert Choice().includes(EAGER)
        assert not Choice().includes(COMPILED, marked=True)
        assert Choice(full=True).includes(COMPILED, marked=True)
        assert not Choice(full=True).includes(COMPILED)
        assert Choice(("compile",)).includes(COMPILED)
        assert not Choice(("compile",)).includes(EAGER)

    def test_every_label_belongs_to_a_peer(self):
        """A peer that no `--peer` names could never be left out."""
        known = {label for peer in PEERS.values() for label in peer.labels}
        for case in cases_of([], quick=True):
            if case.op in ("glu", "rope", "nf4", "rms_norm"):
                assert set(case.build(CPU).calls) - {OURS} <= known

    def test_only_the_chosen_one_is_measured(self):
        (case, *_) = module_of("glu").cases(quick=True)
        got = measure(case, CPU, RATES, 0.0, Choice(("sdpa-mask",)), once=False)
        assert list(got["results"]) == [OURS]

    def test_full_runs_compile_for_a_few_cases(self):
        marked = [case.op for case in cases_of([]) if case.compiled]
        assert marked == ["glu", "linear_cross_entropy", "rms_norm", "varlen_attn"]
        assert not any(case.compiled for case in cases_of([]) if case.tokens)

    def test_other_packages_are_called_by_their_public_functions(self, monkeypatch):
        """With stand-ins for the packages, which cannot run here, the wiring gives what plain torch gives."""

        def norm(x, weight, eps, offset=0.0, casting_mode="llama", in_place=True):
            assert not in_place
            return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)

        def fast_norm(layer, x, gemma=False):
            return torch.nn.functional.rms_norm(x, layer.weight.shape, layer.weight, layer.variance_epsilon)

        def head(hidden, weight, labels, reduction="mean"):
            return torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction=reduction)

        def flash(q, k, v, cu_q, cu_k, max_q, max_k, causal=False):
            assert causal
            assert (max_q, max_k) == (3, 3)
            assert cu_q.tolist() == cu_k.tolist() == [0, 2, 5]
            return q

        liger = {"liger_rms_norm": norm, "liger_fused_linear_cross_entropy": head, "liger_swiglu": torch.add}
        stand_ins = {
            "liger_kernel": {},
            "liger_kernel.transformers": {},
            "liger_kernel.transformers.functional": liger,
            "unsloth": {},
            "unsloth.kernels": {"fast_rms_layernorm": fast_norm},
            "flash_attn": {"flash_attn_varlen_func": flash},
        }
        for name, entries in stand_ins.items():
            module = types.ModuleType(name)
            vars(module).update(entries)
            monkeypatch.setitem(sys.modules, name, module)
        x, weight = torch.randn(4, 8), torch.rand(8)
        found, missing = fused_peers.functions("rms_norm", CUDA, eps=1e-6)
        assert list(found) == [UNSLOTH, LIGER]
        assert missing == {}
        for function in found.values():
            assert torch.allclose(function(x, weight), torch.nn.functional.rms_norm(x, (8,), weight, 1e-6))
        found, _ = fused_peers.functions("head", CUDA)
        labels = torch.tensor([0, 1, 2, 0])
        assert found[LIGER](x, torch.randn(3, 8), labels, "none").shape == (4,)
        found, missing = fused_peers.functions("rope", CUDA)
        assert found == {}
        assert "liger_rope" in missing[LIGER]
        found, missing = fused_peers.attentions([0, 2, 5], CUDA, torch.bfloat16, True)
        assert set(found) == {FLEX, VARLEN, FLASH}
        monkeypatch.setattr(torch, "tensor", lambda values, dtype, device: torch.IntTensor(values))
        q = torch.randn(5, 2, 8)
        assert found[FLASH](q, q, q) is q
        assert fused_peers.attentions([0, 2], CUDA, torch.float32, True)[0].keys() == {FLEX}

    def test_on_a_cpu_there_are_none(self):
        assert fused_peers.functions("rms_norm", CPU, eps=1e-6) == ({}, {})
        found, missing = fused_peers.attentions([0, 2], CPU, torch.bfloat16, True)
        assert found == {}
        assert missing == {FLEX: "has no backward pass on a CPU"}

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        ("op", "peer", "label"), [("rms_norm", "compile", COMPILED), ("varlen_attn", "flex", FLEX)]
    )
    def test_what_torch_compiles(self, op, peer, label):
        case = module_of(op).cases(quick=True)[-1]
        got = measure(case, CPU, RATES, 0.0, Choice((peer,)), once=False)
        assert got["results"][label]["ok"], got["results"]

    def test_a_peer_that_fails_takes_no_one_along(self):
        def fail():
            raise RuntimeError("no kernel\nfor this")

        calls = {OURS: lambda i: None, "peer": lambda i: None}
        setup = Setup(calls, {OURS: lambda: Verdict(True, ""), "peer": fail})
        got = measure(Case("o", "c", lambda device: setup, bytes=1.0), CPU, RATES, 0.0)
        assert got["results"]["peer"] == {"ok": False, "detail": "RuntimeError: for this"}
        assert got["results"][OURS]["ms"] >= 0


class TestPasses:
    def test_halves_are_timed_apart(self):
        seen = []
        call = Passes(lambda i: seen.append(("f", i)) or i, lambda i, made: seen.append(("b", i, made)))
        call(7)
        assert seen == [("f", 7), ("b", 7, 7)]
        halves = {}
        times = interleave({"a": call, "b": lambda i: None}, 0.0, halves=halves)
        assert halves["b"] == []
        assert len(halves["a"]) == len(times["a"])
        assert all(f + b == pytest.approx(t) for (f, b), t in zip(halves["a"], times["a"], strict=True))

    def test_they_are_in_the_result(self):
        (case, *_) = module_of("rope").cases(quick=True)
        ours = measure(case, CPU, RATES, 0.0)["results"][OURS]
        assert ours["forward"]["ms"] + ours["backward"]["ms"] < 2 * ours["ms_q3"]
        assert ours["peak_mb"]["both"] == max(ours["peak_mb"].values())


class TestMemory:
    def test_peak_is_what_is_alive_at_once(self):
        mega = 1 << 20

        def forward(i):
            first = torch.zeros(2 * mega, dtype=torch.uint8)
            second = first.clone()
            del first
            return second

        def backward(i, made):
            return made.clone(), made.clone()

        assert peak_mb(forward, None, CPU) == {"both": 4.0}
        assert peak_mb(forward, backward, CPU) == {"both": 6.0, "forward": 4.0, "backward": 6.0}

    def test_scratch_past_torch_is_seen(self):
        pytest.importorskip("resource")

        def forward(i):
            scratch = bytearray(64 << 20)
            scratch[::4096] = b"x" * len(scratch[::4096])
            return torch.zeros(1 << 20, dtype=torch.uint8)

        assert peak_mb(forward, None, CPU)["both"] > 60


class TestBreakdown:
    def test_groups(self):
        x, head = torch.randn(64, 256), torch.randn(999, 256)
        q = torch.randn(1, 4, 64, 64)

        def call(i):
            torch.mm(x, x.T)
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
            torch.nn.functional.cross_entropy(x @ head.T, torch.zeros(64, dtype=torch.long))

        call(0)
        found = time_by_group(call, CPU, 999)
        assert list(found) == list(GROUPS)
        assert min(found[LINEAR], found[ATTENTION], found[HEAD]) > 0
        assert found[DECODE] == 0
        assert time_by_group(call, CPU)[LINEAR] > 0


class TestStep:
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("method", ["qlora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("lora", "dora"))])
    def test_every_way_is_right(self, tmp_path, method):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(TINY))
        request = Request(("step",), model=str(path), method=method, tokens=290, packed=True)
        (case,) = request.cases()
        assert "290 tokens in 2 documents packed" in case.name
        got = measure(case, CPU, RATES, 0.0)
        assert {name: found["ok"] for name, found in got["results"].items()} == dict.fromkeys(got["results"], True)
        assert len(got["results"]) == 3
        assert got["tokens"] == 290
        for found in got["results"].values():
            assert found["resident_mb"] > 0
            assert found["parts_ms"][LINEAR] > 0
        assert sum(got["parts_floor_ms"].values()) == pytest.approx(got["floor_ms"])

    def test_without_bitsandbytes(self, monkeypatch):
        real = step_models.peers.why_missing
        monkeypatch.setattr(
            step_models.peers, "why_missing", lambda *names: "absent" if "bitsandbytes" in names else real(*names)
        )
        ways = step_models.make(step_models.Recipe("tiny", TINY, "qlora"), CPU)
        assert list(ways.models) == [OURS, "transformers + PEFT"]
        assert list(ways.missing.values()) == ["absent"]

    def test_a_step_that_is_wrong_gets_no_time(self, monkeypatch):
        real = step_models.make

        def spoiled(recipe, device):
            ways = real(recipe, device)
            with torch.no_grad():
                for name, parameter in ways.models[OURS].named_parameters():
                    if "lora_A" in name:
                        parameter.mul_(1.5)
            return ways

        monkeypatch.setattr(step_models, "make", spoiled)
        case = bench_step.case_of(step_models.Recipe("tiny", TINY), [64])
        ours = measure(case, CPU, RATES, 0.0)["results"][OURS]
        assert not ours["ok"]
        assert "ms" not in ours

    def test_no_configuration_of_a_language_model(self, tmp_path):
        path = tmp_path / "config.json"
        for text in ('{"model_type": "llama"}', '{"model_type": "nonsense"}', "[]", "{"):
            path.write_text(text)
            with pytest.raises(UserError, match="is no configuration"):
                Request(model=str(path)).check()
