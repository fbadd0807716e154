"""A request to what a model reads: tokens, and how its answer is to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from inferpool.engine.calls import forced_call
from inferpool.engine.formats import Reasoning, ToolFormat, reasoning_of, tool_format_of
from inferpool.engine.grammar import Grammar
from inferpool.engine.model import Model
from inferpool.engine.rules import GrammarBuilder, literal
from inferpool.engine.schema import add_schema
from inferpool.engine.template import ChatTemplate
from inferpool.engine.turns import Window, as_text, described, turns
from inferpool.errors import ContextLengthExceeded, InvalidRequest
from inferpool.messages import ChatMessage, ChatRequest, NamedTool, Sampling, Tool

__all__ = ["Prompt", "PromptBuilder", "begin_answer", "grammar_of", "visible_tokens"]

# No rule of a caller's grammar has this name.
_ROOT = "inferpool-answer"
# Without max_tokens, windowing leaves this part of the context to the answer.
_ANSWER_SHARE = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Prompt:
    """A request that a model can start with."""

    model: Model
    request: Sampling
    tokens: npt.NDArray[np.int32]
    """Of text, shape (n,), n at least 1."""
    n_images: int = 0
    """Tokens of images, beside those."""
    budget: int
    """Tokens of the answer at most, at least 1."""
    grammar: Grammar | None = None
    """What the answer must keep to."""
    reasoning: Reasoning | None = None
    thinking: bool = False
    calls: ToolFormat | None = None
    tools: Sequence[Tool] = ()
    dropped_messages: int = 0
    visible: frozenset[int] = frozenset()
    """Control tokens whose text the parser looks for."""
    is_bulk: bool = False
    """Whether others come first."""
    may_reuse: bool = False
    """Whether its beginning may be taken from memory instead of being computed again."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the context that it takes."""
        return len(self.tokens) + self.n_images


@dataclass(frozen=True, eq=False)
class _Style:
    """A chat template, and what it says of how its model writes."""

    template: ChatTemplate
    format: ToolFormat
    reasoning: Reasoning | None

    @classmethod
    def of(cls, source: str, model: Model) -> _Style:
        template = ChatTemplate(source, bos=model.bos, eos=model.eos)
        form = tool_format_of(source, takes_tools=template.takes_tools)
        return cls(template, form, reasoning_of(source))

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        others: Mapping[str, Any],
    ) -> str:
        if self.format.system:
            messages, tools = as_text(messages, tools, self.format), []
        told = turns(messages, self.format, self.reasoning)
        return self.template.render(told, described(tools) or None, others)


class PromptBuilder:
    """Makes prompts for one model and its context.

    Attributes:
        n_ctx: tokens of prompt and answer together at most.
    """

    def __init__(self, model: Model, *, n_ctx: int, chat_template: str | None = None) -> None:
        """Compile the chat template, if there is one, and that for tools.

        Args:
            model: the weights and vocabulary.
            n_ctx: tokens of prompt and answer together at most.
            chat_template: jinja text to use in place of the model's own.

        Raises:
            ModelLoadError: if a chat template is broken.
        """
        self.n_ctx = n_ctx
        self._model = model
        self._plain: _Style | None = None
        source = chat_template or model.chat_template
        if source is not None:
            self._plain = self._with_tools = _Style.of(source, model)
            if not chat_template and (source := model.tool_template) is not None:
                self._with_tools = _Style.of(source, model)

    def build(self, request: ChatRequest) -> Prompt:
        """Render and tokenise ``request``.

        Raises:
            ContextLengthExceeded: if what has to stay of the prompt leaves no room for an answer;
                with the numbers. Of a text that is far too long, ``asked`` is what it has at least.
            InvalidRequest: if the chat template refuses the messages, makes nothing of them, or
                is missing, if a prompt gives no token, or if a schema can't be kept to.
            ModelError: if the chat template fails.
        """
        if request.messages is None:
            text = request.prompt or ""
            self._check_room(request, self._at_least(text), 0)
            tokens = self._model.tokenize(text, add_special=True, parse_special=True)
            if not tokens.size:
                raise InvalidRequest("the prompt gives no token, so nothing can follow it")
            self._check_room(request, len(tokens), 0)
            return Prompt(
                model=self._model,
                request=request,
                tokens=tokens,
                budget=self._budget(request, tokens),
                grammar=grammar_of(request),
                is_bulk=request.priority == "bulk",
                may_reuse=_may_reuse(request),
            )
        if self._plain is None:
            raise InvalidRequest(
                f"{self._model.path.name} has no chat template, so it can only complete a prompt. "
                "hint: pass chat_template="
            )
        return self._build_chat(request, request.messages, self._plain)

    def _build_chat(
        self, request: ChatRequest, messages: Sequence[ChatMessage], plain: _Style
    ) -> Prompt:
        tools = [] if request.tool_choice == "none" else request.tools
        style = self._with_tools if tools else plain
        window = Window(messages)
        keep_free = request.max_tokens or self.n_ctx // _ANSWER_SHARE
        rendered: dict[int, str] = {}
        tokenized: dict[int, npt.NDArray[np.int32]] = {}

        def fits(n_exchanges: int) -> bool:
            text = style.render(window.without(n_exchanges), tools, request.chat_template_kwargs)
            rendered[n_exchanges] = text
            if self._at_least(text) > self.n_ctx:
                return False
            tokenized[n_exchanges] = self._model.tokenize_prompt(text)
            return len(tokenized[n_exchanges]) + keep_free <= self.n_ctx

        dropped = 0
        if not fits(0) and request.truncation == "auto":
            dropped = window.fewest_to_drop(fits)
        text = rendered[dropped]
        if dropped not in tokenized:
            self._check_room(request, self._at_least(text), 0)
        tokens = tokenized[dropped]
        if not tokens.size:
            raise InvalidRequest("the chat template makes an empty prompt of these messages")
        if self._needed(request) + len(tokens) > self.n_ctx:
            kept = window.without(dropped)
            without = plain.render(kept, [], request.chat_template_kwargs) if tools else text
            asked = len(self._model.tokenize_prompt(without)) if tools else len(tokens)
            self._check_room(request, asked, len(tokens) - asked)
        reasoning = style.reasoning
        forced = _call_grammar(request, style.format)
        thinking, grammar = begin_answer(
            text,
            reasoning,
            forced or grammar_of(request),
            # Calls in a form that is not the model's own are text to it.
            is_call=forced is not None and not style.format.system,
        )
        # What the caller wants the answer to look like is text, even where it looks like a call.
        calls = style.format if tools and (forced or not grammar) else None
        return Prompt(
            model=self._model,
            request=request,
            tokens=tokens,
            budget=self._budget(request, tokens),
            grammar=grammar,
            reasoning=reasoning,
            thinking=thinking,
            calls=calls,
            tools=tools,
            dropped_messages=len(messages) - len(window.without(dropped)),
            visible=visible_tokens(self._model, reasoning, calls),
            is_bulk=request.priority == "bulk",
            may_reuse=_may_reuse(request),
        )

    def _at_least(self, text: str) -> int:
        """How many tokens a text has at least; 0 unless it is long for the context.

        Tokenising a megabyte takes seconds, in which no other answer gets a token.
        """
        n_bytes = len(text.encode())
        return n_bytes // self._model.longest_piece if n_bytes > 16 * self.n_ctx else 0

    def _needed(self, request: ChatRequest) -> int:
        return request.max_tokens or 1

    def _budget(self, request: ChatRequest, tokens: npt.NDArray[np.int32]) -> int:
        return request.max_tokens or self.n_ctx - len(tokens)

    def _check_room(self, request: ChatRequest, asked: int, tools: int) -> None:
        response_budget = self._needed(request)
        margin = self.n_ctx - asked - tools - response_budget
        if margin < 0:
            raise ContextLengthExceeded(
                f"the context holds {self.n_ctx} tokens; {asked} of messages, {tools} of tools "
                f"and {response_budget} for the answer are {-margin} too many",
                asked=asked,
                tools=tools,
                response_budget=response_budget,
                context=self.n_ctx,
                margin=margin,
            )


