"""The Triton kernels of rms_norm, glu and rope at the edges of their tiles, and how they find their rows."""

from __future__ import annotations

import pytest
import torch
from backends import FAST_BACKENDS

import pyfinetune as pf
from pyfinetune.ops._triton import kernels

pytestmark = pytest.mark.skipif(FAST_BACKENDS != ["triton"], reason="about the Triton kernels")

GELU = {"gelu_tanh": "tanh", "gelu": "none"}


def both(function, inputs, *rest):
    """[results and gradients by Triton, by the reference] of a function of the leaves."""
    found = []
    for backend in ("triton", "reference"):
        with pf.use_backend(backend):
            leaves = [t.detach().requires_grad_() for t in inputs]
            results = function(*leaves, *rest)
            results = [results] if isinstance(results, torch.Tensor) else list(results)
            generator = torch.Generator(torch.get_default_device()).manual_seed(3)
            douts = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in results]
            found.append([*results, *torch.autograd.grad(results, leaves, douts)])
    return found


def assert_same(function, inputs, *rest, **tolerance):
    for got, wanted in zip(*both(function, inputs, *rest), strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)


def norm(x, weight, residual=None):
    return pf.ops.rms_norm(x, weight, residual=residual)


class TestRows:
    """`rows_of`: rows of tensors that have one shape."""

    @staticmethod
    def check(*tensors):
        rows = kernels("rows").rows_of(*tensors)
        assert rows.count * tensors[0].shape[-1] == tensors[0].numel()
        index = torch.arange(rows.count)
        outer = index // rows.sizes[1]
        parts = (outer // rows.sizes[0], outer % rows.sizes[0], index % rows.sizes[1])
        for tensor, held, strides in zip(tensors, rows.tensors, rows.strides, strict=True):
            assert torch.equal(tensor, held)
            starts = sum(part * stride for part, stride in zip(parts, strides, strict=True))
            flat = held.as_strided((int(starts.max()) + 1,), (1,)) if rows.count else held.reshape(-1)
            assert torch.equal(flat[starts], held[..., 0].reshape(-1))
        return rows

    @pytest.mark.parametrize(
        ("view", "dims"),
        [
            (torch.arange(24.0).view(2, 3, 4), 1),
            (torch.arange(24.0).view(24), 1),
            (torch.arange(48.0).view(2, 3, 8)[..., :4], 1),
            (torch.arange(24.0).view(2, 3, 4).transpose(0, 1), 2),
            (torch.arange(120.0).view(2, 3, 5, 4).permute(2, 1, 0, 3), 3),
            (torch.arange(120.0).view(2, 15, 4)[:, ::2], 2),
            (torch.arange(4.0).expand(6, 4), 1),
            (torch.arange(4.0).view(1, 1, 4).transpose(0, 1), 1),
            (torch.empty(0, 3, 4), 1),
            (torch.empty(3, 0, 4).transpose(0, 1), 1),
        ],
        ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else str(value),
    )
    def test_views(self, view, dims):
        rows = self.check(view)
        assert rows.dims == dims
        assert rows.tensors[0].data_ptr() == view.data_ptr()

    def test_tensors_merge_where_all_of_them_do(self):
        plain = torch.arange(120.0).view(2, 3, 5, 4)
        turned = torch.arange(120.0).view(3, 2, 5, 4).transpose(0, 1)
        assert self.check(plain, plain.clone()).dims == 1
        rows = self.check(plain, turned)
        assert rows.dims == 3
        assert [held.data_ptr() for held in rows.tensors] == [plain.data_ptr(), turned.data_ptr()]

    def test_more_indices_than_three_are_copied(self):
        many = torch.arange(2.0 * 3 * 4 * 5 * 6).view(2, 3, 4, 5, 6).permute(3, 2, 1, 0, 4)
        assert self.check(many).dims == 1
        assert self.check(many[..., ::1], many + 1).dims == 1


@pytest.mark.parametrize("shape", [(1023, 2), (15, 128), (33, 128), (130, 127), (66, 129)], ids=str)
def test_norms_of_several_rows_in_a_tile(shape):
    """Sizes around a tile of rows, rows around a power of two; several tiles to a program, the last one short."""
    weight = torch.randn(shape[-1]).half()
    assert_same(norm, [torch.randn(shape), weight], rtol=2e-3, atol=2e-3)
    assert_same(norm, [torch.randn(shape), weight.float(), torch.randn(shape)], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("cols", [8192, 8193, 16385])
def test_norms_of_wide_rows(cols):
    """Up to 8192 features dweight is made with dx, up to 16384 a row is held whole, wider ones are walked twice."""
    assert_same(norm, [torch.randn(2, cols), torch.randn(cols), torch.randn(2, cols)], rtol=1e-5, atol=2e-5)
    x = torch.randn(3, 1, 2, cols)[:, :, 1]
    assert_same(norm, [x, torch.randn(cols)], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("cols", [100, 9000])
def test_dweight_without_dx(cols):
    x, weight = torch.randn(70, cols), torch.randn(cols)
    assert_same(lambda weight: norm(x, weight), [weight], rtol=1e-5, atol=2e-5)


def test_no_rows_give_no_gradient_of_the_weight():
    for x in (torch.empty(0, 8), torch.empty(3, 0, 8)):
        assert_same(norm, [x, torch.randn(8)])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("shape", [(2047,), (2048,), (2049,), (17, 127), (16, 128), (33, 129), (3, 2049)], ids=str)
def test_gated_units_at_the_edges_of_tiles(shape, activation):
    """Contiguous tensors are one long row; halves of a projection are rows."""

    def unit(gate, up):
        return pf.ops.swiglu(gate, up) if activation == "silu" else pf.ops.geglu(gate, up, GELU[activation])

    gate, up = torch.randn(shape) * 2, torch.randn(shape)
    assert_same(unit, [gate, up], rtol=4e-6, atol=2e-6)
    assert_same(unit, [gate.half(), up.half()], rtol=2e-3, atol=1e-4)
    assert_same(lambda both: unit(*both.chunk(2, dim=-1)), [torch.cat([gate, up], dim=-1)], rtol=4e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("shape", "rotary_dim"),
    [
        ((1, 9, 15, 128), 128),
        ((2, 17, 16, 128), 64),
        ((1, 1, 17, 128), 126),
        ((1, 3, 33, 66), 64),
        ((2, 2, 3, 600), 258),
        ((1, 2, 65, 2), 2),
        ((2, 1, 9, 256), 192),
    ],
    ids=str,
)
def test_rotations_at_the_edges_of_tiles(shape, rotary_dim):
    """Tokens, heads, pairs and features that pass through, one fewer and one more than tiles hold."""
    batch, _heads, tokens, _features = shape
    cos, sin = torch.randn(2, batch, tokens, rotary_dim).unbind()
    q, k = torch.randn(shape), torch.randn(batch, 3, *shape[2:])
    for inputs in ([q, k], [q.transpose(1, 2).contiguous().transpose(1, 2), k], [q.half(), k.half()]):
        assert_same(pf.ops.rope, inputs, cos, sin)


@pytest.mark.parametrize("tokens", [40, 400])
def test_heads_of_a_program(tokens, monkeypatch):
    """Few programs take few heads each, many take eight; the last of them takes what is left."""
    monkeypatch.setattr(kernels("rope"), "_ENOUGH", 16)
    q, k = torch.randn(1, 13, tokens, 4), torch.randn(1, 8, tokens, 4)
    cos, sin = torch.randn(2, 1, tokens, 4).unbind()
    assert_same(pf.ops.rope, [q, k], cos, sin)
