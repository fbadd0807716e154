"""Models of a few kilobytes and random weights, written for the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import gguf
import numpy as np

__all__ = ["END", "RERANK_TEMPLATE", "write_projector", "write_qwen3"]

START, END = "<|im_start|>", "<|im_end|>"
RERANK_TEMPLATE = (
    f"{START}system\nAnswer yes or no.{END}\n{START}user\n<Query>: {{query}}\n"
    f"<Document>: {{document}}{END}\n{START}assistant\n"
)
_WIDTH, _HEADS, _LAYERS, _FEED = 32, 2, 2, 64
_MERGES = ["y e", "ye s", "n o", "Ġ b", "e e", "Ġb ee"]


def _bytes_as_characters() -> list[str]:
    """The alphabet of GPT-2's byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


def write_qwen3(
    path: Path,
    kind: Literal["chat", "embed", "rerank"],
    *,
    seed: int = 7,
    templates: Mapping[str, str] | None = None,
    suppressed: Sequence[int] = (),
    controls: Sequence[str] = (),
) -> Path:
    """A decoder of the architecture ``qwen3``; all kinds share a seed's weights, and vocabulary.

    ``chat`` continues a text, ``embed`` pools the last token, ``rerank`` turns the logits of
    "yes" and "no" after its template into probabilities. ``templates`` are chat templates by name,
    ``suppressed`` ids of tokens that must never be drawn, ``controls`` more control tokens.
    """
    tokens = _bytes_as_characters() + [merge.replace(" ", "") for merge in _MERGES]
    n_normal = len(tokens)
    tokens += [START, END, *controls]
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(256)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_FEED)
    writer.add_block_count(_LAYERS)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_key_length(_WIDTH // _HEADS)
    writer.add_value_length(_WIDTH // _HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    types = [gguf.TokenType.NORMAL] * n_normal + [gguf.TokenType.CONTROL] * (2 + len(controls))
    writer.add_token_types(types)
    writer.add_token_merges(_MERGES)
    writer.add_eos_token_id(tokens.index(END))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(kind == "embed")
    writer.add_array("tokenizer.ggml.suppress_tokens", list(suppressed))
    random = np.random.default_rng(seed)

    def add(name: str, *shape: int, scale: float = 0.3) -> np.ndarray:
        weights = (random.standard_normal(shape) * scale).astype(np.float32)
        writer.add_tensor(name, weights)
        return weights

    add("token_embd.weight", len(tokens), _WIDTH)
    for i in range(_LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}.weight", _WIDTH, _WIDTH)
        for name, width in (("attn_norm", _WIDTH), ("ffn_norm", _WIDTH)):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(width, np.float32))
        for name in ("attn_q_norm", "attn_k_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(_WIDTH // _HEADS, np.float32))
        add(f"blk.{i}.ffn_gate.weight", _FEED, _WIDTH)
        add(f"blk.{i}.ffn_up.weight", _FEED, _WIDTH)
        add(f"blk.{i}.ffn_down.weight", _WIDTH, _FEED)
    writer.add_tensor("output_norm.weight", np.ones(_WIDTH, np.float32))
    output = add("output.weight", len(tokens), _WIDTH, scale=1.0)
    if kind == "embed":
        writer.add_pooling_type(gguf.PoolingType.LAST)
    if kind == "rerank":
        writer.add_pooling_type(gguf.PoolingType.RANK)
        writer.add_classifier_output_labels(["yes", "no"])
        writer.add_chat_template([{"name": "rerank", "template": RERANK_TEMPLATE}])
        rows = [tokens.index("yes"), tokens.index("no")]
        writer.add_tensor("cls.output.weight", np.ascontiguousarray(output[rows]))
    if templates is not None:
        named = [{"name": name, "template": text} for name, text in templates.items()]
        writer.add_chat_template(named)
    _write(writer)
    return path


def write_projector(path: Path, *, width: int) -> Path:
    """A vision projector (``mlp``) of 56 by 56 pixels in 16 patches, for a model of ``width``."""
    size, patch, hidden, feed, layers = 56, 14, 64, 128, 2
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_uint32("clip.vision.image_size", size)
    writer.add_uint32("clip.vision.patch_size", patch)
    writer.add_uint32("clip.vision.embedding_length", hidden)
    writer.add_uint32("clip.vision.feed_forward_length", feed)
    writer.add_uint32("clip.vision.block_count", layers)
    writer.add_uint32("clip.vision.projection_dim", width)
    writer.add_uint32("clip.vision.attention.head_count", 4)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    writer.add_bool("clip.use_gelu", True)
    random = np.random.default_rng(7)

    def add(name: str, *shape: int) -> None:
        # Strong enough for the pixels to matter to what the model says.
        writer.add_tensor(name, (random.standard_normal(shape) * 0.4).astype(np.float32))

    add("v.class_embd", hidden)
    add("v.patch_embd.weight", hidden, 3, patch, patch)
    add("v.position_embd.weight", (size // patch) ** 2 + 1, hidden)
    for norm in ("pre_ln", "post_ln"):
        add(f"v.{norm}.weight", hidden)
        add(f"v.{norm}.bias", hidden)
    shapes = {
        **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (hidden, hidden)),
        "ffn_up": (feed, hidden),
        "ffn_down": (hidden, feed),
    }
    for i in range(layers):
        for name, shape in shapes.items():
            add(f"v.blk.{i}.{name}.weight", *shape)
            add(f"v.blk.{i}.{name}.bias", shape[0])
        for name in ("ln1", "ln2"):
            add(f"v.blk.{i}.{name}.weight", hidden)
            add(f"v.blk.{i}.{name}.bias", hidden)
    add("mm.0.weight", width, hidden)
    add("mm.0.bias", width)
    add("mm.2.weight", width, width)
    add("mm.2.bias", width)
    _write(writer)
    return path


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
