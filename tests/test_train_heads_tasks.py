"""Tags of words, masked words, spans of a context, and answers that are written: rows, runs, and equal gradients."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train_heads import (
    SLOW,
    encoder_decoder_fixture,  # noqa: F401
    encoder_fixture,  # noqa: F401
    gradients,
    records,
    scores_at_least,
    settings,
)
from tiny_heads import (
    encoder_tokenizer,
    people,
    questions,
    reviews,
    save_encoder,
    save_encoder_decoder,
    translations,
    write_rows,
)

from pyfinetune.errors import UserError
from pyfinetune.train.data.formats import Example
from pyfinetune.train.data.reading import prepare_rows, read_data
from pyfinetune.train.heads.encoders import IGNORED, MaskedRows, Part, masked_rows, word_rows
from pyfinetune.train.heads.kinds import HEADS, choose_head, choose_labels, may_be_unanswered
from pyfinetune.train.heads.rows import head_part
from pyfinetune.train.heads.scores import floor_of, frequency_floor, predictions_of
from pyfinetune.train.heads.spans import best_spans, find_answer, span_rows
from pyfinetune.train.preflight.checks import examine
from pyfinetune.train.run import train


def named(format: str, **fields) -> Example:
    return Example("f, row 1", format, fields=fields)


class TestWords:
    def test_the_first_token_of_a_word_has_its_tag_and_lost_words_are_counted(self):
        tokenizer, head = encoder_tokenizer(), HEADS["token_classification"]
        words, tags = ["annbob", "saw", "zzz", "carl"], ["B-per", "O", "O", "I-per"]
        example = named("token_classification", tokens=words, tags=tags)
        labels = choose_labels([example], head)
        assert labels == ("O", "B-per", "I-per")
        part = word_rows([example], tokenizer, 32, head, labels)
        (row,), (places,) = part.rows, part.notes
        pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
        assert places[1] - places[0] > 1, pieces  # several tokens, of which one is labelled
        assert [row["labels"][place] for place in places] == [1, 0, 0, 2]
        assert sum(label != IGNORED for label in row["labels"]) == 4 == part.targets
        short = word_rows([example], tokenizer, places[2] + 1, head, labels)
        assert short.notes == [[places[0], places[1], -1, -1]]
        assert (short.lost, short.cut, short.targets) == (2, ["f, row 1"], 2)

    def test_a_run_finds_names_and_words_cut_off_are_missed(self, encoder, tmp_path):
        data = write_rows(tmp_path / "rows.jsonl", people())
        config = settings(encoder, data, tmp_path / "out", method="full", trainer={"max_steps": 24})
        result = train(config)
        scores_at_least(result, "span_f1", 0.9)
        assert result.floor["what"].startswith("each word's most frequent tag")
        assert result.floor["span_f1"] < result.metrics["span_f1"]["value"]
        from transformers import AutoModelForTokenClassification, AutoTokenizer

        out = tmp_path / "out"
        model, tokenizer = AutoModelForTokenClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        assert set(model.config.id2label.values()) == {"O", "B-per", "I-per"}
        held_out, head = read_data(config).held_out, HEADS["token_classification"]
        labels = tuple(model.config.id2label.values())
        part = head_part(held_out, tokenizer, config, head, labels)
        said = predictions_of(head, part, model, tokenizer)
        assert said == predictions_of(head, part, model, tokenizer, batch_size=3)
        wrong = sum(a != b for tags, e in zip(said, held_out, strict=True) for a, b in zip(tags, e.fields["tags"]))  # noqa: B905
        words = sum(len(example.fields["tags"]) for example in held_out)
        assert 1 - wrong / words == pytest.approx(result.metrics["accuracy"]["value"])
        short = head_part(held_out, tokenizer, config.model_copy(update={"max_length": 5}), head, labels)
        cut = predictions_of(head, short, model, tokenizer)
        assert all(tags[3:] == ["O"] * len(tags[3:]) for tags in cut)
        found = examine(config.model_copy(update={"max_length": 5, "output_dir": str(tmp_path / "new")}))
        assert any("held-out rows get no tag and count as wrong" in problem.message for problem in found.problems)

    def test_the_floor_remembers_words(self):
        head = HEADS["token_classification"]
        train = Part([named("token_classification", tokens=["ann", "saw", "ann"], tags=["B-per", "O", "O"])])
        train.examples.append(named("token_classification", tokens=["ann"], tags=["B-per"]))
        held = Part([named("token_classification", tokens=["ann", "fay", "saw"], tags=["O", "O", "O"])])
        assert floor_of(head, train, held)[1] == [["B-per", "B-per", "O"]]


class TestMaskedWords:
    def test_what_is_masked_follows_from_seed_epoch_and_row(self):
        tokenizer = encoder_tokenizer()
        examples = [Example("f, row 1", "text", text=f"{row['text']} " * 20) for row in reviews(32)]
        part = masked_rows(examples, tokenizer, 64, 0.15)
        assert max(len(row["input_ids"]) for row in part.rows) == 64
        assert len(part.rows) > len(examples)  # a long text becomes several pieces
        rows = MaskedRows(part.rows, tokenizer, 0.15, seed=1, fixed=False)
        first = rows[3]
        torch.randn(5)
        rows[0]
        assert rows[3] == first  # whatever was drawn between
        rows.set_epoch(1)
        assert rows[3] != first
        rows.set_epoch(0)
        assert rows[3] == first
        held = MaskedRows(part.rows, tokenizer, 0.15, seed=1, fixed=True)
        before = held[3]
        held.set_epoch(1)
        assert held[3] == before != first
        learned = masks = kept = 0
        for index, row in enumerate(part.rows):
            drawn = rows[index]
            for was, now, label in zip(row["input_ids"], drawn["input_ids"], drawn["labels"], strict=True):
                assert now == was if label == IGNORED else label == was
                learned += label != IGNORED
                masks += label != IGNORED and now == tokenizer.mask_token_id
                kept += label != IGNORED and now == was
        free = sum(row["special_tokens_mask"].count(0) for row in part.rows)
        assert learned / free == pytest.approx(0.15, abs=0.02)
        assert masks / learned == pytest.approx(0.8, abs=0.05)
        assert kept / learned == pytest.approx(0.1, abs=0.05)

    @pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=SLOW)])
    def test_a_run_learns_and_saves_what_transformers_loads(self, encoder, tmp_path, method):
        out, data = tmp_path / "out", write_rows(tmp_path / "rows.jsonl", reviews(96))
        config = settings(encoder, data, out, method=method, task="pretrain", trainer={"max_steps": 24})
        result = train(config)
        assert result.eval_loss < result.eval_loss_before - 0.3
        assert result.perplexity == pytest.approx(math.exp(result.eval_loss))
        assert result.floor["loss"] > 0
        assert result.metrics is None
        from peft import PeftModel
        from transformers import AutoModelForMaskedLM

        model = AutoModelForMaskedLM.from_pretrained(out if method == "full" else encoder)
        model = model if method == "full" else PeftModel.from_pretrained(model, out)
        assert held_out_loss(config, model) == pytest.approx(result.eval_loss, rel=1e-5)

    def test_the_floor_is_the_frequency_of_tokens(self):
        row = {"input_ids": [2, 7, 7, 9, 3], "special_tokens_mask": [1, 0, 0, 0, 1]}
        train, held = Part([], [row]), Part([], [{"input_ids": [2, 9, 3], "special_tokens_mask": [1, 0, 1]}])
        assert frequency_floor(train, held, 10)["loss"] == pytest.approx(-math.log(2 / 13))


def held_out_loss(config, model) -> float:
    """Held-out loss of a model, with another batch size than the run's."""
    from transformers import AutoTokenizer

    from pyfinetune.train import loop
    from pyfinetune.train.heads.loop import trainer_parts

    config = config.model_copy(update={"trainer": {"per_device_eval_batch_size": 3}})
    data = read_data(config, unanswered=may_be_unanswered(config))
    head, tokenizer = choose_head(config, data.train), AutoTokenizer.from_pretrained(config.output_dir)
    rows = prepare_rows(data, tokenizer, config, head)
    arguments = loop.training_arguments(config, train_rows=len(rows.train), held_out=True)
    parts = trainer_parts(head, rows, tokenizer, model, config)
    trainer = loop.build_trainer(model, arguments, **parts, tokenizer=tokenizer, max_length=32)
    return trainer.evaluate()["eval_loss"]


