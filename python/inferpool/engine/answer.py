"""What a model says, piece by piece, to what a caller reads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from inferpool.engine.calls import CallReader
from inferpool.engine.formats import Header, Reasoning, ToolFormat
from inferpool.engine.prompt import Prompt
from inferpool.engine.sampler import Sampler
from inferpool.engine.text import TextStream, overlap
from inferpool.messages import (
    ChatDelta,
    ChatResult,
    FinishReason,
    FunctionCall,
    Logprobs,
    Timings,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
)

__all__ = ["Answer", "AnswerParser", "collect"]


class AnswerParser:
    """Turns the bytes of one answer's tokens into deltas.

    It knows nothing of how tokens are made or batched: push each token's bytes until `stopped`,
    then finish. White space beside a marker belongs to it and is not shown.
    """

    def __init__(
        self,
        *,
        stop: Sequence[str] = (),
        reasoning: Reasoning | None = None,
        thinking: bool = False,
        calls: ToolFormat | None = None,
        tools: Sequence[Tool] = (),
        dropped_messages: int = 0,
    ) -> None:
        """Start an answer.

        Args:
            stop: texts that end it.
            reasoning: what encloses the model's reasoning, if it reasons.
            thinking: whether the prompt has opened the reasoning already.
            calls: how the model writes tool calls, if it may make any.
            tools: what it may call.
            dropped_messages: told with the last delta.
        """
        self._stream = TextStream(stop)
        self._reasoning = reasoning
        self._calls = calls
        self._tools = tools
        self._dropped = dropped_messages
        self._thinking = thinking
        self._header = None if reasoning is None else reasoning.header
        self._in_header = self._header is not None and not thinking
        self._calls_have_headers = (
            self._header is not None
            and calls is not None
            and calls.begin.startswith(self._header.recipient)
        )
        self._spoken: set[str] = set()  # where messages with headers went
        self._reader: CallReader | None = None
        self._opening = ""  # what was cut off before what it reads
        self._n_calls = 0
        self._held = ""
        # Nothing but white space was said yet; headers tell all that depends on it.
        self._at_start = self._header is None
        self._skips_space = thinking or self._in_header
        self._said = {"text": "", "reasoning": ""}
        self._told: list[ToolCallDelta] = []

    @property
    def stopped(self) -> bool:
        """Whether the answer has ended by what it says: a stop string was found."""
        return self._stream.stopped

    def push(self, data: bytes, logprob: TokenLogprob | None = None) -> ChatDelta | None:
        """Add the bytes of a token, and how likely it was if that was asked for.

        Returns:
            What is certain now, or None if nothing is.
        """
        self._sort(self._stream.push(data))
        if logprob is not None:
            return self._delta(logprobs=Logprobs(content=[logprob]))
        return self._delta() if self._told or any(self._said.values()) else None

    def finish(self, reason: FinishReason) -> ChatDelta:
        """The last delta, with what was held back; usage and timings are the caller's to add.

        Args:
            reason: why no more tokens come.
        """
        self._sort(self._stream.finish())
        if self._reader is not None and not self._reader.found:
            self._held, self._reader = self._opening + self._reader.raw, None
        if self._in_header and self._header is not None and self._header.begins(self._held):
            self._held = ""  # half a header says nothing
        # A stop string can cut a call off, as `max_tokens` can.
        is_cut = self.stopped and self._reader is not None and not self._reader.complete
        if self._reader is None:
            self._said["reasoning" if self._thinking else "text"] += self._held.rstrip()
        elif reason == "stop" and not is_cut:
            self._reader.finish()
            self._told += self._reader.deltas
        if reason == "stop" and self._n_calls and not is_cut:
            reason = "tool_calls"
        return self._delta(finish_reason=reason, dropped_messages=self._dropped)

    def _delta(
        self,
        *,
        logprobs: Logprobs | None = None,
        finish_reason: FinishReason | None = None,
        dropped_messages: int = 0,
    ) -> ChatDelta:
        delta = ChatDelta(
            text=self._said["text"],
            reasoning=self._said["reasoning"],
            tool_calls=self._told,
            logprobs=logprobs,
            finish_reason=finish_reason,
            dropped_messages=dropped_messages,
        )
        self._said = {"text": "", "reasoning": ""}
        self._told = []
        return delta

    def _sort(self, text: str) -> None:
        """Put what is certain of a text where it belongs, and hold the rest back."""
        if self._reasoning is None and self._calls is None:
            self._said["text"] += text
            return
        self._held += text
        more = True
        while more:
            if self._skips_space:
                self._held = self._held.lstrip()
                self._skips_space = not self._held
            if self._reasoning is not None and self._header is not None and self._in_header:
                more = self._read_header(self._reasoning, self._header)
            elif self._reader is not None:
                more = self._read_calls(self._reader)
            elif self._thinking and self._reasoning is not None:
                more = self._read_reasoning(self._reasoning)
            else:
                more = self._read_text()

    # Each returns whether there may be more to sort in what is held.

    def _read_header(self, reasoning: Reasoning, header: Header) -> bool:
        if not header.may_begin(self._held):
            self._in_header = False  # as of a model that knows none
            return True
        text, mark, rest = self._held.partition(header.end)
        if not mark:
            return False
        self._held, self._in_header, self._skips_space = rest, False, True
        recipient = header.recipient_of(text)
        if self._calls is not None and recipient.startswith(self._calls.begin):
            self._reader = CallReader(self._calls, self._tools, self._n_calls)
            name = recipient.removeprefix(self._calls.begin)
            self._held = f"{name}{self._calls.name_end}{rest}"
            return True
        # What is meant for a tool that nobody has is not for the caller either.
        self._thinking = bool(recipient) or reasoning.begin.removesuffix(header.end) in text
        where = "reasoning" if self._thinking else "text"
        if where in self._spoken:
            self._said[where] += "\n\n"
        self._spoken.add(where)
        return True

    def _read_calls(self, reader: CallReader) -> bool:
        rest = reader.feed(self._held)
        self._held = ""
        self._told += reader.deltas
        reader.deltas = []
        self._n_calls = reader.n_calls
        if rest is None:
            return False
        self._reader = None
        if reader.found:
            self._held, self._skips_space = rest, True
            return True
        # It only looked like a call, and what follows may be one.
        read = self._opening + reader.raw
        text = read.removesuffix(rest).rstrip()
        self._said["text"] += text
        self._held, self._at_start = read[len(text) :], False
        return True

    def _read_reasoning(self, reasoning: Reasoning) -> bool:
        found = self._find(reasoning.ends)
        if found is None:
            self._release("reasoning", reasoning.ends)
            return False
        self._end_message("reasoning", *found)
        return True

    def _end_message(self, where: str, at: int, mark: str) -> None:
        self._said[where] += self._held[:at].rstrip()
        self._held, self._thinking, self._skips_space = self._held[at + len(mark) :], False, True
        self._in_header = self._header is not None

    def _read_text(self) -> bool:
        marks = self._marks_of_text()
        found = self._find(marks)
        if found is None:
            self._release("text", marks)
            return False
        at, mark = found
        if self._header is not None and mark in self._header.message_ends:
            self._end_message("text", at, mark)
            return True
        is_call = self._calls is not None and mark == self._calls.begin
        if not is_call and self._held[:at].strip():
            # Only what comes first opens reasoning, or a call without a marker.
            self._said["text"] += self._held[:at]
            self._held = self._held[at:]
            self._at_start = False
            return True
        before = self._held[:at].rstrip()
        self._said["text"] += before
        self._opening = self._held[len(before) : at + len(mark)]
        self._held = self._held[at + len(mark) :]
        self._at_start = self._at_start and not is_call
        if self._reasoning is not None and mark == self._reasoning.begin:
            self._thinking = self._skips_space = True
        elif self._calls is not None:
            is_bare = mark == "{"
            self._reader = CallReader(self._calls, self._tools, self._n_calls, bare=is_bare)
            if is_bare:
                self._opening, self._held = self._opening[:-1], mark + self._held
        return True

    def _marks_of_text(self) -> list[str]:
        """What may end a text."""
        marks = [] if self._header is None else [*self._header.message_ends]
        if self._reasoning is not None and self._at_start:
            marks.append(self._reasoning.begin)
        if self._calls is not None and not self._calls_have_headers:
            marks.append(self._calls.begin)
            if self._calls.bare and self._at_start:
                marks.append("{")
        return marks

    def _find(self, marks: Sequence[str]) -> tuple[int, str] | None:
        """The first of some marks in what is held, and where it is."""
        found = [(at, mark) for mark in marks if (at := self._held.find(mark)) >= 0]
        return min(found, default=None)

    def _release(self, where: str, marks: Sequence[str]) -> None:
        """Let go of all that can't become a mark, or be white space before one."""
        n_held = max((overlap(self._held, mark) for mark in marks), default=0)
        certain = self._held[: len(self._held) - n_held]
        certain = certain.rstrip() if marks else certain
        self._said[where] += certain
        self._held = self._held[len(certain) :]
        if where == "text" and certain.strip():
            self._at_start = False


