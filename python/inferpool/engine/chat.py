"""Messages to streamed text: one conversation at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import msgspec
import numpy as np
import numpy.typing as npt

from inferpool.engine.abort import AbortToken
from inferpool.engine.context import Batch, Context
from inferpool.engine.model import Model
from inferpool.engine.prompt import Prompt, PromptBuilder
from inferpool.engine.sampler import Sampler
from inferpool.errors import InferpoolError, ModelLoadError
from inferpool.messages import ChatDelta, ChatRequest, FinishReason, Timings, Usage

__all__ = ["ChatEngine"]

_NO_TOKENS = np.empty(0, np.int32)


class ChatEngine:
    """Answers chat requests with one model, each to its end before the next.

    The beginning of a prompt that the last call had in common is not computed again, in
    whole chunks of ``n_batch`` tokens. Smaller pieces are, because llama.cpp rounds a token
    differently alone than in a chunk: so an answer never depends on the call before.

    Attributes:
        n_ctx: tokens of prompt and answer together at most.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int = 0,
        n_batch: int = 512,
        n_threads: int | None = None,
        flash_attn: bool = True,
        chat_template: str | None = None,
    ) -> None:
        """Prepare ``model``, which stays the caller's to close.

        Args:
            model: a generative model.
            n_ctx: context length in tokens; 0 takes the length the model was trained with.
            n_batch: tokens of a prompt decoded together at most.
            n_threads: None takes the CPUs this process may run on.
            flash_attn: whether to use flash attention.
            chat_template: jinja text to use in place of the model's own.

        Raises:
            ModelLoadError: if there is no usable chat template, the model generates no text
                from a prompt alone, or memory is short.
        """
        self._model = model
        # llama.cpp rounds the context up; what was asked for is what holds.
        self.n_ctx = n_ctx or model.n_ctx_train
        self._prompts = PromptBuilder(model, n_ctx=self.n_ctx, chat_template=chat_template)
        self._context = Context(
            model,
            n_ctx=self.n_ctx,
            n_batch=min(n_batch, self.n_ctx),
            n_threads=n_threads,
            flash_attn=flash_attn,
        )
        if model.has_encoder or not self._context.has_memory:
            self._context.close()
            raise ModelLoadError(f"{model.path.name} does not continue a text: not a chat model")
        self._batch = Batch(self._context.n_batch)
        self._chunked = _NO_TOKENS  # the tokens in memory that were decoded in whole chunks

    def close(self) -> None:
        """Free the context. Closing twice is harmless."""
        self._context.close()

    def stream(
        self, request: ChatRequest, *, abort: AbortToken | None = None
    ) -> Iterator[ChatDelta]:
        """Answer ``request`` piece by piece; the last piece says why it ended.

        Raises:
            ContextLengthExceeded: if the prompt leaves no room for an answer.
            ValueError: if the chat template refuses the messages.
            CallCancelled: if ``abort`` was set.
            ModelError: if llama.cpp or the chat template fails.
        """
        started = time.perf_counter()
        return self._answer(self._prompts.build(request), abort, started)

    def _answer(
        self, prompt: Prompt, abort: AbortToken | None, started: float
    ) -> Iterator[ChatDelta]:
        parser = prompt.parser()
        n_completion = 0
        reason: FinishReason = "stop"
        first = last = started
        with closing(prompt.sampler()) as sampler:
            for token in self._generate(prompt, sampler, abort):
                last = time.perf_counter()
                first = first if n_completion else last
                if self._model.is_eog(token):
                    break
                n_completion += 1
                delta = parser.push(prompt.piece(token), sampler.logprob)
                if delta is not None:
                    yield delta
                if parser.stopped:
                    break
                if n_completion == prompt.budget:
                    reason = "length"
                    break
        yield msgspec.structs.replace(
            parser.finish(reason),
            usage=Usage(
                prompt_tokens=len(prompt.tokens),
                completion_tokens=n_completion,
                total_tokens=len(prompt.tokens) + n_completion,
            ),
            timings=Timings(prompt_seconds=first - started, completion_seconds=last - first),
        )

    def _generate(
        self, prompt: Prompt, sampler: Sampler, abort: AbortToken | None
    ) -> Iterator[int]:
        """Token after token of the answer, without end; the last result is always unread."""
        with self._context.interruptible(abort):
            try:
                self._prefill(prompt.tokens)
                sampler.accept_prompt(prompt.tokens)
                position = len(prompt.tokens)
                while True:
                    token = sampler.sample(self._context)
                    yield token
                    self._decode(np.array([token], np.int32), position, output=True)
                    position += 1
            except InferpoolError:
                self._context.clear()
                self._chunked = _NO_TOKENS
                raise

    def _prefill(self, prompt: npt.NDArray[np.int32]) -> None:
        n_batch = self._context.n_batch
        kept = self._reusable(prompt)
        if not self._context.truncate(kept):
            self._context.clear()
            kept = 0
        self._chunked = prompt[:kept]
        for start in range(kept, len(prompt), n_batch):
            chunk = prompt[start : start + n_batch]
            end = start + len(chunk)
            self._decode(chunk, start, output=end == len(prompt))
            if len(chunk) == n_batch:
                self._chunked = prompt[:end]

    def _reusable(self, prompt: npt.NDArray[np.int32]) -> int:
        """Tokens of ``prompt`` that are in memory, in whole chunks, the last token excepted.

        The last token is always decoded, since its result is what the answer starts from.
        """
        n_batch = self._context.n_batch
        n = min(len(self._chunked), len(prompt) - 1)
        differing = np.flatnonzero(self._chunked[:n] != prompt[:n])
        common = int(differing[0]) if differing.size else n
        return common // n_batch * n_batch

    def _decode(self, tokens: npt.NDArray[np.int32], start: int, *, output: bool) -> None:
        self._batch.clear()
        self._batch.add(tokens, start=start, output=False)
        if output:
            self._batch.want_last()
        self._context.decode(self._batch)
