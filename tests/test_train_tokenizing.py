"""Tokens and what is learned of them: the answers, their end token, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_model import CHATML, END, make_tokenizer, save_tiny, tiny_fixture  # noqa: F401

from pyfinetune.errors import UserError
from pyfinetune.train.data.files import Row
from pyfinetune.train.data.formats import to_examples
from pyfinetune.train.data.tokenizing import load_tokenizer, tokenize

LONG = 512
# Drops every answer but the last, as templates of reasoning models drop earlier reasoning.
FORGETFUL = (
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'assistant' and not loop.last -%}{{- '[a]' -}}"
    "{%- else -%}{{- '[' + m['role'][0] + ']' + m['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '[a]' -}}{%- endif -%}"
)
# Opens a reasoning block for generation that a finished answer does not have.
THINKING = CHATML.replace("assistant\\n' -}}{%- endif", "assistant\\n<think>\\n' -}}{%- endif")


def examples(*fields):
    return to_examples([Row(f, "f.jsonl", number) for number, f in enumerate(fields, start=1)])


def learned_text(document, tokenizer) -> str:
    return tokenizer.decode(document.input_ids[document.learned])


def whole_text(document, tokenizer) -> str:
    return tokenizer.decode(document.input_ids)


def chat(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def test_prompt_and_completion_join_as_they_stand_without_a_template(tiny):
    tokenizer = load_tokenizer(tiny, data_format="prompt_completion")
    (document,) = tokenize(examples({"prompt": "1+1=", "completion": " 2"}), tokenizer, LONG).documents
    assert whole_text(document, tokenizer) == f"1+1= 2{END}"
    assert learned_text(document, tokenizer) == f" 2{END}"


def test_the_prompt_has_the_tokens_it_has_at_inference():
    """A token that straddles prompt and answer would be seen in training and never in use."""
    tokenizer = make_tokenizer()
    assert len(tokenizer("She sold")["input_ids"]) < len(tokenizer("She so")["input_ids"]) + len(
        tokenizer("ld")["input_ids"]
    )
    (document,) = tokenize(examples({"prompt": "She so", "completion": "ld"}), tokenizer, LONG).documents
    prompt = tokenizer("She so")["input_ids"]
    assert document.input_ids[: len(prompt)].tolist() == prompt
    assert learned_text(document, tokenizer) == f"ld{END}"


def test_alpaca_gets_headings_where_the_tokenizer_has_no_template(tiny):
    tokenizer = load_tokenizer(tiny, data_format="alpaca")
    rows = examples({"instruction": "Add.", "input": "1 1", "output": "2"})
    (document,) = tokenize(rows, tokenizer, LONG).documents
    assert whole_text(document, tokenizer) == f"### User:\nAdd.\n\n1 1\n\n### Assistant:\n2{END}"
    assert learned_text(document, tokenizer) == f"2{END}"
    # What is saved with the adapter writes prompts the same way at inference.
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Add.\n\n1 1"}], tokenize=False, add_generation_prompt=True
    )
    assert whole_text(document, tokenizer).startswith(prompt)


def test_every_answer_of_a_conversation_is_learned_with_its_end():
    tokenizer = make_tokenizer(chat_template=CHATML)
    (document,) = tokenize(examples(chat("hi", "hello", "bye", "ciao")), tokenizer, LONG).documents
    assert learned_text(document, tokenizer) == "hello<|im_end|>\nciao<|im_end|>"


def test_end_of_turn_is_learned_although_it_is_not_the_end_token():
    """Named regression: fine-tuned chat models that never stop, because their end-of-turn token was masked."""
    tokenizer = make_tokenizer(chat_template=CHATML)
    (document,) = tokenize(examples(chat("hi", "hello")), tokenizer, LONG).documents
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn in document.input_ids[document.learned]
    assert tokenizer.eos_token_id not in document.input_ids


def test_a_template_without_an_end_gets_the_end_token():
    tokenizer = make_tokenizer(
        chat_template="{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    (document,) = tokenize(examples(chat("hi", "hello")), tokenizer, LONG).documents
    assert document.input_ids[-1] == tokenizer.eos_token_id
    assert document.learned[-1]


def test_a_template_that_forgets_earlier_answers_gives_one_document_a_turn():
    tokenizer = make_tokenizer(chat_template=FORGETFUL)
    documents = tokenize(examples(chat("a", "one", "b", "two")), tokenizer, LONG).documents
    assert [whole_text(d, tokenizer) for d in documents] == [
        f"[u]a{END}[a]one{END}",
        f"[u]a{END}[a][u]b{END}[a]two{END}",
    ]
    assert [learned_text(d, tokenizer).removeprefix("[a]") for d in documents] == [f"one{END}", f"two{END}"]


def test_a_generation_prompt_that_opens_a_reasoning_block():
    tokenizer = make_tokenizer(chat_template=THINKING)
    (document,) = tokenize(examples(chat("hi", "hello")), tokenizer, LONG).documents
    assert learned_text(document, tokenizer) == "hello<|im_end|>"


def test_a_template_that_rewrites_its_past_is_refused():
    tokenizer = make_tokenizer(
        chat_template="{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"f\.jsonl, row 1: the chat template rewrites"):
        tokenize(examples(chat("hi", "hello")), tokenizer, LONG)


def test_a_conversation_that_the_template_refuses_is_named():
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    row = {"messages": [{"role": "system", "content": "x"}, *chat("hi", "hello")["messages"]]}
    with pytest.raises(UserError, match=r"f\.jsonl, row 1: the chat template refuses this conversation: no system"):
        tokenize(examples(row), tokenizer, LONG)


def test_a_start_token_comes_once(tmp_path):
    folder = save_tiny(tmp_path, bos="<s>")
    for data_format, row in (
        ("prompt_completion", {"prompt": "1+1=", "completion": "2"}),
        ("alpaca", {"instruction": "add", "output": "2"}),
        ("text", {"text": "once upon a time"}),
    ):
        tokenizer = load_tokenizer(folder, data_format=data_format)
        (document,) = tokenize(examples(row), tokenizer, LONG).documents
        assert (document.input_ids == tokenizer.bos_token_id).sum() == 1
        assert document.input_ids[0] == tokenizer.bos_token_id
        assert not document.learned[0]


def test_a_tokenizer_without_offsets_gives_the_same():
    class Slow:
        """The same tokenizer, as one that cannot say where its tokens come from."""

        is_fast = False

        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, text, **options):
            assert "return_offsets_mapping" not in options
            return self.inner(text, **options)

    tokenizer = make_tokenizer(chat_template=CHATML)
    rows = examples(chat("hi", "hello", "bye", "ciao"))
    fast, slow = (tokenize(rows, t, LONG).documents[0] for t in (tokenizer, Slow(tokenizer)))
    assert np.array_equal(fast.input_ids, slow.input_ids)
    assert np.array_equal(fast.learned, slow.learned)


def test_the_whole_text_is_learned_on_request():
    tokenizer = make_tokenizer(chat_template=CHATML)
    (document,) = tokenize(examples(chat("hi", "hello")), tokenizer, LONG, completion_only_loss=False).documents
    assert document.learned.tolist() == [False] + [True] * (len(document) - 1)


def test_raw_text_is_learned_whole_in_pieces():
    tokenizer = make_tokenizer()
    text = "The quick brown fox jumps over the lazy dog. " * 5
    result = tokenize(examples({"text": text}), tokenizer, 16)
    joined = np.concatenate([document.input_ids for document in result.documents])
    assert joined.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert all(len(document) <= 16 for document in result.documents)
    assert all(document.learned.tolist() == [False] + [True] * (len(document) - 1) for document in result.documents)
    assert result.cut_short == 0


def test_cut_answers_are_counted_and_lost_ones_left_out():
    tokenizer = make_tokenizer()
    rows = examples(
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b" * 40},
        {"prompt": "a" * 40, "completion": "b"},
    )
    result = tokenize(rows, tokenizer, 12)
    assert (result.rows, len(result.documents), result.cut_short) == (3, 2, 1)
    assert result.dropped == ["f.jsonl, row 3"]
    assert len(result.documents[1]) == 12
    assert tokenizer.eos_token_id not in result.documents[1].input_ids


def test_a_set_in_which_nothing_is_learned_is_refused():
    tokenizer = make_tokenizer()
    with pytest.raises(UserError) as caught:
        tokenize(examples({"prompt": "a" * 40, "completion": "b"}), tokenizer, 12)
    assert "no token would be learned: max_length 12 cuts off every one of the 1 answers" in caught.value.message
    assert "f.jsonl, row 1" in caught.value.message
    assert "raise max_length; the longest row has" in caught.value.fix


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    folder = save_tiny(tmp_path, end=None)
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    assert f"the tokenizer of {folder} has no end token" in caught.value.message
    assert END in caught.value.fix
    assert load_tokenizer(folder, eos_token=END).eos_token == END
    with pytest.raises(UserError, match="eos_token: '<nope>' is not in the vocabulary"):
        load_tokenizer(folder, eos_token="<nope>")


def test_templates_by_name_and_by_path(tiny, tmp_path):
    assert load_tokenizer(tiny, "none").chat_template is None
    assert "###" in load_tokenizer(tiny, "plain", data_format="prompt_completion").chat_template
    (tmp_path / "chat.jinja").write_text(CHATML)
    assert load_tokenizer(tiny, str(tmp_path / "chat.jinja")).chat_template == CHATML
    with pytest.raises(UserError, match=r"chat_template: nowhere\.jinja: no such file"):
        load_tokenizer(tiny, "nowhere.jinja")
    with pytest.raises(UserError, match=r"row 1: chat messages cannot be written without a template"):
        tokenize(examples(chat("hi", "hello")), load_tokenizer(tiny, "none"), LONG)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer can be loaded from"):
        load_tokenizer(str(tmp_path))
