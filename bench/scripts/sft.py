"""An ordinary script for TRL's `SFTTrainer`: LoRA on a Llama, short documents packed into rows, on the CPU.

    python bench/scripts/sft.py
    pyfinetune run bench/scripts/sft.py

It knows nothing of pyfinetune. Model and text are random, so that it needs no network; its last line is JSON with the
losses and the tokens trained per second, which `python -m pyfinetune.bench.compare_scripts` reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

SHAPES = {
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def random_documents(count: int, length: int, vocabulary: int) -> Dataset:
    """Documents of `length` tokens, each of a few that it repeats, so that there is something to learn."""
    few = torch.randint(4, vocabulary, (count, 8))
    return Dataset.from_dict({"input_ids": few.gather(1, torch.randint(8, (count, length))).tolist()})


def plain_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A word for each number; the documents are tokenized already, the trainer asks for its special tokens only."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="135m", help="shapes of the random Llama")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps; the first is not timed")
    parser.add_argument("--document", type=int, default=256, help="tokens of a document")
    parser.add_argument("--row", type=int, default=1024, help="tokens of a packed row, which is a batch")
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = SHAPES[args.model]
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).to(torch.bfloat16)
    documents = args.steps * (args.row // args.document)
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=1,
            packing=True,
            max_length=args.row,
            learning_rate=1e-3,
            logging_steps=1,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model,
            config,
            train_dataset=random_documents(documents, args.document, shape["vocab_size"]),
            processing_class=plain_tokenizer(shape["vocab_size"]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            callbacks=[times],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rate = args.row / statistics.median(times.seconds[1:])
    print(json.dumps({"losses": losses, "tokens_per_second": rate}))


if __name__ == "__main__":
    main()