class Answer:
    """An answer that is being made: what was drawn, and what its caller is to be told.

    Attributes:
        prompt: what it answers.
        sampler: draws its tokens; the caller's to close.
        tokens: ids of what was drawn, without the token that ended it.
        untold: pieces that nobody has taken yet.
    """

    def __init__(self, prompt: Prompt, since: float) -> None:
        """Begin to answer a call that came at ``since``, as `time.perf_counter` has it.

        Raises:
            InvalidRequest: if an option of the request does not fit the model.
        """
        self.prompt = prompt
        self.sampler = Sampler(prompt.request, prompt.model, prompt.grammar)
        self._parser = AnswerParser(
            stop=prompt.request.stop,
            reasoning=prompt.reasoning,
            thinking=prompt.thinking,
            calls=prompt.calls,
            tools=prompt.tools,
            dropped_messages=prompt.dropped_messages,
        )
        self.tokens: list[int] = []
        self.untold: deque[ChatDelta] = deque()
        self._started = self._first = self._last = since

    def add(self, token: int) -> bool:
        """Take the token that the sampler drew; whether the answer goes on."""
        self._last = time.perf_counter()
        if not self.tokens:
            self._first = self._last
        if self.prompt.model.is_eog(token):
            return self._finish("stop")
        self.tokens.append(token)
        piece = self.prompt.model.piece(token, special=token in self.prompt.visible)
        delta = self._parser.push(piece, self.sampler.logprob)
        if delta is not None:
            self.untold.append(delta)
        if self._parser.stopped:
            return self._finish("stop")
        if len(self.tokens) == self.prompt.budget:
            return self._finish("length")
        return True

    def _finish(self, reason: FinishReason) -> bool:
        n_prompt, n_completion = self.prompt.n_tokens, len(self.tokens)
        last = msgspec.structs.replace(
            self._parser.finish(reason),
            usage=Usage(
                prompt_tokens=n_prompt,
                completion_tokens=n_completion,
                total_tokens=n_prompt + n_completion,
            ),
            timings=Timings(
                prompt_seconds=self._first - self._started,
                completion_seconds=self._last - self._first,
            ),
        )
        self.untold.append(last)
        return False


