"""`pyfinetune chat`: turns, streaming, the model's end of context, and lines from a pipe."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from export_cases import save_adapter, save_base
from tiny_model import CHATML, make_model, make_tokenizer, save_tiny

import pyfinetune as pf
from pyfinetune import cli
from pyfinetune.errors import UserError
from pyfinetune.train.chat import Chat, converse, open_chat

QUESTIONS = ["How many clips did she sell?", "And in May?"]


@pytest.fixture(scope="module", name="base")
def base_fixture(tmp_path_factory) -> str:
    return save_base(tmp_path_factory.mktemp("base"))


def chat(positions: int = 512, template: str | None = CHATML, **settings) -> Chat:
    tokenizer = make_tokenizer(chat_template=template)
    return Chat(make_model(len(tokenizer), positions=positions).eval(), tokenizer, **{"max_new_tokens": 8, **settings})


def answers(talk: Chat, lines: list[str]) -> str:
    out = io.StringIO()
    converse(talk, io.StringIO("".join(f"{line}\n" for line in lines)), out)
    return out.getvalue()


def generated(talk: Chat, messages: list[dict], count: int = 8) -> str:
    """What `generate` alone answers to a whole conversation."""
    ids = talk.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = talk.model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=talk._ends, pad_token_id=0)
    return talk.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_turns_go_through_the_chat_template():
    talk = chat(system="Be brief.")
    pieces: list[str] = []
    first = talk.ask(QUESTIONS[0], pieces.append)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTIONS[0]}]
    assert first == generated(talk, messages) == "".join(pieces)
    assert len(pieces) > 1  # as it comes, not at the end
    second = talk.ask(QUESTIONS[1], pieces.append)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": QUESTIONS[1]}]
    assert second == generated(talk, messages)
    talk.reset()
    assert talk.ask(QUESTIONS[0], pieces.append) == first


def test_an_answer_ends_where_the_template_ends_a_turn():
    """ChatML's turns end with a token that is not the tokenizer's end token."""
    talk = chat()
    end = talk.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in talk._ends
    assert talk.tokenizer.eos_token_id in talk._ends
    assert chat(template=None)._ends == [talk.tokenizer.eos_token_id]


def test_lines_of_a_pipe_are_answered_one_by_one():
    said: list[str] = []
    talk = chat(say=said.append)
    text = answers(talk, [QUESTIONS[0], "", "/reset", QUESTIONS[0], "/quit", "never asked"])
    assert said == ["forgot the conversation"]
    assert len(talk.turns) == 2
    assert text == f"{talk.turns[1]['content']}\n" * 2


def test_a_model_without_a_template_continues_texts():
    talk = chat(template=None)
    text = "The quick brown"
    ids = talk.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = talk.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    want = talk.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert talk.ask(text, lambda piece: None) == want
    assert talk.ask(text, lambda piece: None) == want
    assert talk.turns == []
    with pytest.raises(UserError, match="has no chat template"):
        chat(template=None, system="Be brief.")


def test_the_oldest_turns_make_room():
    said: list[str] = []
    talk = chat(positions=96, say=said.append)
    for number in range(6):
        talk.ask(f"Question {number}: {QUESTIONS[0]}", lambda piece: None)
    assert any("forgot the oldest 1 turn(s)" in sentence for sentence in said)
    assert talk.turns[0]["content"] != f"Question 0: {QUESTIONS[0]}"
    assert talk.turns[-2]["content"] == f"Question 5: {QUESTIONS[0]}"
    with pytest.raises(UserError, match=r"this question has [\d,]+ tokens, and the model's context 96"):
        talk.ask("word " * 200, lambda piece: None)
    talk.ask("w" * 60, lambda piece: None)  # fits, with less room than an answer may need


def test_a_question_that_does_not_fit_does_not_end_the_conversation():
    said: list[str] = []
    text = answers(chat(positions=64, say=said.append), ["word " * 200, "2+2="])
    assert said[0].startswith("error: chat: this question has")
    assert text.startswith("\n")
    assert len(text) > 2


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is():
    talk = chat(max_new_tokens=64)
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    answer = talk.ask(QUESTIONS[0], write)
    assert answer.startswith("".join(pieces[:3]))
    assert len(answer) < len(chat(max_new_tokens=64).ask(QUESTIONS[0], lambda piece: None))
    assert talk.turns[1]["content"] == answer


def test_temperature_draws_and_a_seed_repeats():
    talk = chat(temperature=1.5)

    def drawn(seed: int) -> str:
        torch.manual_seed(seed)
        talk.reset()
        return talk.ask(QUESTIONS[0], lambda piece: None)

    assert drawn(1) == drawn(1) != drawn(2)


def test_half_a_character_is_not_shown():
    """A character of several tokens appears when it is whole."""
    talk = chat()
    from pyfinetune.train.chat import _Stream

    pieces: list[str] = []
    stream = _Stream(talk.tokenizer, pieces.append)
    ids = talk.tokenizer("a€b")["input_ids"]
    assert len(ids) > 3
    stream.put(torch.tensor([[1, 2]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert pieces == ["a", "€", "b"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"temperature": -1.0}, "--temperature -1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        (
            {"system": "x", "template": "{{ raise_exception('no system') if messages[0].role == 'system' }}a"},
            "no system",
        ),
    ],
)
def test_settings_out_of_range(settings, match):
    with pytest.raises(UserError, match=match):
        chat(**settings)


def test_every_kind_of_folder(base, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", base)
    pf.load_4bit(base).save_pretrained(tmp_path / "four")
    make_tokenizer(chat_template=CHATML).save_pretrained(tmp_path / "four")
    found = {}
    for name in (base, adapter, tmp_path / "four"):
        found[str(name)] = open_chat(name, "cpu", max_new_tokens=12).ask(QUESTIONS[0], lambda piece: None)
    assert len(set(found.values())) == 3
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="holds a GGUF file"):
        open_chat(tmp_path / "gguf")


def test_a_classifier_gives_no_text(base, tmp_path):
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(base, pad_token_id=0).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="LlamaForSequenceClassification gives no text"):
        open_chat(tmp_path)


def test_the_command_reads_a_pipe(tmp_path, monkeypatch, capsys):
    model = save_tiny(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["pyfinetune", "chat", model, "--max-new-tokens", "6", "--device", "cpu"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+1=\n2+2=\n"))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    out, err = capsys.readouterr()
    assert "no chat template: it continues each text" in err
    talk = open_chat(model, "cpu", max_new_tokens=6)
    assert out == "".join(f"{talk.ask(text, lambda piece: None)}\n" for text in ("1+1=", "2+2="))
