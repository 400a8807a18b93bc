"""Which tokens of a batch form a document: from what Hugging Face models pass along, to `cu_seqlens`.

In this order, and none of them alone, as other ways of finding documents let packed ones see each other:

1. `cu_seq_lens_q` and `cu_seq_lens_k`, where a data collator made them;
2. `position_ids` that start again within a row;
3. a 2-D mask, whose zeros are dropped;
4. nothing: each row is one document.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch

from pyfinetune.errors import InvalidInput


@dataclass(frozen=True)
class Documents:
    """The documents of one batch.

    Args:
        cu_q, cu_k: int32 [n + 1], where each document's queries and keys begin among the kept ones.
        kept_q, kept_k: int64, the flat positions [batch * length] that belong to a document; None for all.
    """

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    kept_q: torch.Tensor | None = None
    kept_k: torch.Tensor | None = None


_last = threading.local()


def documents_of(
    batch: int,
    q_length: int,
    k_length: int,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None,
    cu_seq_lens_k: torch.Tensor | None,
    device: torch.device,
) -> Documents:
    """The documents of a batch; worked out once a forward pass, as every layer is given the same tensors.

    Args:
        batch, q_length, k_length: of the queries and the keys, which are longer where there is a cache.
        mask: [batch, at most k_length], nonzero for tokens that count, or None.
        position_ids: [batch or 1, q_length] or None; another number of dimensions is ignored.
        cu_seq_lens_q, cu_seq_lens_k: the collator's, or None.
        device: where the result is needed.
    """
    if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[1] != q_length):
        position_ids = None
    inputs = (mask, position_ids, cu_seq_lens_q, cu_seq_lens_k)
    if torch.compiler.is_compiling():
        traceable = cu_seq_lens_q is None and q_length == k_length
        return (
            _find_traced(*inputs[:2], batch, q_length, device)
            if traceable
            else _find(*inputs, batch, q_length, k_length, device)
        )
    if any(t is not None and t.is_inference() for t in inputs):
        # Nothing tells whether such a tensor has been changed in place since.
        return _find(*inputs, batch, q_length, k_length, device)
    key = (batch, q_length, k_length, device, *(None if t is None else (id(t), t._version) for t in inputs))
    known = getattr(_last, "entry", None)
    # An id alone could belong to another tensor by now; one that is alive keeps it.
    if known is not None and known[0] == key and all(ref is None or ref() is not None for ref in known[1]):
        return known[2]
    found = _find(*inputs, batch, q_length, k_length, device)
    _last.entry = (key, [None if t is None else weakref.ref(t) for t in inputs], found)
    return found


def _find(mask, position_ids, cu_q, cu_k, batch: int, q_length: int, k_length: int, device) -> Documents:
    if cu_q is not None:
        cu_q = cu_q.to(device, torch.int32)
        return Documents(cu_q, cu_q if cu_k is None else cu_k.to(device, torch.int32))
    if q_length != k_length:
        return _with_cache(mask, position_ids, batch, q_length, k_length, device)
    kept = None if mask is None else _kept(mask, k_length)
    row = torch.arange(batch * q_length, device=device) // q_length
    position = None if position_ids is None else position_ids.expand(batch, -1).reshape(-1)
    if kept is not None:
        row, position = row[kept], None if position is None else position[kept]
    starts = torch.ones(row.shape[0], dtype=torch.bool, device=device)
    if row.shape[0]:
        starts[1:] = row[1:] != row[:-1]
        if position is not None:
            starts[1:] |= position[1:] <= position[:-1]
    cu = torch.cat([starts.nonzero()[:, 0], starts.new_tensor([row.shape[0]], dtype=torch.int64)]).int()
    return Documents(cu, cu, kept, kept)


def _find_traced(mask, position_ids, batch: int, length: int, device) -> Documents:
    """As `_find` without a cache, in shapes that do not depend on values: one graph, no questions to the host.

    There are as many documents as tokens, most of them empty at the end; kept tokens are moved to the front, and the op
    leaves zeros for the others.
    """
    total = batch * length
    place = torch.arange(total, device=device)
    row, kept, order = place // length, None, None
    position = None if position_ids is None else position_ids.expand(batch, -1).reshape(-1)
    if mask is not None:
        kept = mask.reshape(-1) != 0
        order = torch.argsort(kept.logical_not(), stable=True)
        row, kept, position = row[order], kept[order], None if position is None else position[order]
    new = row[1:] != row[:-1]
    if position is not None:
        new = new | (position[1:] <= position[:-1])
    starts = torch.cat([new.new_ones(1), new])
    count = place.new_tensor(total) if kept is None else kept.sum()
    if kept is not None:
        starts = starts & kept
    document = torch.where(starts, starts.cumsum(0) - 1, total)
    cu = count.expand(total + 1).clone().scatter_(0, document, torch.where(starts, place, count)).int()
    return Documents(cu, cu, order, order)


def _with_cache(mask, position_ids, batch: int, q_length: int, k_length: int, device) -> Documents:
    """Keys of earlier calls come first. A cache of fixed size holds slots behind the last token that nothing is in."""
    if mask is not None:
        grid = torch.zeros(batch, k_length, dtype=torch.bool, device=device)
        grid[:, : mask.shape[1]] = mask != 0
        keys, queries = grid.sum(dim=1), grid[:, mask.shape[1] - q_length : mask.shape[1]]
        kept_k, kept_q = grid.reshape(-1).nonzero()[:, 0], queries.reshape(-1).nonzero()[:, 0]
        return Documents(_cumulated(queries.sum(dim=1)), _cumulated(keys), kept_q, kept_k)
    valid = k_length if position_ids is None else min(k_length, int(position_ids.max()) + 1)
    cu_q = torch.arange(batch + 1, device=device, dtype=torch.int32) * q_length
    cu_k = torch.arange(batch + 1, device=device, dtype=torch.int32) * valid
    if valid == k_length:
        return Documents(cu_q, cu_k)
    slots = torch.arange(batch * k_length, device=device).view(batch, k_length)[:, :valid]
    return Documents(cu_q, cu_k, None, slots.reshape(-1))


def _kept(mask: torch.Tensor, length: int) -> torch.Tensor | None:
    if mask.shape[1] != length:
        raise InvalidInput(f"attention: the mask has {mask.shape[1]} columns, needs {length}")
    flat = mask.reshape(-1) != 0
    return None if bool(flat.all()) else flat.nonzero()[:, 0]


def _cumulated(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