class TestSpans:
    def test_an_answer_is_found_and_one_that_is_not_there_is_named(self):
        ask = {"question": "who ?", "context": "ann saw ann ."}
        assert find_answer(named("question_answering", **ask, answer="ann")) == (0, 3)
        assert find_answer(named("question_answering", **ask, answers={"text": ["ann"], "answer_start": [8]})) == (
            8,
            11,
        )
        assert find_answer(named("question_answering", **ask, answers=["saw"])) == (4, 7)
        assert find_answer(named("question_answering", **ask, answers={"text": [], "answer_start": []})) is None
        with pytest.raises(UserError, match="f, row 1: the answer 'bob' does not stand in its context"):
            find_answer(named("question_answering", **ask, answer="bob"))
        with pytest.raises(UserError, match="'ann' does not stand at answer_start 7"):
            find_answer(named("question_answering", **ask, answers={"text": ["ann"], "answer_start": [7]}))
        with pytest.raises(UserError, match="has no context"):
            find_answer(named("question_answering", question="who ?", answer="bob"))

    def test_windows_overlap_and_the_best_span_is_over_all_of_them(self):
        tokenizer = encoder_tokenizer()
        context = "the dog saw the cat . " * 6 + "then ann ran home ."
        example = named("question_answering", question="who ran ?", context=context, answer="ann")
        part = span_rows([example], tokenizer, 24, 6)
        assert len(part.rows) > 2
        assert set(part.owners) == {0}
        hits = [index for index, row in enumerate(part.rows) if row["labels"] != [0, 0]]
        for index, row in enumerate(part.rows):
            first, last = row["labels"]
            text = tokenizer.decode(row["input_ids"][first : last + 1])
            assert text == ("ann" if index in hits else "[CLS]")
        assert hits
        starts = [np.zeros(len(row["input_ids"])) for row in part.rows]
        ends = [np.zeros(len(row["input_ids"])) for row in part.rows]
        starts[hits[0]][part.rows[hits[0]]["labels"][0]] = 3
        ends[hits[0]][part.rows[hits[0]]["labels"][1]] = 3
        starts[0][1], ends[0][2] = 9, 9  # tokens of the question are no answer
        assert best_spans(part, starts, ends, unanswerable=True) == ["ann"]
        for row in range(len(part.rows)):
            starts[row][0], ends[row][0] = 4, 4
        assert best_spans(part, starts, ends, unanswerable=True) == [""]
        assert best_spans(part, starts, ends, unanswerable=False) == ["ann"]

    def test_a_question_that_leaves_no_room_is_named(self):
        example = named("question_answering", question="who " * 20, context="the dog . " * 20, answer="dog")
        with pytest.raises(UserError, match="f, row 1: beside the 20 tokens of its question, max_length 24 leaves 1"):
            span_rows([example], encoder_tokenizer(), 24, 6)

    def test_rows_that_need_one_window_need_no_stride(self):
        """The tokenizers library refuses a stride as long as the rows, though none of these is cut."""
        example = named("question_answering", question="who ran ?", context="the dog ran .", answer="dog")
        part = span_rows([example], encoder_tokenizer(), 24, 128)
        assert len(part.rows) == 1
        assert part.rows[0]["labels"] == span_rows([example], encoder_tokenizer(), 24, 4).rows[0]["labels"]

    def test_a_run_points_at_answers_and_at_none(self, encoder, tmp_path):
        rows = questions(72)
        for row in rows[::9]:
            row |= {"question": "who saw the park ?", "answers": {"text": [], "answer_start": []}}
        config = settings(
            encoder,
            write_rows(tmp_path / "rows.jsonl", rows),
            tmp_path / "out",
            method="full",
            doc_stride=4,
            trainer={"max_steps": 60},
        )
        result = train(config)
        scores_at_least(result, "f1", 0.6)
        assert result.floor["f1"] < result.metrics["f1"]["value"]
        assert result.floor["what"].startswith("the sentence")
        assert held_out_loss(config, loaded(tmp_path / "out")) == pytest.approx(result.eval_loss, rel=1e-5)


