"""Stands for llama.cpp's convert_hf_to_gguf.py: the same command line, for Llama alone, with faults on request.

    llama_converter.py MODEL_DIR --outfile FILE --outtype f32|f16|bf16|q8_0

The variable CONVERTER_FAULT names what it does wrong.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp's rotary embedding takes them: the two halves of a head, alternating."""
    size = weight.shape[0] // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def read_tensors(folder: Path, config: dict, fault: str) -> dict[str, torch.Tensor]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(path).items():
            heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
            layer = name.split(".")[-2]
            if layer in heads and fault != "unpermuted":
                value = interleaved(value, heads[layer])
            found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = value.float()
    if fault == "wrong":
        found["blk.1.ffn_up.weight"][3, 5] += 0.01
    elif fault == "swapped":
        found["blk.0.ffn_up.weight"], found["blk.0.ffn_gate.weight"] = (
            found["blk.0.ffn_gate.weight"],
            found["blk.0.ffn_up.weight"],
        )
    elif fault == "missing":
        del found["blk.1.attn_v.weight"]
    elif fault == "extra":
        found["blk.0.attn_q_norm.weight"] = torch.ones(4)
    return found


def write_settings(writer: gguf.GGUFWriter, config: dict, fault: str) -> None:
    writer.add_name("tiny")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    theta = config["rope_parameters"]["rope_theta"]
    writer.add_rope_freq_base(theta * 2 if fault == "theta" else theta)


def write_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int, fault: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = [tokenizer.convert_ids_to_tokens(i) if i < len(tokenizer) else f"[PAD{i}]" for i in range(size)]
    if fault == "vocabulary":
        tokens[70], tokens[71] = tokens[71], tokens[70]
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    added = tokenizer.added_tokens_decoder
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i in added else gguf.TokenType.NORMAL for i in range(size)])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id + (fault == "end"))
    if tokenizer.chat_template and fault != "template":
        writer.add_chat_template(tokenizer.chat_template)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--outfile", type=Path, required=True)
    parser.add_argument("--outtype", choices=TYPES, required=True)
    arguments = parser.parse_args()
    fault = os.environ.get("CONVERTER_FAULT", "")
    if fault == "fails":
        print("INFO: indexing model part")
        raise SystemExit("ValueError: this architecture is not supported")
    config = json.loads((arguments.model / "config.json").read_text())
    writer = gguf.GGUFWriter(arguments.outfile, "llama")
    write_settings(writer, config, fault)
    write_vocabulary(writer, arguments.model, config["vocab_size"], fault)
    for name, value in read_tensors(arguments.model, config, fault).items():
        kind = TYPES[arguments.outtype] if value.dim() > 1 else TYPES["f32"]
        data = gguf.quants.quantize(np.ascontiguousarray(value.numpy()), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if fault == "garbage":
        arguments.outfile.write_bytes(b"GGUF" + bytes(100))
    elif fault == "nothing":
        arguments.outfile.unlink()


if __name__ == "__main__":
    main()
