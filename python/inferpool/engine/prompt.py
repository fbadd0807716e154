"""A request to what a model reads: tokens, and how its answer is to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inferpool.engine.answer import AnswerParser
from inferpool.engine.grammar import Grammar
from inferpool.engine.model import Model
from inferpool.engine.sampler import Sampler
from inferpool.engine.schema import GrammarBuilder
from inferpool.engine.template import ChatTemplate
from inferpool.errors import ContextLengthExceeded, ModelLoadError
from inferpool.messages import ChatMessage, ChatRequest, Sampling

__all__ = ["Prompt", "PromptBuilder", "grammar_of"]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A request that a model can start with."""

    model: Model
    request: ChatRequest
    tokens: npt.NDArray[np.int32]
    """Shape (n,), n at least 1."""
    budget: int
    """Tokens of the answer at most, at least 1."""
    grammar: Grammar | None
    """What the answer must keep to."""

    @property
    def is_bulk(self) -> bool:
        """Whether others come first."""
        return self.request.priority == "bulk"

    @property
    def may_reuse(self) -> bool:
        """Whether its beginning may be taken from memory instead of being computed again."""
        request = self.request
        # Tokens come out rounded differently in other chunks, which a seed should not let show.
        return request.seed is None if request.cache_prompt is None else request.cache_prompt

    def sampler(self) -> Sampler:
        """What draws the tokens of one answer; the caller closes it."""
        return Sampler(self.request, self.model, self.grammar)

    def parser(self) -> AnswerParser:
        """What reads the tokens of one answer."""
        return AnswerParser(self.request)

    def piece(self, token: int) -> bytes:
        """The bytes of ``token`` as the parser wants them."""
        return self.model.piece(token)


class PromptBuilder:
    """Makes prompts for one model and its context.

    Attributes:
        n_ctx: tokens of prompt and answer together at most.
    """

    def __init__(self, model: Model, *, n_ctx: int, chat_template: str | None = None) -> None:
        """Compile the chat template.

        Args:
            model: the weights and vocabulary.
            n_ctx: tokens of prompt and answer together at most.
            chat_template: jinja text to use in place of the model's own.

        Raises:
            ModelLoadError: if there is no usable chat template.
        """
        source = chat_template or model.chat_template
        if source is None:
            raise ModelLoadError(
                f"{model.path.name} has no chat template. hint: pass chat_template="
            )
        self.n_ctx = n_ctx
        self._model = model
        self._template = ChatTemplate(source, bos=model.bos, eos=model.eos)

    def build(self, request: ChatRequest) -> Prompt:
        """Render and tokenise ``request``.

        Raises:
            ContextLengthExceeded: if the prompt leaves no room for an answer.
            ValueError: if the chat template refuses the messages.
            ModelError: if the chat template fails.
        """
        tokens = self._model.tokenize_prompt(self._template.render(_turns(request.messages)))
        if not tokens.size:
            raise ValueError("the chat template makes an empty prompt of these messages")
        if len(tokens) + 1 > self.n_ctx:
            raise ContextLengthExceeded(
                f"the prompt has {len(tokens)} tokens and the answer needs at least 1, "
                f"the context holds {self.n_ctx}",
                asked=len(tokens),
                context=self.n_ctx,
                response_budget=1,
            )
        budget = self.n_ctx - len(tokens)
        if request.max_tokens is not None:
            budget = min(budget, request.max_tokens)
        return Prompt(self._model, request, tokens, budget, grammar_of(request))


def _turns(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def grammar_of(request: Sampling) -> Grammar | None:
    """What the answer must keep to by ``grammar`` or ``response_format``."""
    if request.grammar is not None:
        return Grammar(request.grammar)
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    builder = GrammarBuilder()
    schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema
    return Grammar(builder.gbnf(builder.schema(schema, "json_schema")))
