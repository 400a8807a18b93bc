"""Op varlen_attn with short documents, of which several share a tile on a GPU: one must not feel what another holds."""

from __future__ import annotations

import dataclasses
import random
from itertools import accumulate, pairwise

import pytest
import torch
from attention_cases import NAMES, Case, cu, hold_to_the_oracle, make, same, visible
from backends import DTYPES, FAST_BACKENDS, INTERPRETED

import pyfinetune as pf

HALF = torch.bfloat16 if torch.bfloat16 in DTYPES else torch.float16
MIXED = [1, 3, 0, 17, 32, 5, 0, 0, 64, 2, 1, 33, 31, 9, 16]
# The same documents with other keys: none, fewer, more, and so many that a short query has tiles of its own.
MIXED_KEYS = [1, 7, 4, 5, 32, 0, 3, 0, 20, 90, 1, 30, 32, 2, 16]
numpy_may_warn = pytest.mark.filterwarnings("ignore::RuntimeWarning" if INTERPRETED else "error::RuntimeWarning")
every_backend = pytest.mark.parametrize("backend", FAST_BACKENDS)
only_triton = pytest.mark.skipif("triton" not in FAST_BACKENDS, reason="only the Triton kernels have a list of tiles")


@dataclasses.dataclass
class Listed:
    """What the kernel lists for one side: tiles of a document's own, and of shared ones each place."""

    own: list[
        list[int]
    ]  # (first row of the document, its rows, the tile's first row, the other side's first row, rows)
    shared: list[list[list[int]]]  # tile, then rows of this side, rows of the other, first and last place seen


def listed(lengths, lengths_k, rest=0, blocks=((64, 64), (64, 32)), left=-1, right=0) -> list[Listed]:
    from pyfinetune.kernels import varlen_attn as kernel

    totals = sum(lengths) + rest, sum(lengths_k) + rest
    sides = kernel._list_tiles(cu(lengths), cu(lengths_k), totals, blocks, [left, right])
    return [
        Listed(
            [tile[:5] for tile in side.fields.tolist() if 0 <= tile[2] < tile[1]],
            [tile for tile in side.members.tolist() if tile[0][0] >= 0],
        )
        for side in sides
    ]


@only_triton
@pytest.mark.parametrize("tile", [64, 128])
def test_one_token_documents_fill_their_tiles(tile):
    documents = 1024 if INTERPRETED else 8192
    (side,) = listed([1] * documents, [1] * documents, blocks=[(128, tile)])
    assert side.own == []
    assert len(side.shared) == documents // tile
    assert all(min(rows) >= 0 for rows, *_ in side.shared)