def begin_answer(
    text: str, reasoning: Reasoning | None, grammar: Grammar | None, *, is_call: bool = False
) -> tuple[bool, Grammar | None]:
    """Whether the prompt ``text`` opens the reasoning, and the grammar, which then waits for it.

    Where messages have headers the grammar gets that of the answer, unless it ``is_call``, which
    has its own, and leaves room for reasoning before it.
    """
    thinking = reasoning is not None and text.rstrip().endswith(reasoning.begin)
    if reasoning is None or grammar is None:
        return thinking, grammar
    if reasoning.header is not None:
        header = "" if is_call else reasoning.header.answer
        grammar = _among_messages(grammar, reasoning, header)
    return thinking, replace(grammar, after=reasoning.end) if thinking else grammar


def _among_messages(grammar: Grammar, reasoning: Reasoning, header: str) -> Grammar:
    begin, end = literal(reasoning.begin), literal(reasoning.end)
    rules = (
        f"{_ROOT} ::= ({begin} {_ROOT}-thought {end})* {literal(header)} {grammar.root}",
        # No marker within: they all begin alike.
        rf'{_ROOT}-thought ::= ([^<] | "<"+ [^<|])*',
    )
    return Grammar("\n".join([grammar.gbnf, *rules]), root=_ROOT)


def visible_tokens(
    model: Model, reasoning: Reasoning | None, calls: ToolFormat | None = None
) -> frozenset[int]:
    """Control tokens that mark reasoning and calls."""
    marks = [] if reasoning is None else reasoning.markers
    marks += [] if calls is None else calls.markers
    return frozenset(
        token
        for mark in marks
        for token in model.tokenize(mark, add_special=False, parse_special=True).tolist()
        if not model.piece(token)
    )


def _may_reuse(request: ChatRequest) -> bool:
    # Tokens come out rounded differently in other chunks, which a seed should not let show.
    return request.seed is None if request.cache_prompt is None else request.cache_prompt


def _call_grammar(request: ChatRequest, form: ToolFormat) -> Grammar | None:
    """What the answer must keep to by ``tool_choice``."""
    choice = request.tool_choice
    if isinstance(choice, NamedTool):
        named = [tool for tool in request.tools if tool.function.name == choice.function.name]
        return Grammar(forced_call(form, named))
    return Grammar(forced_call(form, request.tools)) if choice == "required" else None


def grammar_of(request: Sampling) -> Grammar | None:
    """What the answer must keep to by ``grammar`` or ``response_format``."""
    if request.grammar is not None:
        return Grammar(request.grammar)
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    builder = GrammarBuilder()
    schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema
    return Grammar(builder.gbnf(add_schema(builder, schema, "json_schema")))
