"""Triton: the tiles of packed attention, listed on the device from where the documents begin.

A document of more than TILE / 2 rows, of its queries or of its keys, has tiles of its own, of BLOCK rows. Shorter ones
share tiles: they lie on a line in their order, and every TILE places of the line are a tile.

    |5 5 5 5 5 . . . 2 2 1 1 . . . .|3 3 3 . 1 1 ...       a document by its rows; . is a place that nobody has

A short document has a power of two of places, at a multiple of it. So it never crosses into the next tile; and what
adds up over places adds its rows in the same order and groups wherever it lies, so that its bits are those that it has
alone. Its queries and its keys have the same places: the keys that a tile's queries see are those of the tile.

A document takes the end of the one before, rounds it up and adds. Two such steps, one after the other, are such a step
again, which makes the line a scan. Places are counted in 64 bits: bounds out of order can repeat rows at will.
"""

import triton
import triton.language as tl

TILE_FIELDS = tl.constexpr(8)  # int32 to a tile: 32 bytes, one memory sector
MEMBER_FIELDS = tl.constexpr(4)  # int32 to a place in a shared tile


@triton.jit
def _bound(cu_ptr, total, document):
    """Where a document begins: among the rows that there are, whatever cu_seqlens holds."""
    return tl.minimum(tl.maximum(tl.load(cu_ptr + document), 0), total)


@triton.jit
def _rows_of(cu_ptr, documents, total, document):
    """(first row, rows) of a document; that of number `documents` has the rows past the last, others have none."""
    at = tl.minimum(tl.maximum(document, 0), documents)
    begin = _bound(cu_ptr, total, at)
    end = tl.where(at < documents, _bound(cu_ptr, total, tl.minimum(at + 1, documents)), total)
    return begin, tl.where(document == at, tl.maximum(end - begin, 0), 0)


@triton.jit
def _side_and_other(cu_ptr, other_cu_ptr, documents, total, other_total, document):
    begin, length = _rows_of(cu_ptr, documents, total, document)
    other_begin, other_length = _rows_of(other_cu_ptr, documents, other_total, document)
    return (
        begin,
        length,
        other_begin,
        tl.where(document < documents, other_length, 0),
    )  # those past the last see nothing