def loaded(out: Path):
    from transformers import AutoModelForQuestionAnswering

    return AutoModelForQuestionAnswering.from_pretrained(out)


class TestWriting:
    @pytest.mark.parametrize("method", [pytest.param("full", marks=SLOW), "lora"])
    def test_a_run_translates_and_saves_what_transformers_loads(self, encoder_decoder, tmp_path, method):
        out, data = tmp_path / "out", write_rows(tmp_path / "rows.jsonl", translations(64))
        section = {"max_steps": 80 if method == "full" else 20, "learning_rate": 1e-2}
        config = settings(encoder_decoder, data, out, method=method, eval_generate_rows=10, trainer=section)
        result = train(config)
        assert result.eval_loss < result.eval_loss_before - 0.3
        assert result.perplexity == pytest.approx(math.exp(result.eval_loss))
        assert result.metrics["bleu"]["rows"] == 10
        assert result.floor["what"] == "the text itself, copied"
        if method == "full":
            assert result.metrics["chrf"]["value"] > result.floor["chrf"] + 10
        from peft import PeftModel
        from transformers import AutoModelForSeq2SeqLM

        model = AutoModelForSeq2SeqLM.from_pretrained(out if method == "full" else encoder_decoder)
        model = model if method == "full" else PeftModel.from_pretrained(model, out)
        assert held_out_loss(config, model) == pytest.approx(result.eval_loss, rel=1e-5)

    def test_a_task_is_asked_and_a_chat_of_several_answers_is_refused(self, encoder_decoder, tmp_path):
        from pyfinetune.train.heads.sequences import source_and_target

        data = read_data(
            settings(encoder_decoder, write_rows(tmp_path / "a.jsonl", reviews(4)), tmp_path, test_size=None)
        )
        source, target = source_and_target(data.train[0], prefix="t5: ")
        assert source.startswith("t5: Classify the text.")
        assert target == "pos"
        turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
        with pytest.raises(UserError, match="f, row 1: has more than one answer"):
            source_and_target(Example("f, row 1", "messages", turns))