@only_triton
def test_room_for_tiles_grows_with_rows_and_not_with_documents():
    from pyfinetune.kernels.varlen_attn import _slots

    own, shared = _slots(8192, 0, 8192, 128, 64)
    assert own + shared <= 6 * 8192 // 64 + 2
    assert _slots(8192, 0, 16, 128, 64) == (8192 // 128 + 16 + 1, 16 + 1)
    assert _slots(8192, 8192, 1_000_000, 128, 64) == _slots(8192, 8192, 2_000_000, 128, 64)


def expected_rows(lengths, rest):
    """Rows of each document, those past the last as one more."""
    bounds = [0, *accumulate(lengths)]
    return [range(a, b) for a, b in pairwise([*bounds, bounds[-1] + rest])]


@only_triton
@pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (3, 2)], ids=str)
@pytest.mark.parametrize("blocks", [((64, 64), (64, 32)), ((16, 16), (128, 64))], ids=str)
def test_every_row_has_one_place_and_sees_its_own_documents_keys(blocks, window):
    generator = random.Random(str((blocks, window)))
    for _ in range(3 if INTERPRETED else 20):
        count, rest = generator.randrange(40), generator.choice([0, 1, 40, 70])
        lengths, lengths_k = ([generator.choice([0, 1, 2, 5, 16, 17, 33, 64, 130]) for _ in range(count)] for _ in "qk")
        sides = listed(lengths, lengths_k, rest, blocks, *window)
        queries, keys = expected_rows(lengths, rest), expected_rows(lengths_k, rest)
        for side, mine, other, (block, tile) in zip(sides, (queries, keys), (keys, queries), blocks, strict=True):
            found = [row for begin, rows, first, *_ in side.own for row in range(begin + first, begin + rows)[:block]]
            found += [row for rows, *_ in side.shared for row in rows if row >= 0]
            assert sorted(found) == list(range(mine[-1].stop))
            long = {(a.start, len(a), b.start, len(b)) for a, b in zip(mine, other, strict=True) if len(a)}
            assert {(begin, rows, *there) for begin, rows, _, *there in side.own} <= long | {
                (mine[-1].start, len(mine[-1]), other[-1].start, 0)
            }
            assert all(max(rows, length) > tile // 2 for _, rows, _, _, length in side.own)
        check_what_is_seen(sides, queries, keys, window)


def check_what_is_seen(sides, queries, keys, window):
    """By the definition, document by document, for every query with a place in a shared tile."""
    seen = {}
    for a, b in zip(queries[:-1], keys[:-1], strict=True):
        for row, sees in zip(a, visible(len(a), len(b), causal=False, window_size=window).tolist(), strict=True):
            seen[row] = [key for key, yes in zip(b, sees, strict=True) if yes]
    for side, is_queries in zip(sides, (True, False), strict=True):
        for mine, other, first, last in side.shared:
            query_rows, key_rows = (mine, other) if is_queries else (other, mine)
            for place, row in enumerate(query_rows):
                found = key_rows[first[place] : last[place] + 1] if first[place] <= last[place] else []
                assert found == (seen.get(row, []) if row >= 0 else [])


OPTIONS = [{}, {"causal": False}, {"causal": False, "window_size": (9, 4), "softcap": 2.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
@pytest.mark.parametrize("lengths_k", [None, MIXED_KEYS], ids=["same keys", "other keys"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_short_documents_are_as_good_as_eager(backend, dtype, lengths_k, options):
    if INTERPRETED and dtype == torch.float32 and options.get("softcap"):
        pytest.skip("numpy's float32 exp, which the interpreter calls, is three times as far off as torch's")
    heads = (2, 1) if INTERPRETED else (4, 2)
    hold_to_the_oracle(backend, MIXED, lengths_k, dtype=dtype, dim=32, heads=heads, rest=3, draws=2, **options)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@every_backend
def test_a_documents_bits_are_the_same_wherever_it_lies(backend, dtype):
    lengths = [3, 17, 1, 32, 5, 5] if INTERPRETED else [3, 17, 1, 32, 5, 5, 9, 64, 31, 2, 16, 7]
    case = make(lengths, dtype=dtype, heads=(2, 1), dim=32)
    with pf.use_backend(backend):
        packed, dout = case.run(), case.dout(dtype)
        for start, end in pairwise(case.cu_seqlens_q.tolist()):
            leaves = [x.detach()[start:end].requires_grad_() for x in case.inputs()]
            alone = Case(*leaves, cu([end - start]), None, {}).run(dout[start:end])
            assert same(alone, [x[:, start:end] if x is packed[1] else x[start:end] for x in packed])


@pytest.mark.parametrize("filling", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": False, "window_size": (2, 9)}], ids=["causal", "window"])
@numpy_may_warn
@every_backend
def test_what_is_not_finite_stays_in_its_document(backend, options, dtype, filling):
    """In q, k, v or dout alone: each enters other products, and 0 times it is NaN."""
    lengths, lengths_k = [3, 1, 17, 5, 2], [4, 1, 17, 2, 8]
    case = make(lengths, lengths_k, dtype=dtype, heads=(2, 1), dim=16, **options)
    bounds = case.cu_seqlens_q.tolist(), case.cu_seqlens_k.tolist()
    with pf.use_backend(backend):
        dout = case.dout(dtype)
        expected = case.run(dout)
        for i in (1, 2) if INTERPRETED else range(len(lengths)):
            inside = [slice(*side[i : i + 2]) for side in bounds]
            for which, on_keys in enumerate((False, True, True, False)):
                changed, other_dout = case.cast(dtype), dout.clone()
                (*changed.inputs(), other_dout)[which].data[inside[on_keys]] = filling
                results = changed.run(other_dout)
                for name, a, b in zip(NAMES, results, expected, strict=True):
                    a, b = (x.T if name == "lse" else x for x in (a, b))
                    where = inside[name in ("dk", "dv")]
                    others = [torch.cat([x[: where.start], x[where.stop :]]) for x in (a, b)]
                    assert torch.equal(*others), f"{name} outside of document {i}, {'qkv'[which : which + 1] or 'dout'}"
                reached = results[4][inside[1]] if which == 3 else results[0][inside[0]]
                assert not reached.isfinite().all(), "it does not reach its own document"


@numpy_may_warn
@every_backend
def test_what_is_not_finite_reaches_each_query_that_sees_it(backend):
    """One key's value in a document of several; the columns beside it keep every bit."""
    case = make([6, 9, 4], heads=(2, 1), dim=16)
    with pf.use_backend(backend):
        expected = case.forward()
        case.v.data[10, 0, 3], case.v.data[12, 0, 5] = float("inf"), float("nan")
        out = case.forward()
    assert not out[10:15, :, 3].isfinite().any()
    assert out[12:15, :, 5].isnan().all()
    untouched = torch.ones_like(out, dtype=torch.bool)
    untouched[6:15, :, 3] = untouched[6:15, :, 5] = False
    assert torch.equal(out[untouched], expected[untouched])