def collect(deltas: Iterable[ChatDelta]) -> ChatResult:
    """The whole answer that ``deltas`` make, the last of which must say how it ended."""
    text, reasoning = [], []
    logprobs: list[TokenLogprob] = []
    calls: list[ToolCall] = []
    last = None
    for last in deltas:
        text.append(last.text)
        reasoning.append(last.reasoning)
        if last.logprobs is not None:
            logprobs += last.logprobs.content
        for piece in last.tool_calls:
            _add(calls, piece)
    if last is None or last.finish_reason is None or last.usage is None or last.timings is None:
        raise AssertionError("the last delta says how the answer ended")
    return ChatResult(
        text="".join(text),
        reasoning="".join(reasoning),
        tool_calls=calls,
        finish_reason=last.finish_reason,
        usage=last.usage,
        timings=last.timings,
        logprobs=Logprobs(content=logprobs) if logprobs else None,
        dropped_messages=last.dropped_messages,
    )


def _add(calls: list[ToolCall], piece: ToolCallDelta) -> None:
    if piece.id is not None:
        call = FunctionCall(name=piece.function.name or "", arguments=piece.function.arguments)
        calls.append(ToolCall(id=piece.id, function=call))
        return
    function = calls[piece.index].function
    function = msgspec.structs.replace(
        function, arguments=function.arguments + piece.function.arguments
    )
    calls[piece.index] = msgspec.structs.replace(calls[piece.index], function=function)