CASES = {
    "sequence_classification": (reviews, {}),
    "token_classification": (people, {}),
    "masked_lm": (reviews, {"task": "pretrain"}),
    "question_answering": (questions, {"doc_stride": 2, "max_length": 16}),
    "seq2seq_lm": (translations, {}),
}


@pytest.mark.parametrize("kind", list(CASES))
def test_accumulated_batches_give_the_gradients_of_one(tmp_path, kind):
    rows, change = CASES[kind]
    save = save_encoder_decoder if kind == "seq2seq_lm" else save_encoder
    model = save(tmp_path / "model", dropout=0.0)
    config = settings(model, write_rows(tmp_path / "rows.jsonl", rows()), tmp_path / "out", method="full", **change)
    assert choose_head(config, read_data(config).train).kind == kind
    one, loss = gradients(config, 4, 1)
    two, same_loss = gradients(config, 2, 2)
    assert loss == pytest.approx(same_loss, rel=1e-6)
    assert one.keys() == two.keys()
    assert any(grad.abs().max() > 1e-4 for grad in one.values())
    for name, grad in one.items():
        assert torch.allclose(grad, two[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(
    "kind",
    [
        "sequence_classification",
        pytest.param("token_classification", marks=SLOW),
        pytest.param("masked_lm", marks=SLOW),
        "seq2seq_lm",
    ],
)
def test_kernels_change_no_number(tmp_path, kind):
    rows, change = CASES[kind]
    save = save_encoder_decoder if kind == "seq2seq_lm" else save_encoder
    model = save(tmp_path / "model", dropout=0.0)
    data, losses = write_rows(tmp_path / "rows.jsonl", rows()), []
    for patch in (True, False):
        out = tmp_path / f"patch-{patch}"
        result = train(settings(model, data, out, patch=patch, trainer={"max_steps": 6}, **change))
        kernels = json.loads((out / "run.json").read_text())["kernels"]
        assert (kernels["swapped"] > 0) == patch, kernels
        losses.append([result.eval_loss, *(r["loss"] for r in records(out) if "loss" in r)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
