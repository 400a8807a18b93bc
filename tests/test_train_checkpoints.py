"""Checkpoints on disk: whole or not there, every change to one found and named, the last good one never deleted."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from pyfinetune.errors import UserError
from pyfinetune.train import checkpoints
from pyfinetune.train.checkpoints import CHECKSUMS, check_resume_path, find_flaw, list_checkpoints, newest_complete

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "a/b.json")


def write(out: Path, step: int) -> Path:
    """A checkpoint of a few bytes, written as a run writes it."""
    staged = out / checkpoints.SAVING / f"checkpoint-{step}"
    for name in FILES:
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_bytes(random.Random(f"{step} {name}").randbytes(200 + len(name)))
    checkpoints.seal(staged, step)
    checkpoints.publish(staged, out / f"checkpoint-{step}")
    return out / f"checkpoint-{step}"


def steps(out: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(out)]


def test_a_sealed_checkpoint_is_whole_and_nothing_is_left_beside_it(tmp_path):
    folder = write(tmp_path, 5)
    assert find_flaw(folder, 5) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert json.loads((folder / CHECKSUMS).read_text())["files"].keys() == set(FILES)
    assert check_resume_path(folder) == folder


@pytest.mark.parametrize("name", [*FILES, CHECKSUMS])
def test_every_kind_of_damage_to_every_file_is_named(tmp_path, name):
    write(tmp_path, 5)
    folder = write(tmp_path, 10)
    file, other = folder / name, tmp_path / "checkpoint-5" / name
    before = file.read_bytes()
    flipped = bytes([*before[:99], before[99] ^ 16, *before[100:]])
    cases = {
        "no ": None,
        "cut short": before[:-2],
        "cut short:": b"",
        "SHA-256 differs": flipped,
        "is that of checkpoint-5": other.read_bytes(),
        "has grown": before + b"x",
    }
    for flaw, content in cases.items():
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        found = find_flaw(folder, 10)
        assert found is not None, flaw
        if name != CHECKSUMS:
            assert name in found
            assert flaw in found
        newest, (skipped,) = newest_complete(tmp_path)
        assert newest == tmp_path / "checkpoint-5"
        assert skipped.startswith(f"{folder} is damaged ({found})")
        file.write_bytes(before)
        assert find_flaw(folder, 10) is None


def test_no_flipped_bit_of_the_checksums_passes(tmp_path):
    file = write(tmp_path, 10) / CHECKSUMS
    before = file.read_bytes()
    for place in range(len(before)):
        for bit in (0, 3, 5):
            changed = bytearray(before)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            assert find_flaw(file.parent, 10) is not None or json.loads(changed) == json.loads(before), place


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"step": 10, "files": {"a": 1}}', '{"step": 10, "files": []}', "\x00"]
)
def test_checksums_that_are_none_are_refused(tmp_path, content):
    folder = write(tmp_path, 10)
    (folder / CHECKSUMS).write_text(content)
    assert CHECKSUMS in find_flaw(folder, 10)


def test_a_checkpoint_under_anothers_name_and_an_extra_file_are_refused(tmp_path):
    folder = write(tmp_path, 10)
    moved = folder.rename(tmp_path / "checkpoint-20")
    assert find_flaw(moved, 20) == f"{CHECKSUMS} is of step 10"
    with pytest.raises(UserError, match="is of step 10"):
        check_resume_path(moved)
    (moved / "extra").mkdir()
    assert find_flaw(moved, 10) is None  # an empty folder holds nothing that could be loaded
    (moved / "extra" / "adapter_model.safetensors").symlink_to("/nowhere")
    assert find_flaw(moved, 10) == "extra/adapter_model.safetensors was not there when it was saved"
    with pytest.raises(UserError, match="no such folder"):
        check_resume_path(tmp_path / "checkpoint-99")


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = write(tmp_path, 10)

    def broken(paths):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoints, "hash_files", broken)
    assert find_flaw(folder, 10).endswith("cannot be read: Input/output error")


@pytest.mark.parametrize("missing", ["optimizer.pt", "adapter_model.safetensors"])
def test_a_checkpoint_without_what_a_run_needs_is_not_resumed(tmp_path, missing):
    folder = write(tmp_path, 10)
    (folder / missing).unlink()
    (folder / CHECKSUMS).unlink()
    checkpoints.seal(folder, 10)
    assert find_flaw(folder, 10) == ("no weights" if missing.endswith("safetensors") else f"no {missing}")


class TestRotation:
    @pytest.mark.parametrize(
        ("limit", "best", "left"),
        [
            (None, None, [9, 6, 4, 2]),
            (0, None, [9, 6, 4, 2]),
            (3, None, [9, 6, 4]),
            (2, 2, [9, 2]),
            (1, None, [9]),
            (1, 4, [9, 4]),
            (9, None, [9, 6, 4, 2]),
        ],
    )
    def test_the_oldest_go_but_never_the_newest_nor_the_best(self, tmp_path, limit, best, left):
        for step in (2, 4, 6, 9):
            write(tmp_path, step)
        best = best and str(tmp_path / f"checkpoint-{best}")
        checkpoints.rotate(tmp_path, limit, tmp_path / "checkpoint-9", best)
        assert steps(tmp_path) == left
        assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in left}

    def test_what_was_passed_over_goes_before_the_good_ones(self, tmp_path):
        """The run went back from damaged checkpoints 6 and 8 to 2: the good 2 outlives them."""
        for step in (2, 6, 8):
            write(tmp_path, step)
        newest = write(tmp_path, 4)
        checkpoints.rotate(tmp_path, 2, newest, None)
        assert steps(tmp_path) == [4, 2]


class TestKilledInBetween:
    def test_half_written_checkpoints_never_bear_a_name(self, tmp_path, monkeypatch):
        write(tmp_path, 2)

        def full(*args):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "sync", full)
            with pytest.raises(OSError, match="No space left"):
                write(tmp_path, 4)
        assert steps(tmp_path) == [2]
        checkpoints.clear_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]

    def test_a_checkpoint_that_made_room_comes_back(self, tmp_path, monkeypatch):
        write(tmp_path, 2)
        original = os.rename

        def killed(source, target):
            if checkpoints.SAVING in str(source):
                raise KeyboardInterrupt
            original(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", killed)
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path, 2)
        assert steps(tmp_path) == []
        checkpoints.clear_leftovers(tmp_path)
        assert newest_complete(tmp_path) == (tmp_path / "checkpoint-2", [])

    def test_a_half_deleted_one_does_not(self, tmp_path, monkeypatch):
        for step in (2, 4):
            write(tmp_path, step)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "clear_leftovers", lambda output_dir: None)
            checkpoints.rotate(tmp_path, 1, tmp_path / "checkpoint-4", None)
        checkpoints.clear_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]

    def test_the_files_reach_the_disk_before_the_name_does(self, tmp_path, monkeypatch):
        order = []
        fsync, rename = os.fsync, os.rename
        monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
        monkeypatch.setattr(os, "rename", lambda a, b: (order.append("rename"), rename(a, b)))
        write(tmp_path, 3)
        staged = str(tmp_path / checkpoints.SAVING / "checkpoint-3")
        before = order[: order.index("rename")]
        assert set(before) == {staged, f"{staged}/a", f"{staged}/{CHECKSUMS}", *(f"{staged}/{name}" for name in FILES)}
        assert order[order.index("rename") + 1 :] == [str(tmp_path)]
