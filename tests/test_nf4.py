"""Op nf4: quantize_4bit and dequantize_4bit."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys

import pytest
import torch
from backends import DTYPES, FAST_BACKENDS, INTERPRETED, native_kernels
from oracle import Guarded, layouts

import pyfinetune as pf
from pyfinetune._native import native
from pyfinetune.ops import nf4

BLOCK_SIZES = [32, 64, 4096] if INTERPRETED else list(nf4.BLOCK_SIZES)
SHAPES = [(4 if INTERPRETED else 64, 2720), (3, 5, 7), (1,), (4096,), (33,), (128, 129), (1000,), (2, 4096)]
SHAPES += [(0,), (4, 0)]


def name(value):
    return str(value).removeprefix("torch.")


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes.functional")


def weights(shape, dtype=torch.float32, zeros=True):
    w = torch.randn(shape) * torch.rand(shape).mul(6).sub(4).exp()
    if zeros and w.numel() > 100:
        w.view(-1)[:64] = 0  # a whole block of zeros
    return w.to(dtype)


def python_decode(packed: pf.Packed4bit, dtype: torch.dtype) -> torch.Tensor:
    """Element by element, in Python floats rounded to float32 after each operation: independent of the library."""

    def f32(x):
        return x.float().double()

    codes, numel = packed.codes.flatten().tolist(), 1
    for size in packed.shape:
        numel *= size
    values = []
    for i in range(numel):
        byte = codes[i // 2]
        code = byte & 15 if i % 2 else byte >> 4
        block = i // packed.block_size
        scale = packed.absmax.flatten()[block]
        if packed.double_quant:
            inner = f32(packed.nested_quant_map[int(scale)].double() * packed.nested_absmax[block // 256].double())
            scale = f32(inner + packed.nested_offset.double())
        values.append(f32(packed.quant_map[code].double() * scale.double()).item())
    return torch.tensor(values, dtype=torch.float64).float().reshape(packed.shape).to(dtype)


# 1. reference against float64


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
def test_reference_decodes_as_the_format_says(quant_type, double_quant):
    packed = pf.ops.quantize_4bit(weights((9, 37)), 32, quant_type, double_quant)
    with pf.use_backend("reference"):
        for dtype in DTYPES:
            assert torch.equal(pf.ops.dequantize_4bit(packed, dtype), python_decode(packed, dtype))


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
def test_every_code_is_the_nearest(quant_type):
    w = weights((64, 64))
    packed = pf.ops.quantize_4bit(w, 64, quant_type)
    exact = w.double().view(-1, 64) / packed.absmax.double()[:, None].clamp(min=1e-30)
    table = packed.quant_map.double()
    decoded = pf.ops.dequantize_4bit(packed, torch.float32).double().view(-1, 64)
    chosen = (exact - decoded / packed.absmax.double()[:, None].clamp(min=1e-30)).abs()
    nearest = (exact[..., None] - table).abs().amin(dim=-1)
    # Normalising in float32 moves a value by at most an ulp of 1.
    assert (chosen - nearest).max() < 2**-22


def test_scales_are_the_largest_magnitudes():
    w = weights((7, 100))
    packed = pf.ops.quantize_4bit(w, 32)
    blocks = torch.nn.functional.pad(w.flatten(), (0, -w.numel() % 32)).view(-1, 32)
    assert torch.equal(packed.absmax, blocks.abs().amax(dim=1))


# 2. gradcheck


def test_codes_and_decoded_weights_carry_no_gradient():
    w = torch.randn(8, 64, requires_grad=True)
    packed = pf.ops.quantize_4bit(w)
    assert not packed.codes.requires_grad
    assert not pf.ops.dequantize_4bit(packed).requires_grad
    assert w.grad is None


# 3. every backend against the reference


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
def test_backends_give_the_reference_bits(quant_type, dtype, shape):
    for block_size in BLOCK_SIZES:
        for double_quant in (False, True):
            w = weights(shape, dtype)
            with pf.use_backend("reference"):
                expected = pf.ops.quantize_4bit(w, block_size, quant_type, double_quant)
                decoded = {d: pf.ops.dequantize_4bit(expected, d) for d in DTYPES}
            for backend in FAST_BACKENDS:
                with pf.use_backend(backend):
                    packed = pf.ops.quantize_4bit(w, block_size, quant_type, double_quant)
                    for ours, theirs in zip(packed.tensors(), expected.tensors(), strict=True):
                        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
                    for d in DTYPES:
                        assert torch.equal(pf.ops.dequantize_4bit(packed, d), decoded[d])


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_bytes_and_values_are_bitsandbytes(bnb, dtype, quant_type):
    for shape in SHAPES[:-2]:
        for block_size in BLOCK_SIZES:
            for double_quant in (False, True):
                w = weights(shape, dtype)
                ours = pf.ops.quantize_4bit(w, block_size, quant_type, double_quant)
                codes, state = bnb.quantize_4bit(
                    w, blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant
                )
                assert torch.equal(ours.codes, codes)
                assert torch.equal(ours.absmax, state.absmax)
                assert torch.equal(ours.quant_map, state.code)
                if double_quant:
                    assert torch.equal(ours.nested_absmax, state.state2.absmax)
                    assert torch.equal(ours.nested_quant_map, state.state2.code)
                    assert torch.equal(ours.nested_offset, state.offset)
                if shape[-1] % block_size == 0:  # elsewhere its decoder is wrong; see the named regressions
                    assert torch.equal(pf.ops.dequantize_4bit(ours), bnb.dequantize_4bit(codes, state).view(shape))


@pytest.mark.skipif(INTERPRETED, reason="two million values are too many for Python")
def test_many_scales_are_nested_as_bitsandbytes_does(bnb):
    w = weights((1024, 2048), zeros=False)
    w[100:200] = 0
    ours = pf.ops.quantize_4bit(w, 32, "nf4", True)
    _codes, state = bnb.quantize_4bit(w, blocksize=32, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)


@native_kernels
@pytest.mark.parametrize("isa", native.isas())
def test_every_instruction_set_gives_the_same_bits(isa):
    script = (
        "import hashlib, torch, pyfinetune as pf\n"
        "torch.manual_seed(3)\n"
        "digest = hashlib.sha256()\n"
        "for dtype in (torch.float32, torch.float16, torch.bfloat16):\n"
        "    w = (torch.randn(37, 2051) * torch.rand(37, 1)).to(dtype)\n"
        "    for kind in ('nf4', 'fp4'):\n"
        "        packed = pf.ops.quantize_4bit(w, 64, kind, True)\n"
        "        for tensor in (*packed.tensors(), *(pf.ops.dequantize_4bit(packed, d)\n"
        "                       for d in (torch.float32, torch.float16, torch.bfloat16))):\n"
        "            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())\n"
        "print(pf._native.native.isa(), digest.hexdigest())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYFINETUNE_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    torch.manual_seed(3)
    digest, dtypes = hashlib.sha256(), (torch.float32, torch.float16, torch.bfloat16)  # in the script's order
    with pf.use_backend("reference"):
        for dtype in dtypes:
            w = (torch.randn(37, 2051) * torch.rand(37, 1)).to(dtype)
            for kind in nf4.QUANT_TYPES:
                packed = pf.ops.quantize_4bit(w, 64, kind, True)
                for tensor in (*packed.tensors(), *(pf.ops.dequantize_4bit(packed, d) for d in dtypes)):
                    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    assert run.stdout.split() == [isa, digest.hexdigest()]


# 4. layouts


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_any_layout_of_the_weight(dtype):
    w = weights((66, 130), dtype)
    expected = pf.ops.quantize_4bit(w)
    for layout, view in layouts(w).items():
        before = view.clone()
        packed = pf.ops.quantize_4bit(view)
        assert torch.equal(packed.codes, expected.codes), layout
        assert torch.equal(packed.absmax, expected.absmax), layout
        assert torch.equal(view, before)


def test_any_layout_of_the_packed_parts():
    packed = pf.ops.quantize_4bit(weights((66, 130)), 64, "nf4", True)
    expected = pf.ops.dequantize_4bit(packed)
    for field in ("codes", "absmax", "quant_map", "nested_absmax", "nested_quant_map"):
        for layout, view in layouts(getattr(packed, field)).items():
            assert torch.equal(pf.ops.dequantize_4bit(dataclasses.replace(packed, **{field: view})), expected), (
                f"{field}, {layout}"
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_out_is_filled_and_nothing_around_it(dtype):
    for shape in [(1,), (5, 77), (64, 64), (3, 1000), (16 if INTERPRETED else 512, 2048)]:
        packed = pf.ops.quantize_4bit(weights(shape))
        guarded = Guarded(shape, dtype, margin=257)
        assert pf.ops.dequantize_4bit(packed, out=guarded.tensor) is guarded.tensor
        assert torch.equal(guarded.tensor, pf.ops.dequantize_4bit(packed, dtype))
        guarded.check()


def test_expanded_weight():
    w = torch.randn(1, 64).expand(8, 64)
    assert torch.equal(pf.ops.quantize_4bit(w).codes, pf.ops.quantize_4bit(w.contiguous()).codes)


# 5. edge shapes


@pytest.mark.parametrize("numel", [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 4095, 4096, 4097])
def test_every_tail(numel):
    w = weights((numel,))
    for block_size in (32, 64, 4096):
        packed = pf.ops.quantize_4bit(w, block_size)
        assert packed.codes.shape == ((numel + 1) // 2, 1)
        assert packed.absmax.shape == ((numel + block_size - 1) // block_size,)
        with pf.use_backend("reference"):
            expected = pf.ops.dequantize_4bit(packed)
        assert torch.equal(pf.ops.dequantize_4bit(packed), expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, where Triton is interpreted
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_no_numbers_stay_in_their_block(value):
    w = weights((4, 64), zeros=False)
    clean = pf.ops.dequantize_4bit(pf.ops.quantize_4bit(w))
    w[1, 5] = value
    for backend in ("reference", *FAST_BACKENDS):
        with pf.use_backend(backend):
            decoded = pf.ops.dequantize_4bit(pf.ops.quantize_4bit(w))
        assert torch.equal(decoded[[0, 2, 3]], clean[[0, 2, 3]])
        assert not decoded[1].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_the_half_byte_past_the_end_is_a_zeros(value):
    for backend in ("reference", *FAST_BACKENDS):
        with pf.use_backend(backend):
            assert pf.ops.quantize_4bit(torch.full((65,), value)).codes[-1] & 15 == 7


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_tiny_and_huge_magnitudes():
    for scale in (1e-44, 1e-40, 1e-38, 1e-30, 1e30, 3e38):
        w = torch.rand(4, 64).mul(2).sub(1) * scale
        with pf.use_backend("reference"):
            expected = pf.ops.quantize_4bit(w)
        packed = pf.ops.quantize_4bit(w)
        assert torch.equal(packed.codes, expected.codes)
        assert torch.equal(packed.absmax, expected.absmax)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"absmax": torch.ones(1)}, r"absmax has 1 element, needs 128 \(8192 values / block_size 64\)"),
        ({"absmax": torch.ones(129)}, "absmax has 129 elements, needs 128"),
        ({"absmax": torch.ones(128, dtype=torch.float16)}, "absmax is float16, needs float32"),
        ({"codes": torch.zeros(4095, 1, dtype=torch.uint8)}, "codes has 4095 bytes, needs 4096"),
        ({"codes": torch.zeros(4096, 1, dtype=torch.int64)}, "codes is int64, needs uint8"),
        ({"quant_map": torch.ones(8)}, "quant_map has 8 elements, needs 16"),
        ({"block_size": 0}, "block_size is 0, needs one of"),
        ({"block_size": 48}, "block_size is 48, needs one of"),
        ({"block_size": 2**62}, f"block_size is {2**62}, needs one of"),
        ({"shape": (64, -128)}, "has a negative size"),
        ({"dtype": torch.int8}, "dtype is torch.int8, needs float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_parts_that_do_not_fit_are_named(change, message):
    packed = dataclasses.replace(pf.ops.quantize_4bit(torch.randn(64, 128)), **change)
    with pytest.raises(pf.InvalidInput, match=f"dequantize_4bit: .*{message}"):
        pf.ops.dequantize_4bit(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nested_absmax": torch.ones(2)}, "nested_absmax has 2 elements, needs 1"),
        ({"nested_quant_map": torch.ones(255)}, "nested_quant_map has 255 elements, needs 256"),
        ({"nested_offset": torch.ones(2)}, "nested_offset has 2 elements, needs 1"),
        ({"nested_block_size": 0}, "nested_block_size is 0, needs a power of two"),
        ({"absmax": torch.ones(128)}, "absmax is float32, needs uint8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_nested_parts_that_do_not_fit_are_named(change, message):
    packed = dataclasses.replace(pf.ops.quantize_4bit(torch.randn(64, 128), double_quant=True), **change)
    with pytest.raises(pf.InvalidInput, match=message):
        pf.ops.dequantize_4bit(packed)


def test_wrong_arguments_are_named():
    with pytest.raises(pf.InvalidInput, match="quantize_4bit: weight is int64, needs float32 or float16 or bfloat16"):
        pf.ops.quantize_4bit(torch.arange(64))
    with pytest.raises(pf.InvalidInput, match="quantize_4bit: weight is list, needs a tensor"):
        pf.ops.quantize_4bit([1.0])
    with pytest.raises(pf.InvalidInput, match="block_size is 48"):
        pf.ops.quantize_4bit(torch.randn(64), block_size=48)
    with pytest.raises(pf.InvalidInput, match="quant_type is 'int4'"):
        pf.ops.quantize_4bit(torch.randn(64), quant_type="int4")
    packed = pf.ops.quantize_4bit(torch.randn(64))
    with pytest.raises(pf.InvalidInput, match=r"out is \[32\], needs \[64\]"):
        pf.ops.dequantize_4bit(packed, out=torch.empty(32))
    with pytest.raises(pf.InvalidInput, match="out is not contiguous"):
        pf.ops.dequantize_4bit(packed, out=torch.empty(128)[::2])
    with pytest.raises(pf.InvalidInput, match="packed is Tensor, needs a Packed4bit"):
        pf.ops.dequantize_4bit(packed.codes)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    numel = 2**31 + 4097
    codes = torch.randint(0, 256, ((numel + 1) // 2, 1), dtype=torch.uint8)
    absmax = torch.rand((numel + 63) // 64)
    packed = pf.Packed4bit(
        codes, absmax, nf4.QUANT_MAPS["nf4"], None, None, None, 64, 0, "nf4", (numel,), torch.bfloat16
    )
    out = pf.ops.dequantize_4bit(packed)
    for start in (0, 2**30, 2**31 - 64 * 5, numel - 4097 - 64):
        start = start // 64 * 64
        piece = dataclasses.replace(
            packed,
            codes=codes[start // 2 : start // 2 + 2048],
            absmax=absmax[start // 64 : start // 64 + 64],
            shape=(4096,),
        )
        with pf.use_backend("reference"):
            assert torch.equal(out[start : start + 4096], pf.ops.dequantize_4bit(piece))


# 6. opcheck, fullgraph and dynamic compile


def test_opcheck():
    packed = pf.ops.quantize_4bit(torch.randn(6, 70), 32, "nf4", True)
    plain = pf.ops.quantize_4bit(torch.randn(6, 70), 32)
    args = (*packed.tensors(), 32, 256, [6, 70], torch.bfloat16)
    torch.library.opcheck(torch.ops.pyfinetune.dequantize_4bit.default, args)
    torch.library.opcheck(
        torch.ops.pyfinetune.dequantize_4bit.default, (*plain.tensors(), 32, 0, [6, 70], torch.float32)
    )
    torch.library.opcheck(
        torch.ops.pyfinetune.dequantize_4bit_out.default, (*args, torch.empty(6, 70, dtype=torch.bfloat16))
    )
    torch.library.opcheck(torch.ops.pyfinetune.quantize_4bit.default, (torch.randn(6, 70), 64, "fp4"))
    torch.library.opcheck(torch.ops.pyfinetune.quantize_absmax.default, (torch.randn(300), nf4.NESTED_NEAREST, 256))


def test_fullgraph_compile_and_dynamic_shapes():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def round_trip(w):
        return pf.ops.dequantize_4bit(pf.ops.quantize_4bit(w, 64)) * 2

    for rows in (4, 6, 9):
        w = torch.randn(rows, 64)
        assert torch.equal(round_trip(w), pf.ops.dequantize_4bit(pf.ops.quantize_4bit(w, 64)) * 2)


def test_checks_also_run_while_tracing():
    packed = dataclasses.replace(pf.ops.quantize_4bit(torch.randn(64, 128)), absmax=torch.ones(1))
    compiled = torch.compile(pf.ops.dequantize_4bit, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="absmax has 1 element, needs 128"):
        compiled(packed)


# 7. determinism


def test_same_bits_a_hundred_times():
    w = weights((16 if INTERPRETED else 256, 512), DTYPES[-1] if INTERPRETED else torch.bfloat16)
    packed = pf.ops.quantize_4bit(w, 64, "nf4", True)
    decoded = pf.ops.dequantize_4bit(packed)
    for _ in range(5 if INTERPRETED else 100):
        again = pf.ops.quantize_4bit(w, 64, "nf4", True)
        assert torch.equal(again.codes, packed.codes)
        assert torch.equal(again.absmax, packed.absmax)
        assert torch.equal(pf.ops.dequantize_4bit(packed), decoded)


@native_kernels
def test_bits_do_not_depend_on_the_thread_count():
    w = weights((300, 1000))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            packed = pf.ops.quantize_4bit(w, 64, "nf4", True)
            results.append((packed.codes, packed.absmax, pf.ops.dequantize_4bit(packed)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# 8. named regressions


def test_row_that_is_no_multiple_of_the_block(bnb):
    """bitsandbytes 0.50.2 decodes 89 % of shape (64, 2720), block 64, wrongly: blocks restart by row."""
    w = weights((64, 2720), zeros=False)
    packed = pf.ops.quantize_4bit(w, 64)
    decoded = pf.ops.dequantize_4bit(packed)
    assert torch.equal(decoded, python_decode_fast(packed))
    assert (decoded - w).abs().max() <= packed.absmax.max() * 0.16


def python_decode_fast(packed):
    nibbles = torch.stack([packed.codes.flatten() >> 4, packed.codes.flatten() & 15], dim=1).flatten()
    scales = packed.absmax.repeat_interleave(packed.block_size)
    values = packed.quant_map[nibbles.long()][: scales.numel()] * scales[: nibbles.numel()]
    return values[: torch.Size(packed.shape).numel()].view(packed.shape)


def test_strided_codes_and_scales():
    """bitsandbytes reads the memory behind a strided `packed` or `absmax` as if it were contiguous."""
    packed = pf.ops.quantize_4bit(torch.randn(64, 128))
    strided = dataclasses.replace(
        packed,
        codes=torch.stack([packed.codes, packed.codes + 1], dim=-1)[..., 0],
        absmax=torch.stack([packed.absmax, packed.absmax + 1], dim=-1)[..., 0],
    )
    assert torch.equal(pf.ops.dequantize_4bit(strided), pf.ops.dequantize_4bit(packed))


def test_absmax_too_short_is_refused_in_eager():
    """bitsandbytes reads out of bounds when `absmax` is too short: its check runs only while tracing."""
    packed = dataclasses.replace(pf.ops.quantize_4bit(torch.randn(64, 128)), absmax=torch.ones(1))
    with pytest.raises(pf.InvalidInput, match="absmax has 1 element, needs 128"):
        pf.ops.dequantize_4bit(packed)


def test_int64_weight_and_absurd_block_size_are_refused():
    """bitsandbytes accepts int64 input and a block size of 2^62 in eager mode."""
    with pytest.raises(pf.InvalidInput, match="weight is int64"):
        torch.ops.pyfinetune.quantize_4bit(torch.arange(64), 64, "nf4")
    with pytest.raises(pf.InvalidInput, match="block_size is"):
        torch.ops.pyfinetune.quantize_4bit(torch.randn(64), 2**62, "nf4")


def test_all_zero_block():
    """bitsandbytes #1744: an all-zero block crashed; it must decode to zero (of either sign)."""
    packed = pf.ops.quantize_4bit(torch.zeros(3, 64), double_quant=True)
    assert (pf.ops.dequantize_4bit(packed) == 0).all()


def test_partial_last_block_is_written():
    """bitsandbytes #1884: the partial last block came back uninitialised."""
    w = torch.randn(2, 65)
    decoded = pf.ops.dequantize_4bit(pf.ops.quantize_4bit(w, 64))
    assert decoded.isfinite().all()
    assert (decoded - w).abs().max() < 1.0


@native_kernels
def test_scales_are_not_written_past_their_end():
    """bitsandbytes #2042: absmax was stored past the end of its buffer."""
    w = torch.randn(3, 65)
    codes, absmax = Guarded((98, 1), torch.uint8), Guarded((4,), torch.float32)
    from pyfinetune._native import capsule

    native.quantize_4bit(capsule(w), "nf4", 64, capsule(codes.tensor), capsule(absmax.tensor), 2)
    codes.check()
    absmax.check()
    assert torch.equal(codes.tensor, pf.ops.quantize_4bit(w, 64).codes)


def test_machines_without_avx512_are_served():
    """bitsandbytes #2021: SIGILL on CPUs without AVX-512; every build must hold a table that runs anywhere."""
    assert native.isas()[-1] == "scalar"
