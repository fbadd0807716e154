"""Chat: a model, its prompts, and a scheduler for the answers."""

from __future__ import annotations

from contextlib import ExitStack, closing

from inferpool.config import MAX_CONTEXT_LENGTH
from inferpool.engine.abort import AbortToken
from inferpool.engine.context import Context, context_length
from inferpool.engine.model import Model
from inferpool.engine.prompt import PromptBuilder
from inferpool.engine.scheduler import Caller, Scheduler
from inferpool.errors import ModelLoadError
from inferpool.messages import ChatRequest

__all__ = ["ChatEngine"]


class ChatEngine:
    """Answers chat requests with one model, several at once.

    The beginning of a prompt that an earlier one had in common with it is not computed again.

    Attributes:
        n_ctx: tokens of prompt and answer together at most, in each conversation.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int | None = None,
        n_batch: int = 512,
        n_parallel: int = 1,
        n_threads: int | None = None,
        flash_attn: bool = True,
        chat_template: str | None = None,
        abort: AbortToken | None = None,
    ) -> None:
        """Prepare ``model``, which stays the caller's to close.

        Args:
            model: a generative model.
            n_ctx: context length in tokens; 0 takes the length the model was trained with, None
                does so up to `context.DEFAULT_CONTEXT_LENGTH`.
            n_batch: tokens of prompts decoded together at most.
            n_parallel: conversations under way at once.
            n_threads: None takes the CPUs this process may run on.
            flash_attn: whether to use flash attention.
            chat_template: jinja text to use in place of the model's own.
            abort: ends a step early when the worker shuts down.

        Raises:
            ModelLoadError: if there is no usable chat template, the model generates no text
                from a prompt alone, or memory is short.
        """
        # llama.cpp rounds the context up; what was asked for is what holds.
        self.n_ctx = context_length(n_ctx, model.n_ctx_train)
        if self.n_ctx * n_parallel > MAX_CONTEXT_LENGTH:
            raise ModelLoadError(
                f"{n_parallel} conversations of {self.n_ctx} tokens each are too many. "
                "hint: pass n_ctx= or n_parallel="
            )
        self._prompts = PromptBuilder(model, n_ctx=self.n_ctx, chat_template=chat_template)
        with ExitStack() as resources:
            context = Context(
                model,
                n_ctx=self.n_ctx * n_parallel,
                # A step decodes a token of each conversation.
                n_batch=max(min(n_batch, self.n_ctx), n_parallel),
                n_seq_max=n_parallel,
                # Each conversation has its own length to itself, and attention keeps to it.
                kv_unified=False,
                n_threads=n_threads,
                flash_attn=flash_attn,
            )
            resources.enter_context(closing(context))
            self._scheduler = Scheduler(context, abort=abort)
            resources.enter_context(closing(self._scheduler))
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Free the context. Closing twice is harmless."""
        self._resources.close()

    def submit(self, request: ChatRequest, caller: Caller) -> None:
        """Ask for an answer; ``caller`` gets it piece by piece while steps are made.

        Raises:
            ContextLengthExceeded: if the prompt leaves no room for an answer.
            ValueError: if the chat template refuses the messages.
            ModelError: if the chat template fails.
        """
        self._scheduler.submit(self._prompts.build(request), caller)

    def step(self) -> float | None:
        """Do a piece of work, and say in how many seconds the next should follow.

        0 while there is work; None if there is none.
        """
        return self._scheduler.step()
