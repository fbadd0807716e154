"""The built-in roles as `Pool` and `AsyncPool` offer them, in pairs; a file for each role."""

from __future__ import annotations

from inferpool.host.roles.chat import AsyncChat, Chat, ChatOptions, Messages
from inferpool.host.roles.embed import AsyncEmbed, Embed, EmbedOptions
from inferpool.host.roles.rerank import AsyncRerank, Rerank
from inferpool.host.roles.vision import AsyncVision, PdfOptions, Vision

__all__ = [
    "AsyncChat",
    "AsyncEmbed",
    "AsyncRerank",
    "AsyncVision",
    "Chat",
    "ChatOptions",
    "Embed",
    "EmbedOptions",
    "Messages",
    "PdfOptions",
    "Rerank",
    "Vision",
]