@triton.jit
def _room(length, other_length, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """What a document needs: (tiles of its own, the alignment of its places in shared ones, those places)."""
    longest = tl.maximum(length, other_length)
    size = tl.full(length.shape, 1, tl.int64)
    for _ in tl.static_range(7):  # up to 128: no TILE is wider than 256
        size = tl.where(longest > size, 2 * size, size)
    long = longest > TILE // 2
    short = (length > 0) & (longest <= TILE // 2)  # one without rows on this side needs none
    return tl.where(long, tl.cdiv(length, BLOCK), 0), tl.where(short, size, 1), tl.where(short, size, 0)


@triton.jit
def _up(place, align):
    return (place + align - 1) // align * align


@triton.jit
def _one_after_another(align, before, after, next_align, next_before, next_after):
    """Two steps, each from a place to _up(place + before, align) + after, of powers of two, as one such step."""
    between = _up(after + next_before, tl.minimum(align, next_align))
    wider = next_align > align
    return (
        tl.maximum(align, next_align),
        before + tl.where(wider, between, 0),
        next_after + tl.where(wider, 0, between),
    )


@triton.jit
def _list_tiles(
    tiles_ptr,
    members_ptr,
    cu_ptr,
    other_cu_ptr,
    total,
    other_total,
    documents,
    slots,
    shared_slots,
    left,
    right,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    # Each program walks along all documents and writes its share of each one's tiles and places.
    share, shares = tl.program_id(0), tl.num_programs(0)
    listed, reached = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    for done in range(0, documents + 2, DOCUMENTS):  # one more than there are: it takes the rest of the last tile
        document = done + tl.arange(0, DOCUMENTS)
        _, length, _, other_length = _side_and_other(cu_ptr, other_cu_ptr, documents, total, other_total, document - 1)
        tiles, align, room = _room(length, other_length, BLOCK, TILE)
        slot = listed + tl.cumsum(tiles.to(tl.int64), 0)  # after those of the document before
        align, before, after = tl.associative_scan((align, room * 0, room), 0, _one_after_another)
        end = _up(reached + before, align) + after  # of the document before
        listed, reached = tl.max(slot, 0), tl.max(end, 0)
        begin, length, other_begin, other_length = _side_and_other(
            cu_ptr, other_cu_ptr, documents, total, other_total, document
        )
        tiles, align, room = _room(length, other_length, BLOCK, TILE)
        for i in range(share, tl.max(tiles, 0), shares):
            inside = (i < tiles) & (slot + i < slots)
            fields_ptr = tiles_ptr + (slot + i) * TILE_FIELDS
            tl.store(fields_ptr, begin, mask=inside)
            tl.store(fields_ptr + 1, length, mask=inside)
            tl.store(fields_ptr + 2, i * BLOCK, mask=inside)
            tl.store(fields_ptr + 3, other_begin, mask=inside)
            tl.store(fields_ptr + 4, other_length, mask=inside)
        start = _up(end, tl.where(document == documents + 1, TILE, align))
        places = start + room - end  # with those that it skips
        for i in range(share, tl.max(places, 0), shares):
            place = end + i
            inside = (i < places) & (place // TILE < shared_slots)
            member = (place - start).to(tl.int32)
            mine = tl.where((member >= 0) & (member < length), begin + member, -1)
            other = tl.where((member >= 0) & (member < other_length), other_begin + member, -1)
            queries, keys = (length, other_length) if QUERIES else (other_length, length)
            first, last = _keys_of_query(member, queries, keys, left, right)
            offset = (start % TILE).to(tl.int32)
            fields_ptr = members_ptr + place // TILE * (MEMBER_FIELDS * TILE) + place % TILE
            tl.store(fields_ptr, mine, mask=inside)
            tl.store(fields_ptr + TILE, other, mask=inside)
            tl.store(fields_ptr + 2 * TILE, offset + first, mask=inside)
            tl.store(fields_ptr + 3 * TILE, offset + last, mask=inside)
    # A slot without a tile has 0 rows; one without a shared tile has no row in its first place, where others have one.
    used = tl.minimum(listed, slots).to(tl.int32)
    for first in range(used + share * DOCUMENTS, slots, shares * DOCUMENTS):
        slot = first + tl.arange(0, DOCUMENTS)
        fields_ptr = tiles_ptr + slot.to(tl.int64) * TILE_FIELDS
        tl.store(fields_ptr + 1, slot * 0, mask=slot < slots)
        tl.store(fields_ptr + 2, slot * 0, mask=slot < slots)
    used = tl.minimum(tl.cdiv(reached, TILE), shared_slots).to(tl.int32)
    for first in range(used + share * DOCUMENTS, shared_slots, shares * DOCUMENTS):
        slot = first + tl.arange(0, DOCUMENTS)
        tl.store(members_ptr + slot.to(tl.int64) * (MEMBER_FIELDS * TILE), slot * 0 - 1, mask=slot < shared_slots)


@triton.jit
def _keys_of_query(query, queries, keys, left, right):
    """(first, last) key that a query of a short document sees; last < first where it sees none or is none."""
    there = (query >= 0) & (query < queries)
    place = query + keys - queries
    first = tl.where(left >= 0, tl.maximum(place - left, 0), 0)
    last = tl.where(right >= 0, tl.minimum(place + right, keys - 1), keys - 1)
    sees = there & (first <= last)
    return tl.where(sees, first, 0), tl.where(sees, last, -1)


@triton.jit(
    do_not_specialize=[
        "total_q",
        "total_k",
        "documents",
        "slots_q",
        "slots_k",
        "shared_slots_q",
        "shared_slots_k",
        "window_left",
        "window_right",
    ]
)
def _varlen_attn_tiles_kernel(
    tiles_q_ptr,
    members_q_ptr,
    tiles_k_ptr,
    members_k_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    total_q,
    total_k,
    documents,
    slots_q,
    slots_k,
    shared_slots_q,
    shared_slots_k,
    window_left,
    window_right,
    BLOCK_Q: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    if tl.program_id(1) == 0:
        _list_tiles(
            tiles_q_ptr,
            members_q_ptr,
            cu_seqlens_q_ptr,
            cu_seqlens_k_ptr,
            total_q,
            total_k,
            documents,
            slots_q,
            shared_slots_q,
            window_left,
            window_right,
            True,
            BLOCK_Q,
            TILE_Q,
            DOCUMENTS,
        )
    else:
        _list_tiles(
            tiles_k_ptr,
            members_k_ptr,
            cu_seqlens_k_ptr,
            cu_seqlens_q_ptr,
            total_k,
            total_q,
            documents,
            slots_k,
            shared_slots_k,
            window_left,
            window_right,
            False,
            BLOCK_K,
            TILE_K,
            DOCUMENTS,
        )


@triton.jit
def _tile(tiles_ptr, slot):
    """(first row of the document, its rows, the tile's first row in it, the same two for the document's other side)."""
    fields_ptr = tiles_ptr + slot.to(tl.int64) * TILE_FIELDS
    begin, length, first = tl.load(fields_ptr), tl.load(fields_ptr + 1), tl.load(fields_ptr + 2)
    other_begin, other_length = tl.load(fields_ptr + 3), tl.load(fields_ptr + 4)
    return begin.to(tl.int64), length, first, other_begin.to(tl.int64), other_length


@triton.jit
def _members(members_ptr, slot, TILE: tl.constexpr):
    """Where a shared tile's places are; its first one's row is -1 where the slot has no tile."""
    return members_ptr + slot.to(tl.int64) * (MEMBER_FIELDS * TILE)


@triton.jit
def _own_rows(members_ptr, places, TILE: tl.constexpr):
    """The rows at these places of a shared tile, on the side that the tile is of; -1 where there is none."""
    return tl.load(members_ptr + places, mask=places < TILE, other=-1)


@triton.jit
def _other_rows(members_ptr, places, TILE: tl.constexpr):
    """The same of the other side."""
    return tl.load(members_ptr + TILE + places, mask=places < TILE, other=-1)


@triton.jit
def _places_seen(members_ptr, places, TILE: tl.constexpr):
    """(first, last) place whose key the query at each of these sees; last < first where it sees none."""
    first = tl.load(members_ptr + 2 * TILE + places, mask=places < TILE, other=0)
    last = tl.load(members_ptr + 3 * TILE + places, mask=places < TILE, other=-1)
    return first, last
