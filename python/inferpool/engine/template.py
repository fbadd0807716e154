"""Messages to a prompt, through the jinja template that comes with a model.

What a template may use is what Hugging Face's ``apply_chat_template`` gives it, since templates
are written for that.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from inferpool.engine.jinja import BoundedEnvironment, TemplateTooExpensive
from inferpool.errors import InvalidRequest, ModelError, ModelLoadError

__all__ = ["ChatTemplate"]

_PROBE = "probe"
"""A message, to see whether a template writes it."""


class ChatTemplate:
    """A compiled chat template.

    Attributes:
        source: the jinja text.
        takes_tools: whether it says anything about tools.
    """

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        """Compile a template.

        Args:
            source: the jinja text.
            bos: text of the model's BOS token, which the template may write.
            eos: text of the model's EOS token.

        Raises:
            ModelLoadError: if ``source`` is not a jinja template, or uses what is not there.
        """
        self._environment = BoundedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationTag],
        )
        self._environment.globals.update(
            bos_token=bos, eos_token=eos, raise_exception=_refuse, strftime_now=_strftime_now
        )
        self.source = source
        try:
            tree = self._environment.parse_bounded(source)
            self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(tree)
            self._template = self._environment.bounded_template(tree)
        # The compilers of jinja and Python each have their own ways to fail.
        except Exception as error:
            raise ModelLoadError(f"the chat template is broken: {error}") from error
        self._takes_only_parts = False
        # One that reads parts has to name the key of their text.
        if "text" in source and not self._shows([{"role": "user", "content": _PROBE}]):
            self._takes_only_parts = True
            self._takes_only_parts = self._shows([{"role": "user", "content": _PROBE}])

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether it writes a system message, which some templates refuse and others drop.

        One that does not write a user's turn either, since it wants tools, is taken to.
        """
        if not self._shows([{"role": "user", "content": _PROBE}]):
            return True
        return self._shows(
            [{"role": "system", "content": _PROBE}, {"role": "user", "content": "Hi"}]
        )

    def _shows(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        try:
            return _PROBE in self._render(messages, None, {})
        except (InvalidRequest, ModelError):
            return False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        others: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that asks for the turn after ``messages``.

        What a system message says, the user's next turn does where the template takes none.

        Args:
            messages: the turns, as Hugging Face's templates expect them; the content is text.
            tools: what the model may call, as OpenAI describes tools.
            others: values of variables that this template knows besides these two.

        Raises:
            InvalidRequest: if the template refuses the messages (two user turns in a row, say).
            ModelError: if the template fails, or does not end.
        """
        if any(message["role"] == "system" for message in messages) and not self.takes_system:
            messages = _without_system(messages)
        return self._render(messages, tools, others or {})

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        others: Mapping[str, Any],
    ) -> str:
        if self._takes_only_parts:
            messages = [_in_parts(message) for message in messages]
        # About what it has to write; how much of that the template makes is bounded by it.
        given = {**others, "messages": messages, "tools": tools, "add_generation_prompt": True}
        self._environment.allow(len(str(given)))
        try:
            return self._template.render(given)
        except _Refused as error:
            raise InvalidRequest(f"the chat template refuses the messages: {error}") from error
        except TemplateTooExpensive as error:
            raise ModelError(f"the chat template was stopped: {error}") from error
        # Anything can go wrong in a template's expressions, and all of it is the template.
        except Exception as error:
            raise ModelError(f"the chat template failed: {error!r}") from error


def _in_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _without_system(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    told: list[str] = []
    others: list[Mapping[str, Any]] = []
    for message in messages:
        if message["role"] == "system":
            told.append(message["content"])
        elif message["role"] == "user" and told:
            others.append({**message, "content": "\n\n".join([*told, message["content"]])})
            told = []
        else:
            others.append(message)
    if told:
        others.append({"role": "user", "content": "\n\n".join(told)})
    return others


class _Refused(Exception):
    """What ``raise_exception`` in a template raises."""


def _refuse(message: str) -> None:
    raise _Refused(message)


def _strftime_now(layout: str) -> str:
    if len(layout) > 256:
        raise ValueError("strftime_now: the layout is too long")
    return dt.datetime.now().astimezone().strftime(layout)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``: marks the assistant's text for training; its body renders as is."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
