"""Splits by seed and by group, several sources by weight, and replay of an older one."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from pyfinetune.errors import InvalidInput, UserError
from pyfinetune.train.config import parse_config
from pyfinetune.train.data.mixing import interleave, replay_count, shares
from pyfinetune.train.data.reading import read_data
from pyfinetune.train.data.splits import split_rows


def write(path, count: int, tag: str, **more) -> str:
    rows = [
        {"prompt": f"{tag} {n}", "completion": f"answer {n}", **{k: v(n) for k, v in more.items()}}
        for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def read(**values):
    return read_data(parse_config({"model_name_or_path": "m", "output_dir": "o", **values}))


def tags(examples) -> Counter:
    return Counter(example.messages[0]["content"].split()[0] for example in examples)


@pytest.mark.parametrize("size", [0.3, 30, 1])
def test_groups_are_never_parted(size):
    groups = [number % 11 for number in range(100)]
    train, held_out = split_rows(list(range(100)), size, 5, groups)
    assert sorted(train + held_out) == list(range(100))
    assert not {groups[i] for i in train} & {groups[i] for i in held_out}
    assert held_out
    if size != 1:
        assert 20 <= len(held_out) <= 30
    assert (train, held_out) == split_rows(list(range(100)), size, 5, groups)
    assert held_out != split_rows(list(range(100)), size, 6, groups)[1]


def test_values_of_different_types_are_different_groups():
    train, held_out = split_rows([0, 1], 1, 0, [1, "1"])
    assert len(train) == len(held_out) == 1


def test_one_group_cannot_be_split():
    with pytest.raises(UserError, match="group_column: all 4 rows have the same value"):
        split_rows([1, 2, 3, 4], 0.5, 0, ["a"] * 4)


def test_a_split_by_group_in_a_run(tmp_path):
    path = write(tmp_path / "a.jsonl", 40, "row", author=lambda n: n // 4)
    data = read(train_file=path, test_size=0.25, group_column="author")
    authors = [{int(e.place.rsplit(" ", 1)[1]) - 1 for e in part} for part in (data.train, data.held_out)]
    assert not {n // 4 for n in authors[0]} & {n // 4 for n in authors[1]}
    assert len(data.held_out) == 8
    with pytest.raises(UserError, match=r"a\.jsonl, row 1: has no 'writer', which group_column splits by"):
        read(train_file=path, test_size=0.25, group_column="writer")


def test_validation_and_test_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", 100, "row")
    data = read(train_file=path, test_size=0.1, validation_size=20)
    parts = [{example.place for example in part} for part in (data.train, data.held_out, data.test)]
    assert [len(part) for part in parts] == [70, 20, 10]
    assert len(set.union(*parts)) == 100
    assert [len(part) for part in (read(train_file=path, test_size=0.1).held_out, data.test)] == [10, 10]


def test_a_test_file_of_its_own(tmp_path):
    train, test = write(tmp_path / "a.jsonl", 10, "row"), write(tmp_path / "b.jsonl", 4, "other")
    data = read(train_file=train, test_file=test, validation_size=2)
    assert [len(part) for part in (data.train, data.held_out, data.test)] == [8, 2, 4]


@pytest.mark.parametrize(
    ("sizes", "weights", "strategy", "expected"),
    [
        ([100, 1000], [1, 1], "first_exhausted", [100, 100]),
        ([100, 1000], [1, 1], "all_exhausted", [1000, 1000]),
        ([100, 1000], [3, 1], "first_exhausted", [100, 33]),
        ([100, 1000], [None, None], "first_exhausted", [100, 1000]),
        ([100, 1000], [None, None], "all_exhausted", [100, 1000]),
        ([5], [7], "first_exhausted", [5]),
        ([1, 1000], [1000, 1], "first_exhausted", [1, 1]),
    ],
)
def test_shares_follow_the_weights(sizes, weights, strategy, expected):
    assert shares(sizes, weights, strategy) == expected


def test_an_empty_source_is_named():
    with pytest.raises(InvalidInput, match="source 2 of 2 has no rows"):
        shares([1, 0], [1, 1], "first_exhausted")


def test_sources_are_spread_evenly_and_drawn_by_the_seed():
    mixed = interleave([["a"] * 300, ["b"] * 100], [300, 100], seed=1)
    for start in range(0, 400, 40):
        assert 8 <= mixed[start : start + 40].count("b") <= 12
    rows = [list(range(100)), list(range(100, 200))]
    first = interleave(rows, [100, 10], seed=1)
    assert first == interleave(rows, [100, 10], seed=1)
    assert first != interleave(rows, [100, 10], seed=2)
    assert len(set(first)) == 110
    twice = interleave(rows, [250, 10], seed=1)
    assert set(Counter(n for n in twice if n < 100).values()) == {2, 3}


def test_several_sources_with_weights(tmp_path):
    paths = [write(tmp_path / f"{tag}.jsonl", count, tag) for tag, count in (("old", 30), ("new", 90))]
    plain = read(sources=[{"train_file": path} for path in paths])
    assert tags(plain.train) == {"old": 30, "new": 90}
    weighted = [{"train_file": path, "weight": weight} for path, weight in zip(paths, (1, 2), strict=True)]
    data = read(sources=weighted)
    assert tags(data.train) == {"old": 30, "new": 60}
    assert [use.to_dict()["used"] for use in data.mixture] == [30, 60]
    assert tags(read(sources=weighted, stopping_strategy="all_exhausted").train) == {"old": 45, "new": 90}
    held = read(sources=weighted, test_size=0.1)
    assert tags(held.held_out) == {"old": 3, "new": 9}
    assert not {e.place for e in held.held_out} & {e.place for e in held.train}


def test_sources_of_different_formats(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"dialogue": "a", "summary": "b"}\n')
    (tmp_path / "t.txt").write_text("one line\n")
    data = read(sources=[{"train_file": str(tmp_path / "s.jsonl")}, {"train_file": str(tmp_path / "t.txt")}])
    assert sorted(example.format for example in data.train) == ["summarization", "text"]
    reverse = read(sources=[{"train_file": str(tmp_path / "t.txt")}, {"train_file": str(tmp_path / "s.jsonl")}])
    assert data.format == reverse.format == "summarization"


def test_replay_is_a_share_of_the_whole(tmp_path):
    new, old = write(tmp_path / "new.jsonl", 90, "new"), write(tmp_path / "old.jsonl", 500, "old")
    assert replay_count(90, 0.1) == 10
    data = read(train_file=new, replay={"train_file": old, "share": 0.1}, test_size=0.2)
    assert tags(data.train) == {"new": 72, "old": 8}
    assert tags(data.held_out) == {"new": 18}
    use = data.mixture[-1]
    assert (use.replayed, use.rows, use.used, use.wanted) == (True, 500, 8, 8)
    few = write(tmp_path / "few.jsonl", 3, "few")
    use = read(train_file=new, replay={"train_file": few, "share": 0.5}).mixture[-1]
    assert (use.used, use.wanted) == (3, 90)
