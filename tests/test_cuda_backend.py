"""The CUDA C++ backend as Python sees it, without a GPU: which calls it takes, and what it hands to the kernels.

The kernels themselves run in `make test-native`, on an emulated GPU; here, stand-ins compute what they are asked for.
"""

from __future__ import annotations

import math

import pytest
import torch
from lora_cases import upstream
from torch.utils.dlpack import from_dlpack

import pyfinetune as pf
from pyfinetune._native import packed_fields
from pyfinetune.bench import gpu_nf4
from pyfinetune.ops import _cuda, _lora_linear_cuda, _lora_linear_triton, _nf4_cuda, nf4
from pyfinetune.ops._lora_linear_cpu import Needs
from pyfinetune.ops._op import REGISTRY
from pyfinetune.ops.lora_linear import prepare, reference, reference_bwd

STREAM = 1234


def decoded(fields, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    tensors = [None if part is None else from_dlpack(part) for part in fields[:6]]
    return nf4.dequantize_reference(*tensors, *fields[6:], (rows, cols), dtype)


def opened(*capsules):
    """The tensors, which must have what the kernels want: contiguous rows that do not overlap."""
    tensors = [None if part is None else from_dlpack(part) for part in capsules]
    for tensor in tensors:
        if tensor is not None and tensor.dim() == 2 and tensor.numel():
            assert tensor.shape[1] <= 1 or tensor.stride(1) == 1
            assert tensor.shape[0] <= 1 or tensor.stride(0) >= tensor.shape[1]
    return tensors


class Kernels:
    """What the native module has on a machine with a GPU, computed by torch in float64."""

    cuda_archs = "80,90"

    def __init__(self):
        self.calls = []

    def cuda_lora_linear(self, fields, out, inner, x, y, s, b, bias, scaling, path, stream):
        x, y, s, b, bias = opened(x, y, s, b, bias)
        assert stream == STREAM
        total = x.double() @ decoded(fields, out, inner, x.dtype).double().T
        if s is not None:
            total += scaling * s.double() @ b.double().T
        y.copy_(total if bias is None else total + bias)
        self.calls.append(path)

    def cuda_lora_linear_bwd(self, fields, out, inner, dout, dx, s, a, scaling, stream):
        dout, dx, s, a = opened(dout, dx, s, a)
        assert stream == STREAM
        total = dout.double() @ decoded(fields, out, inner, dout.dtype).double()
        dx.copy_(total if s is None else total + scaling * s.double() @ a.double())
        self.calls.append("bwd")

    def cuda_dequantize_4bit(self, fields, rows, cols, out, adapter, first, scaling, stream):
        out, adapter = opened(out, adapter)
        assert stream == STREAM
        out.zero_()
        out[:rows, :cols] = decoded(fields, rows, cols, out.dtype)
        if adapter is not None and out.shape[0] == rows:
            out[:, cols + first : cols + first + adapter.shape[1]] = scaling * adapter
        elif adapter is not None:
            out[rows:] = scaling * adapter


@pytest.fixture
def kernels(monkeypatch):
    made = Kernels()
    for module in (_lora_linear_cuda, _nf4_cuda):
        monkeypatch.setattr(module, "native", made)
        monkeypatch.setattr(module, "stream_of", lambda tensor: STREAM)
    return made


def arguments(dtype, rows=5, out=24, inner=40, rank=3, bias=True, nested=True, adapter_dtype=torch.float32):
    """The schema's arguments of lora_linear."""
    with pf.use_backend("cpu"):
        packed = pf.ops.quantize_4bit(torch.randn(out, inner, dtype=dtype), 32, double_quant=nested)
    x = torch.randn(rows, inner, dtype=dtype)
    a = b = None
    if rank is not None:
        a, b = torch.randn(rank, inner).to(adapter_dtype), torch.randn(out, rank).to(adapter_dtype)
    return prepare(x, packed, a, b, 0.7, torch.randn(out) if bias else None)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "apart": lambda x: torch.stack([x, x], 1).flatten(1)[:, : x.shape[1]],
    "one row for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", [{}, {"rank": None}, {"rank": 0}, {"bias": False, "nested": False}, {"rows": 0}], ids=str
)
def test_forward_and_backward(kernels, options, layout):
    dtype = torch.bfloat16
    x, *rest = arguments(dtype, **options)
    x = LAYOUTS[layout](x)
    y, s, z, norm = _lora_linear_cuda.forward(x, *rest)
    expected = reference(x.double(), *rest)
    eager = reference(x, *rest)
    assert kernels.calls == ["chosen"]
    assert [t.dtype for t in (y, s, z, norm)] == [t.dtype for t in eager]
    assert [t.shape for t in (y, s, z, norm)] == [t.shape for t in eager]
    torch.testing.assert_close(y.double(), expected[0], rtol=2**-6, atol=2**-5)
    *base_adapter, _bias = rest
    dout = LAYOUTS[layout](upstream(y, dtype).contiguous())
    needs = (True, False, rest[9] is not None, rest[9] is not None, True, False)
    got = _lora_linear_cuda.backward(dout, x, *base_adapter, s, z, norm, *needs)
    plain = reference_bwd(dout, x, *base_adapter, s, z, norm, *needs)
    exact = reference_bwd(dout.double(), x.double(), *base_adapter, s.double(), z, norm.double(), *needs)
    for one, other, right in zip(got, plain, exact, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        torch.testing.assert_close(one.double(), right.double(), rtol=2**-5, atol=2**-3)


def test_only_what_is_needed(kernels):
    x, *rest = arguments(torch.float16)
    _y, s, z, norm = _lora_linear_cuda.forward(x, *rest)
    dout = torch.randn(5, 24, dtype=torch.float16)
    grads = _lora_linear_cuda.backward(dout, x, *rest[:-1], s, z, norm, False, False, True, False, False, False)
    assert kernels.calls == ["chosen"]
    assert [grad.numel() for grad in grads] == [0, 0, 3 * 40, 0, 0, 0]


def test_decode_with_an_adapter(kernels):
    packed = pf.ops.quantize_4bit(torch.randn(6, 40), 32, double_quant=True)
    weight = pf.ops.dequantize_4bit(packed)
    fields = lambda: packed_fields(packed.tensors(), 32, packed.nested_block_size)  # noqa: E731
    a, b = torch.randn(3, 40), torch.randn(6, 3)
    beside, below = torch.full((6, 48), math.nan), torch.full((9, 40), math.nan)
    _nf4_cuda.decode_with_adapter(beside, fields(), 6, 40, b, 2, 0.5)
    _nf4_cuda.decode_with_adapter(below, fields(), 6, 40, a)
    assert torch.equal(beside, torch.cat([weight, torch.zeros(6, 2), 0.5 * b, torch.zeros(6, 3)], 1))
    assert torch.equal(below, torch.cat([weight, a]))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_has_weight_and_adapter_written_by_one_launch(kernels, monkeypatch, layout, adapter_dtype):
    """The same bits as decoding and writing the adapter after it; and none of it where Triton is forced."""
    x, *args = arguments(torch.bfloat16, nested=False, adapter_dtype=adapter_dtype)
    args[9:11] = [LAYOUTS[layout](tensor) for tensor in args[9:11]]
    launches = []
    written = kernels.cuda_dequantize_4bit
    kernels.cuda_dequantize_4bit = lambda *given: (launches.append(given[5]), written(*given))
    by_triton = lambda out, *packed: out.copy_(nf4.dequantize_reference(*packed))  # noqa: E731
    monkeypatch.setattr(_lora_linear_triton, "decode_into", by_triton)
    found = {}
    for by, why_not in (("cuda", None), ("triton", "no kernels")):
        monkeypatch.setattr(_nf4_cuda, "cuda_why_not", lambda *tensors, why_not=why_not: why_not)
        found[by] = _weights_with_adapters(x, args)
    assert launches == [0, 0]
    for one, other in zip(found["cuda"], found["triton"], strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, other)
    monkeypatch.setattr(_nf4_cuda, "cuda_why_not", lambda *tensors: None)
    with pf.use_backend("reference"):
        _weights_with_adapters(x, args)
    assert len(launches) == 2


def _weights_with_adapters(x, args):
    """[W | s B] of the forward pass and [W ; A] of the backward pass."""
    projections = _lora_linear_triton.projections_of(x, [args])
    forward = _lora_linear_triton.Forward(x, projections)
    s = x.new_empty((x.shape[0], projections[0].rank))
    needs = [Needs(False, True, True, False, False)]
    backward = _lora_linear_triton.Backward(x, projections, s, [None], [None], True, needs)
    beside = forward._widened(projections[0], forward.columns[0])
    return beside, backward._below(projections[0].lora_a.to(x.dtype))


class TestWhichCallsAreTaken:
    @pytest.fixture(autouse=True)
    def _a_gpu(self, monkeypatch):
        for module in (_lora_linear_cuda, _cuda):
            monkeypatch.setattr(module, "capability_of", lambda index: 90, raising=False)
        monkeypatch.setattr(_cuda, "native", Kernels())
        monkeypatch.setattr(_cuda, "tensors_why_not", lambda device, *tensors, dtypes: None)
        monkeypatch.setattr(_lora_linear_cuda, "triton_why_not", lambda *tensors: None)

    def test_a_plain_one(self):
        assert _lora_linear_cuda.why_not(*arguments(torch.bfloat16)) is None

    def test_no_others(self):
        why_not = _lora_linear_cuda.why_not
        assert "float32" in why_not(*arguments(torch.float32))
        assert "1025 rows" in why_not(*arguments(torch.bfloat16, rows=1025))
        x, *rest = arguments(torch.bfloat16)
        magnitude = [*rest[:14], torch.ones(24), rest[15]]
        assert "magnitude" in why_not(x, *magnitude)
        assert "dropout" in why_not(x, *rest[:12], 0.1, torch.tensor(1), *rest[14:])
        dense = prepare(x, torch.randn(24, 40), None, None, 1.0)
        assert "4 bits" in why_not(*dense)

    def test_triton_goes_first_until_something_is_measured(self, monkeypatch):
        op, args = REGISTRY["lora_linear"], arguments(torch.bfloat16)
        (cuda,) = [backend for backend in op.backends if backend.name == "cuda"]
        assert "not measured on sm_90" in cuda.steps_back(*args)
        assert op.choose(*args).name != "cuda"
        with pf.use_backend("cuda"):
            assert op.choose(*args).name == "cuda"
            assert op.explain(*args).backend == "cuda"
        assert "not measured" in str(op.explain(*args))
        monkeypatch.setitem(_lora_linear_cuda.MEASURED, 90, ((10**6, 64), (0, 4)))
        assert "above 4 rows" in cuda.steps_back(*args)
        assert cuda.steps_back(*arguments(torch.bfloat16, rows=4)) is None
        assert op.choose(*arguments(torch.bfloat16, rows=4)).name == "cuda"

    def test_it_goes_first_where_there_is_no_triton(self, monkeypatch):
        monkeypatch.setattr(_lora_linear_cuda, "triton_why_not", lambda *tensors: "triton is not installed")
        assert REGISTRY["lora_linear"].choose(*arguments(torch.bfloat16)).name == "cuda"


@pytest.mark.parametrize(
    ("capability", "archs", "reason"),
    [
        (89, "80,90", None),
        (86, "86", None),
        (80, "86", "built for sm_86, not for sm_80"),
        (120, "80,86,89,90,100", "built for sm_80, sm_86, sm_89, sm_90, sm_100, not for sm_120"),
        (121, "120", None),
    ],
)
def test_machine_code_runs_on_its_own_major_version(capability, archs, reason):
    assert _cuda.not_built_for(capability, archs) == reason


def test_forced_without_a_gpu():
    with (
        pf.use_backend("cuda"),
        pytest.raises(pf.BackendUnavailable, match=r"quantize_4bit: backend 'cuda' cannot run"),
    ):
        pf.ops.quantize_4bit(torch.randn(64))


@pytest.mark.parametrize("case", gpu_nf4.cases(quick=True), ids=lambda case: case.name)
def test_rows_of_the_table(case):
    """Every row's results are right, here on the backends of a CPU."""
    setup = case.build(torch.device("cpu"))
    assert "ours" in setup.calls
    assert any(name.startswith("ours, cuda") for name in {**setup.calls, **setup.missing})
    for name in setup.calls:
        verdict = setup.check[name]()
        assert verdict.ok, f"{name}: {verdict.detail}"
