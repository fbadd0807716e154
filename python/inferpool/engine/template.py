"""Messages to a prompt, through the jinja template that comes with a model.

The template is part of an untrusted file: it runs in jinja's immutable sandbox. What it
may use is what Hugging Face's ``apply_chat_template`` gives it, since templates are
written for that.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from inferpool.errors import ModelError, ModelLoadError
from inferpool.messages import ChatMessage

__all__ = ["ChatTemplate"]


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the jinja text.
        bos: text of the model's BOS token, which the template may write.
        eos: text of the model's EOS token.

    Raises:
        ModelLoadError: if ``source`` is no jinja template.
    """

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationTag],
        )
        # jinja's own escapes for HTML, which a prompt is not.
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            bos_token=bos, eos_token=eos, raise_exception=_refuse, strftime_now=_strftime_now
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"the chat template is broken: {error}") from error

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt that asks for the turn after ``messages``.

        Raises:
            ValueError: if the template refuses the messages (two user turns in a row, say).
            ModelError: if the template fails.
        """
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True)
        except _Refused as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        # Anything can go wrong in a template's expressions, and all of it is the template.
        except Exception as error:
            raise ModelError(f"the chat template failed: {error!r}") from error


class _Refused(Exception):
    """What ``raise_exception`` in a template raises."""


def _refuse(message: str) -> None:
    raise _Refused(message)


def _strftime_now(layout: str) -> str:
    return dt.datetime.now().astimezone().strftime(layout)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``: marks the assistant's text for training; its body renders as is."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
