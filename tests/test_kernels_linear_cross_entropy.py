"""The Triton kernels of linear cross-entropy apart from the op: tile boundaries, the device's list of tokens, labels
that no kernel may read, and what is chosen where. All but the choices run under the interpreter only."""

from __future__ import annotations

import math

import pytest
import torch
from backends import INTERPRETED
from cross_entropy_cases import IGNORED, hold_to_the_oracle, make
from oracle import Guarded

import pyfinetune as pf

pytest.importorskip("triton")

from pyfinetune.kernels import linear_cross_entropy as kernels
from pyfinetune.kernels import linear_cross_entropy_products as products
from pyfinetune.ops import _linear_cross_entropy_triton as triton

in_python = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
PRODUCT = products.FAMILY.choose(0, 16, 64, 64).blocks


@pytest.fixture(params=["own", "library"])
def _products(request, monkeypatch):
    monkeypatch.setattr(products, "own_products", lambda *args: request.param == "own")


def walk(case, needs=(True, True, True), ignore_index=IGNORED, softcap=0.0, rows=8, scale=None):
    head = [t if t is None else t.detach() for t in (case.hidden, case.weight, case.labels, case.bias)]
    if scale is None:
        return kernels.linear_cross_entropy(*head, ignore_index, softcap, rows, needs)
    return kernels.linear_cross_entropy_bwd(scale, *head, ignore_index, softcap, rows, needs)


@in_python
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("_products")
class TestTiles:
    """Sizes on both sides of each block of the interpreter's configurations, by both kinds of products."""

    @pytest.mark.parametrize("tokens", [PRODUCT["BLOCK_M"] + i for i in (-1, 0, 1)])
    def test_tokens(self, dtype, tokens):
        hold_to_the_oracle("triton", tokens, 150, 24, dtype=dtype, ignored=0.0, bias=True, draws=1)

    @pytest.mark.parametrize("kept", [0, 1, 31, 32, 33, PRODUCT["BLOCK_M"], PRODUCT["BLOCK_M"] + 1])
    def test_tokens_that_count(self, dtype, kept):
        case = make(140, 150, 24, dtype=dtype, ignored=0.0, bias=True, reduction="sum", workspace=140 * 192 * 2)
        case.labels[torch.randperm(140)[kept:]] = IGNORED
        exact = case.cast(torch.float64).plain()
        for ours, right in zip(case.run(), exact, strict=True):
            torch.testing.assert_close(ours.double(), right, rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("vocab", [PRODUCT["BLOCK_N"] + i for i in (-1, 0, 1)] + [512, 513])
    def test_vocabulary(self, dtype, vocab):
        hold_to_the_oracle("triton", 20, vocab, 24, dtype=dtype, bias=True, softcap=5.0)

    @pytest.mark.parametrize("width", [PRODUCT["BLOCK_K"] + i for i in (-1, 0, 1)] + [PRODUCT["BLOCK_N"] + 1])
    def test_hidden_size(self, dtype, width):
        hold_to_the_oracle("triton", 20, 150, width, dtype=dtype)


@in_python
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.1])
def test_tokens_that_count_come_first(tokens, ignored):
    labels = torch.randint(50, (2 * tokens,))[::2]
    labels[torch.rand(tokens) < ignored] = IGNORED
    chunk = kernels._tokens_first(labels, IGNORED, 0)
    kept = (labels != IGNORED).nonzero().squeeze(1)
    assert chunk.count.tolist() == [kept.numel()]
    assert torch.equal(chunk.rows[: kept.numel()], kept)
    assert torch.equal(chunk.rows.sort().values, torch.arange(tokens))
    assert torch.equal(chunk.targets, labels[chunk.rows])


@in_python
@pytest.mark.parametrize("label", [50, 60, 2**40, -1, -(2**62)])
@pytest.mark.usefixtures("_products")
def test_a_label_outside_the_vocabulary_makes_its_own_token_nan(label):
    """On a GPU nothing can raise; what stands beside the logits is not read, and no other token is touched."""
    case = make(6, 50, 8, ignored=0.0)
    expected = walk(case)
    case.labels[4] = label
    losses, d_hidden, d_weight, _d_bias = walk(case)
    others = torch.tensor([0, 1, 2, 3, 5])
    assert losses[4].isnan()
    assert d_hidden[4].isnan().all()
    assert d_weight.isnan().any()
    assert torch.equal(losses[others], expected[0][others])
    assert torch.equal(d_hidden[others], expected[1][others])


