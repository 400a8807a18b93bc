"""The demo's texts: what is gathered from the interpreter, and that nothing is shared across the split."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pyfinetune.demo import docstrings
from pyfinetune.demo.docstrings import Entry, first_sentence, questions, split


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    return docstrings.gather()


class TestTexts:
    def test_there_are_thousands_each_once(self, entries):
        assert len(entries) > 4000
        assert len({" ".join(entry.doc.split()) for entry in entries}) == len(entries)
        assert len(questions(entries)) > 2500
        assert {entry.kind for entry in entries} == {"module", "class", "function", "method", "property"}

    def test_known_objects(self, entries):
        named = {entry.name: entry for entry in entries}
        dedent = named["textwrap.dedent"]
        assert dedent.question == "What does `textwrap.dedent(text)` do?\n"
        assert dedent.answer == "Remove any common leading whitespace from every line in `text`."
        assert dedent.text.startswith("function textwrap.dedent(text)\n\nRemove any common")
        assert named["str.lower"].signature == "()"
        assert "abs" in named

    def test_signatures_hold_no_addresses_nor_annotations(self, entries):
        for entry in entries:
            assert " at 0x" not in entry.text, entry.name
            assert str(sys.maxsize) not in (entry.signature or ""), entry.name

    def test_the_same_interpreter_gives_the_same_list(self, entries):
        again = docstrings.gather()
        assert again == entries
        assert [entry.name for entry in entries] == sorted(entry.name for entry in entries)

    def test_modules_that_do_something_are_not_imported_and_nothing_is_printed(self):
        code = (
            "import sys\nfrom pyfinetune.demo.docstrings import gather\ngather()\n"
            "bad = {'antigravity', 'this', 'idlelib', 'test', 'tkinter', 'turtle', 'lib2to3', 'asyncio.__main__'}\n"
            "sys.exit(f'imported {bad & set(sys.modules)}' if bad & set(sys.modules) else 0)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    @pytest.mark.parametrize(
        ("doc", "sentence"),
        [
            ("Return a copy,\nall lower case.  See upper.", "Return a copy, all lower case."),
            ("Read bytes, e.g. from a socket. Then stop.", "Read bytes, e.g. from a socket."),
            ("Read at most n bytes\n\nMore of it.", "Read at most n bytes"),
            ("Use os.path.join for that. Fine.", "Use os.path.join for that."),
            ("Close.", None),
            ("x.foo(bar) -> None", None),
            ("Return x -> y pairs.", None),
            ("The arguments are:\n\n* one", None),
            ("word " * 60, None),
        ],
    )
    def test_first_sentence(self, doc, sentence):
        assert first_sentence(doc) == sentence

    def test_a_call_written_in_the_docstring_becomes_the_signature(self):
        def bare():
            """old(a, b) -- Add two numbers."""

        bare.__signature__ = "none"
        (entry,) = docstrings._entry("m.old", "function", bare, bare)
        assert (entry.signature, entry.doc) == ("(a, b)", "Add two numbers.")


class TestSplit:
    def test_no_text_and_no_answer_is_on_both_sides(self, entries):
        learn, held_out = split(entries, 0.1, seed=42)
        assert 200 < len(held_out) < 0.12 * len(entries)
        assert not {entry.name for entry in learn} & {entry.name for entry in held_out}
        answers_of = [{entry.answer for entry in part} - {None} for part in (learn, held_out)]
        assert not answers_of[0] & answers_of[1]
        assert (learn, held_out) == split(list(reversed(entries)), 0.1, seed=42)
        assert held_out != split(entries, 0.1, seed=43)[1]

    def test_a_text_that_is_mostly_known_is_dropped(self):
        shared = " ".join(f"word{index}" for index in range(40))
        made = [
            Entry(f"m.f{index}", "function", "()", f"Do number {index} and stop. {shared} end{index}.")
            for index in range(20)
        ]
        made.append(Entry("m.g", "function", "()", "Something entirely of its own."))
        learn, held_out = split(made, 0.2, seed=0)
        assert len(learn) >= 15
        assert {entry.name for entry in held_out} <= {"m.g"}

    def test_objects_with_one_first_sentence_stay_together(self):
        made = [
            Entry(f"m.f{index}", "function", "()", f"Sentence number {index // 5}. Rest {index}.")
            for index in range(50)
        ]
        for seed in range(5):
            learn, held_out = split(made, 0.2, seed)
            assert len(learn) == 40
            assert len(held_out) == 10
