"""A loaded GGUF: weights, vocabulary and metadata."""

from __future__ import annotations

import ctypes
import functools
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from inferpool.config import MAX_CONTEXT_LENGTH
from inferpool.engine.abort import AbortToken
from inferpool.engine.backend import init_backend, lib, model_params, native_errors
from inferpool.errors import CallCancelled, ModelLoadError

__all__ = ["Model"]

_NORMALIZER = "tokenizer.ggml.normalizer."


class Model:
    """Weights and vocabulary of one GGUF file. Close it after the contexts made from it.

    Attributes:
        path: the file.
        has_accelerator: whether some of its layers may be kept on one.
        n_ctx_train: context length the model was trained with, in tokens.
        n_embd: width of its output vectors.
        n_embd_in: width of the embeddings that it takes in place of token ids.
        n_vocab: number of tokens in the vocabulary.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_gpu_layers: int = 0,
        abort: AbortToken | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Load ``path``.

        Args:
            path: a GGUF file.
            n_gpu_layers: layers kept on an accelerator; -1 means all.
            abort: ends the loading early.
            progress: told which part is loaded, from 0 to 1.

        Raises:
            ModelLoadError: if it is not a GGUF that llama.cpp can load, or its context length
                is 0 or absurd.
            CallCancelled: if ``abort`` was set meanwhile.
        """
        init_backend()
        self.path = path
        self.has_accelerator = n_gpu_layers != 0
        self._handle: lib.llama_model_p | None = _load(path, n_gpu_layers, abort, progress)
        self.n_ctx_train: int = lib.llama_model_n_ctx_train(self._handle)
        self.n_embd: int = lib.llama_model_n_embd_out(self._handle)
        self.n_embd_in: int = lib.llama_model_n_embd_inp(self._handle)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        self._add_bos: bool = lib.llama_vocab_get_add_bos(self._vocab)
        if lib.llama_vocab_type(self._vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
            self.close()
            raise ModelLoadError(f"{path} has no vocabulary, so it reads no text")
        self._strips_accents = self.is_wordpiece and self._asks_for_stripping()
        # It comes from the file, and would become the size of an allocation.
        if not 0 < self.n_ctx_train <= MAX_CONTEXT_LENGTH:
            self.close()
            raise ModelLoadError(
                f"{path}: a context length of {self.n_ctx_train} tokens makes no sense"
            )

    def close(self) -> None:
        """Free the weights. Closing twice is harmless."""
        if self._handle is not None:
            lib.llama_model_free(self._handle)
            self._handle = None

    @property
    def handle(self) -> lib.llama_model_p:
        """The native ``llama_model *``."""
        if self._handle is None:
            raise RuntimeError("the model is closed")
        return self._handle

    @property
    def _vocab(self) -> lib.llama_vocab_p:
        # Part of the model: through `handle`, so that none is used after it is freed.
        vocab: lib.llama_vocab_p = lib.llama_model_get_vocab(self.handle)
        return vocab

    def tokenize(
        self, text: str, *, add_special: bool, parse_special: bool
    ) -> npt.NDArray[np.int32]:
        """Token ids of ``text``, shape (n,).

        Args:
            text: any text.
            add_special: add what the model wants around a text (``[CLS] … [SEP]``, BOS).
            parse_special: read ``<|im_end|>`` and the like as that token; otherwise such
                text is text.
        """
        if self._strips_accents and not text.isascii():
            text = _without_accents(text)
        data = text.encode("utf-8")
        n_max = len(data) + 8  # enough for nearly every text, or the exact number comes back
        while True:
            tokens = np.empty(n_max, np.int32)
            n = lib.llama_tokenize(
                self._vocab,
                data,
                len(data),
                tokens.ctypes.data_as(lib.llama_token_p),
                n_max,
                add_special,
                parse_special,
            )
            if n >= 0:
                return tokens[:n]
            n_max = -n

    def tokenize_prompt(self, prompt: str) -> npt.NDArray[np.int32]:
        """Token ids of a rendered chat template, shape (n,), control tokens included.

        BOS comes first for models that want one, whether or not the template wrote it.
        """
        tokens = self.tokenize(prompt, add_special=False, parse_special=True)
        bos = lib.llama_vocab_bos(self._vocab)
        if self._add_bos and not (tokens.size and tokens[0] == bos):
            tokens = np.insert(tokens, 0, bos)
        return tokens

    def control_tokens(self, prompt: str) -> set[str]:
        """Texts of the control tokens (``[SEP]``, ``<|im_end|>`` …) that ``prompt`` holds."""
        vocab = self._vocab
        return {
            self._token_text(token)
            for token in self.tokenize(prompt, add_special=False, parse_special=True)
            if lib.llama_vocab_get_attr(vocab, token) & lib.LLAMA_TOKEN_ATTR_CONTROL
        }

    def pair_separators(
        self,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Token ids before, between and after two texts that are read as a pair.

        BERT: ``[CLS] a [SEP] b [SEP]``; RoBERTa: ``<s> a </s></s> b </s>``.
        """
        vocab = self._vocab
        separator = lib.llama_vocab_sep(vocab)
        end = lib.llama_vocab_eos(vocab)
        adds_separator = lib.llama_vocab_get_add_sep(vocab)
        closing = [end] if lib.llama_vocab_get_add_eos(vocab) else [separator] * adds_separator
        between = closing
        if self.is_wordpiece:
            between = closing = [separator]  # whatever the metadata say, as llama.cpp does
        elif lib.llama_vocab_get_add_eos(vocab):
            between = closing + [separator] * adds_separator
        opening = [lib.llama_vocab_bos(vocab)] * self._add_bos
        before, middle, after = (
            np.array([token for token in tokens if token != lib.LLAMA_TOKEN_NULL], np.int32)
            for tokens in (opening, between, closing)
        )
        return before, middle, after

    @property
    def is_wordpiece(self) -> bool:
        """Whether its vocabulary is of the kind that BERT has."""
        return bool(lib.llama_vocab_type(self._vocab) == lib.LLAMA_VOCAB_TYPE_WPM)

    def _asks_for_stripping(self) -> bool:
        """Whether accents are left out of a text, as is the rule where case is, too."""
        values = (self.metadata(_NORMALIZER + key) for key in ("strip_accents", "lowercase"))
        return next((value == "true" for value in values if value is not None), True)

    @property
    def adds_bos(self) -> bool:
        """Whether a prompt begins with BOS."""
        return self._add_bos

    @property
    def adds_suffix(self) -> bool:
        """Whether ``add_special`` ends a text with a token (``[SEP]``, EOS)."""
        # The metadata don't tell: WordPiece has its [SEP] whatever they say, others never.
        around = self.tokenize("", add_special=True, parse_special=False)
        return len(around) > self._add_bos

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that ``token`` stands for; none for control tokens, unless ``special``."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    @functools.cached_property
    def longest_piece(self) -> int:
        """Bytes of the longest token: a text has at least so many times fewer tokens."""
        return max(len(self.piece(token, special=True)) for token in range(self.n_vocab))

    @property
    def has_encoder(self) -> bool:
        """Whether a prompt goes through an encoder before the decoder (T5)."""
        return bool(lib.llama_model_has_encoder(self.handle))

    @functools.cached_property
    def suppressed(self) -> list[int]:
        """Ids of tokens that must never be drawn (``tokenizer.ggml.suppress_tokens``)."""
        n = ctypes.c_int32()
        tokens = lib.llama_vocab_get_suppress_tokens(self._vocab, ctypes.byref(n))
        return [tokens[i] for i in range(n.value)]

    def is_eog(self, token: int) -> bool:
        """Whether ``token`` ends a generation (EOS, EOT, ``<|im_end|>`` …)."""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    @property
    def bos(self) -> str:
        """Text of the BOS token, or empty when the model has none."""
        return self._token_text(lib.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> str:
        """Text of the EOS token, or empty when the model has none."""
        return self._token_text(lib.llama_vocab_eos(self._vocab))

    def _token_text(self, token: int) -> str:
        if token == lib.LLAMA_TOKEN_NULL:
            return ""
        text: bytes = lib.llama_vocab_get_text(self._vocab, token)
        return text.decode("utf-8", "replace")

    @property
    def chat_template(self) -> str | None:
        """The jinja template in the metadata (``tokenizer.chat_template``), if any."""
        return self._template(None)

    @property
    def tool_template(self) -> str | None:
        """The jinja template for conversations with tools, if it is another one.

        ``tokenizer.chat_template.tool_use`` of the metadata.
        """
        return self._template(b"tool_use")

    @property
    def rerank_template(self) -> str | None:
        """The prompt of a reranker that is asked a question, with ``{query}`` and ``{document}``.

        ``tokenizer.chat_template.rerank`` of the metadata, if any.
        """
        return self._template(b"rerank")

    def _template(self, name: bytes | None) -> str | None:
        template: bytes | None = lib.llama_model_chat_template(self.handle, name)
        return None if template is None else template.decode("utf-8", "replace")

    def metadata(self, key: str) -> str | None:
        """A scalar of the GGUF's metadata as text, or None."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, size)
            if n < 0:
                return None
            if n < size:
                return buffer.value.decode("utf-8", "replace")
            size = n + 1

    def class_labels(self) -> list[str]:
        """Names of a classifier's outputs; empty names where the GGUF has none."""
        labels = (
            lib.llama_model_cls_label(self.handle, i)
            for i in range(lib.llama_model_n_cls_out(self.handle))
        )
        return [(label or b"").decode("utf-8", "replace") for label in labels]


def _without_accents(text: str) -> str:
    """What BERT's tokenizer makes of a text before it looks for words.

    llama.cpp would leave the first letter of each Korean syllable, and no vowel signs of Hindi.
    """
    parts = unicodedata.normalize("NFD", text)
    return "".join(part for part in parts if unicodedata.category(part) != "Mn")


def _load(
    path: Path,
    n_gpu_layers: int,
    abort: AbortToken | None,
    progress: Callable[[float], None] | None,
) -> lib.llama_model_p:
    if abort is not None and abort.is_set():
        raise CallCancelled(f"loading {path.name} was cancelled")
    params = model_params()
    params.n_gpu_layers = n_gpu_layers
    # `Model.tokenize` does that. The list ends where a key is empty.
    overrides = (lib.llama_model_kv_override * 2)()
    overrides[0] = lib.llama_model_kv_override(
        tag=lib.LLAMA_KV_OVERRIDE_TYPE_BOOL,
        key=f"{_NORMALIZER}strip_accents".encode(),
        value=lib.llama_model_kv_override_value(val_bool=False),
    )
    params.kv_overrides = overrides

    def go_on(part: float, _data: object) -> bool:
        if abort is not None and abort.is_set():
            return False
        if progress is not None:
            progress(part)
        return True

    keep_going = lib.llama_progress_callback(go_on)
    params.progress_callback = keep_going
    native_errors()
    handle: lib.llama_model_p | None = lib.llama_model_load_from_file(os.fsencode(path), params)
    if handle is None:
        if abort is not None and abort.is_set():
            raise CallCancelled(f"loading {path.name} was cancelled")
        reason = native_errors() or "llama.cpp gives no reason"
        raise ModelLoadError(f"can't load {path}: {reason}")
    return handle