@in_python
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # d_weight itself is beyond float16
@pytest.mark.parametrize("size", [1e-30, 1e-4, 65536.0, 1e30])
@pytest.mark.usefixtures("_products")
def test_float16_gradients_of_any_scale(size):
    """The factors of a loss scaler, or of a mean over many tokens, stay out of the gradient over the logits."""
    case = make(20, 150, 16, dtype=torch.float16)
    scale = torch.rand(20) + 0.5
    expected = walk(case, scale=scale)
    scaled = kernels.linear_cross_entropy(
        *(t.detach() for t in (case.hidden, case.weight, case.labels)),
        *(None, IGNORED, 0.0, 8, (True, True, True), scale, None),
    )
    assert all(grad.isfinite().all() for grad in walk(case, scale=scale * size)[2:])
    power = 2.0 ** math.floor(math.log2(size))
    d_bias = walk(case, scale=scale * power)[2]
    torch.testing.assert_close(d_bias, expected[2] * power)
    torch.testing.assert_close(scaled[3], expected[2], rtol=1e-2, atol=1e-3)


@in_python
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_kernel_writes_beside_its_tensor(dtype):
    tokens, vocab, width = 11, 50, 20
    case = make(tokens, vocab, width, dtype=dtype, bias=True, softcap=2.0)
    padded = kernels.padded_vocabulary(vocab)
    z, h, part = (Guarded((tokens, size), dtype) for size in (padded, width, width))
    d_hidden, d_weight = Guarded((tokens, width), dtype), Guarded((vocab, width), torch.float32)
    losses, d_bias = Guarded((tokens,), torch.float32), Guarded((vocab,), torch.float32)
    chunk = kernels._tokens_first(case.labels, IGNORED, 0)
    own = products.OwnProducts(case.weight.detach())
    kernels._move(chunk, h.tensor, case.hidden.detach())
    own.logits(chunk, h.tensor, z.tensor)
    kernels._losses(chunk, z.tensor, vocab, losses.tensor, case.bias.detach(), 2.0, None, True, True)
    own.d_hidden(chunk, z.tensor, part.tensor)
    own.d_weight(chunk, z.tensor, h.tensor, d_weight.tensor)
    kernels._move(chunk, d_hidden.tensor, part.tensor, scatter=True)
    kernels._column_sums(chunk, d_bias.tensor, z.tensor)
    for guarded in (z, h, part, d_hidden, d_weight, losses, d_bias):
        guarded.check()


@in_python
def test_a_gradient_in_any_layout_is_scaled():
    grad, factors = torch.randn(9, 70), torch.tensor([0.0, *range(8)])
    for layout in (grad, grad.T.contiguous().T, torch.stack([grad, grad], -1)[..., 0]):
        for scale in (factors, torch.stack([factors, factors], 1)[:, 0], torch.tensor([3.0]), torch.tensor([0.0])):
            for dtype in (torch.float32, torch.float16):
                expected = (grad * scale[:, None]).to(dtype)
                assert torch.equal(kernels.linear_cross_entropy_scale(layout, scale, dtype), expected)
    grad[0] = math.nan
    assert torch.equal(kernels.linear_cross_entropy_scale(grad, factors, torch.float32)[0], torch.zeros(70))


@pytest.mark.parametrize("tokens", [1, 63, 1024, 1025, 4096, 100_000])
@pytest.mark.parametrize("vocab", [0, 1, 65, 49_152, 50_257, 262_144])
@pytest.mark.parametrize("workspace", [0, 1, 1000, 1 << 20, 1 << 30])
@pytest.mark.parametrize("trains", [False, True])
def test_the_plan_keeps_to_the_workspace(tokens, vocab, workspace, trains):
    rows = triton.chunk_rows(tokens, vocab, 2048, 2, workspace, trains)
    row = kernels.padded_vocabulary(vocab) * 2
    assert 1 <= rows <= tokens
    if workspace:
        assert rows == 1 or rows * row <= workspace
    else:
        assert rows >= min(tokens, triton.MIN_ROWS // 2)  # equal chunks, none of more than the budget
        least = triton.MIN_ROWS * row
        assert rows * row <= max(triton.LOGITS_BYTES, least, vocab * 2048 if trains else 0)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_the_products_of_data_centres_are_the_librarys(capability):
    own = capability in (86, 89, 120)
    assert products.own_products(capability, torch.bfloat16) == own
    assert not products.own_products(capability, torch.float32)
    names = [compilation.name for compilation in kernels.compilations(capability)]
    assert any(name.startswith("d_weight") for name in names) == own
    assert len(set(names)) == len(names)


@in_python
def test_the_kernels_are_what_runs():
    case = make(4, 30, 8)
    assert pf.explain("linear_cross_entropy", case.hidden, case.weight, case.labels).backend == "triton"
