"""What embedding models want in front of a query or a document.

A model that was trained with prefixes finds worse without them, and its GGUF does not name them.
The table holds what the authors' model cards, or their ``config_sentence_transformers.json``, say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from inferpool.engine.model import Model

__all__ = ["prefixes_of"]

_SEARCH = "Represent this sentence for searching relevant passages: "
_INSTRUCT = "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"

# By a pattern of the model's name; the first that matches counts.
_KNOWN: tuple[tuple[str, Mapping[str, str]], ...] = (
    # https://huggingface.co/intfloat/multilingual-e5-large-instruct
    (r"e5\b.*\binstruct", {"query": f"{_INSTRUCT}Query: ", "document": ""}),
    # https://huggingface.co/intfloat/e5-base-v2
    # https://huggingface.co/intfloat/multilingual-e5-base
    (r"\be5\b", {"query": "query: ", "document": "passage: "}),
    # https://huggingface.co/BAAI/bge-m3
    (r"bge m3", {"query": "", "document": ""}),
    # https://huggingface.co/BAAI/bge-large-zh-v1.5
    (r"bge \w+ zh", {"query": "为这个句子生成表示以用于检索相关文章：", "document": ""}),  # noqa: RUF001
    # https://huggingface.co/BAAI/bge-base-en-v1.5
    (r"bge \w+ en", {"query": _SEARCH, "document": ""}),
    # https://huggingface.co/mixedbread-ai/mxbai-embed-large-v1
    (r"mxbai embed", {"query": _SEARCH, "document": ""}),
    # https://huggingface.co/Snowflake/snowflake-arctic-embed-l-v2.0
    (r"arctic embed .*v2", {"query": "query: ", "document": ""}),
    # https://huggingface.co/Snowflake/snowflake-arctic-embed-m-v1.5
    (r"arctic embed", {"query": _SEARCH, "document": ""}),
    # https://huggingface.co/nomic-ai/nomic-embed-text-v1.5
    (
        r"nomic embed text",
        {
            "query": "search_query: ",
            "document": "search_document: ",
            "clustering": "clustering: ",
            "classification": "classification: ",
        },
    ),
    # https://huggingface.co/Qwen/Qwen3-Embedding-0.6B
    (r"qwen3 embedding", {"query": f"{_INSTRUCT}Query:", "document": ""}),
    # https://huggingface.co/Alibaba-NLP/gte-Qwen2-1.5B-instruct
    (r"gte qwen2", {"query": f"{_INSTRUCT}Query: ", "document": ""}),
    # https://huggingface.co/google/embeddinggemma-300m
    (
        r"embedding ?gemma",
        {
            "query": "task: search result | query: ",
            "document": "title: none | text: ",
            "clustering": "task: clustering | query: ",
            "classification": "task: classification | query: ",
        },
    ),
)
_NONE: Mapping[str, str] = {"query": "", "document": ""}


def prefixes_of(model: Model) -> Mapping[str, str]:
    """Prefix by the name of what a text is; none for models that are not in the table.

    "query" and "document" are always among the names.
    """
    names = (model.metadata("general.name"), model.metadata("general.basename"), model.path.stem)
    for name in names:
        words = re.sub(r"[^a-z0-9.]+", " ", (name or "").lower())
        for pattern, prefixes in _KNOWN:
            if re.search(pattern, words):
                return prefixes
    return _NONE
