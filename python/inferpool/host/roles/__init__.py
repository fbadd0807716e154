"""The built-in roles as `Pool` and `AsyncPool` offer them, in pairs; a file for each role."""

from __future__ import annotations

from inferpool.host.roles.chat import AsyncChat, Chat, ChatOptions, Messages
from inferpool.host.roles.embed import AsyncEmbed, Embed, EmbedOptions
from inferpool.host.roles.rerank import AsyncRerank, Rerank

__all__ = [
    "AsyncChat",
    "AsyncEmbed",
    "AsyncRerank",
    "Chat",
    "ChatOptions",
    "Embed",
    "EmbedOptions",
    "Messages",
    "Rerank",
]
