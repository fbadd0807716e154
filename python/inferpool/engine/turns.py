"""Messages as chat templates expect them, and which of them a context has room for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from inferpool.engine.formats import Reasoning, ToolFormat
from inferpool.messages import ChatMessage, Tool, ToolCall

__all__ = ["Window", "as_text", "described", "turns"]


class Window:
    """A conversation without its oldest exchanges.

    An exchange is a user's turn and all up to the next one, so a tool call goes with its results.
    System messages stay, and so does the last exchange.
    """

    def __init__(self, messages: Sequence[ChatMessage]) -> None:
        self._messages = messages
        self._starts = [at for at, message in enumerate(messages) if message.role == "user"]

    def without(self, n_exchanges: int) -> Sequence[ChatMessage]:
        """The messages that are left when so many exchanges are dropped."""
        if n_exchanges == 0:
            return self._messages
        start = self._starts[n_exchanges]
        return [
            message
            for at, message in enumerate(self._messages)
            if at >= start or message.role == "system"
        ]

    def fewest_to_drop(self, fits: Callable[[int], bool]) -> int:
        """The fewest exchanges, at least one, without which the rest fits.

        That is all but the last if it never does; 0 if there is but one. ``fits`` is asked
        about what is returned.
        """
        least, most = 1, len(self._starts) - 1
        if most < 1:
            return 0
        while least < most:
            middle = (least + most) // 2
            if fits(middle):
                most = middle
            else:
                least = middle + 1
        fits(least)
        return least


class _Arguments(dict[str, Any]):
    """Arguments of a tool call: a map to templates that want one, JSON to those that want text."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


def turns(
    messages: Sequence[ChatMessage],
    form: ToolFormat | None = None,
    reasoning: Reasoning | None = None,
) -> list[dict[str, Any]]:
    """Messages as maps, in the shape that Hugging Face's templates expect.

    Args:
        messages: the conversation.
        form: how the template writes tool calls, if it is one that does.
        reasoning: what it wants of the model's reasoning.
    """
    if form is not None and form.one_per_turn:
        messages = _one_per_turn(messages)
    told = [_turn(message) for message in messages]
    if form is not None and form.call_id:
        _name_calls(told, form.call_id)
    if reasoning is not None and reasoning.key:
        for turn in told:
            _add_reasoning(turn, reasoning.key)
    return told


def _one_per_turn(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """A turn for each call, followed by its result."""
    apart: list[ChatMessage] = []
    for message in messages:
        if message.role == "tool":
            id = message.tool_call_id
            since = next(
                since
                for since, other in enumerate(reversed(apart))
                if any(call.id == id for call in other.tool_calls)
            )
            apart.insert(len(apart) - since, message)
        elif message.tool_calls:
            first, *rest = message.tool_calls
            apart.append(msgspec.structs.replace(message, tool_calls=[first]))
            apart += [ChatMessage("assistant", tool_calls=[call]) for call in rest]
        else:
            apart.append(message)
    return apart


def _name_calls(told: Sequence[dict[str, Any]], layout: str) -> None:
    """Give calls and their results the ids that the model knows, whoever made the calls."""
    index = 0
    ids: dict[str, str] = {}
    for turn in told:
        for call in turn.get("tool_calls", ()):
            name = call["function"]["name"]
            known = layout.replace("{name}", name).replace("{index}", str(index))
            ids[call["id"]] = call["id"] = known
            index += 1
        if "tool_call_id" in turn:
            turn["tool_call_id"] = ids[turn["tool_call_id"]]


def _add_reasoning(turn: dict[str, Any], key: str) -> None:
    """Put the reasoning where a template has its own key for it."""
    if "reasoning_content" not in turn:
        return
    thought = turn["reasoning_content"]
    if "tool_calls" in turn and turn["content"]:
        # It takes what is said before a call for reasoning, and refuses to take both.
        thought, turn["content"] = f"{thought}\n\n{turn['content']}", ""
    turn[key] = thought


def described(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as maps, in OpenAI's shape."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
    ]


def as_text(
    messages: Sequence[ChatMessage], tools: Sequence[Tool], form: ToolFormat
) -> Sequence[ChatMessage]:
    """A conversation with tools for a template that knows none: all about them becomes text.

    Args:
        messages: the conversation.
        tools: what the model may call.
        form: how it is told of them.
    """
    if not tools and not any(m.tool_calls or m.role == "tool" for m in messages):
        return messages
    plain: list[ChatMessage] = []
    for message in messages:
        if message.role == "tool":
            text = form.result.replace("{result}", message.text)
            # Results of one turn go together: some templates refuse two turns of the same role.
            if plain and plain[-1].role == "user":
                text = f"{plain.pop().text}\n{text}"
            plain.append(ChatMessage("user", text))
        else:
            pieces = [message.text] if message.text else []
            pieces += [
                form.forced.replace("{call}", _call(call, form)) for call in message.tool_calls
            ]
            plain.append(ChatMessage(message.role, "\n".join(pieces)))
    if tools:
        listed = "\n".join(
            json.dumps(tool["function"], ensure_ascii=False) for tool in described(tools)
        )
        told = form.system.replace("{tools}", listed).strip()
        if plain[0].role == "system":
            told = f"{plain.pop(0).text}\n\n{told}"
        plain.insert(0, ChatMessage("system", told))
    return plain


def _call(call: ToolCall, form: ToolFormat) -> str:
    named = {form.name: call.function.name, form.arguments: _arguments(call)}
    return json.dumps(named, ensure_ascii=False)


def _turn(message: ChatMessage) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": _arguments(call)},
            }
            for call in message.tool_calls
        ]
    for name in ("tool_call_id", "name", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            turn[name] = value
    return turn


def _arguments(call: ToolCall) -> Any:
    try:
        return _Arguments(msgspec.json.decode(call.function.arguments, type=dict[str, Any]))
    except (msgspec.DecodeError, RecursionError):
        return call.function.arguments  # as a model wrote it: the template shows it as text
