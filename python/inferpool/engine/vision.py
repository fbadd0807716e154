"""Images and a prompt to streamed text, one request at a time."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt

from inferpool.engine.abort import AbortToken
from inferpool.engine.answer import Answer
from inferpool.engine.context import Batch, Context, context_length
from inferpool.engine.formats import reasoning_of
from inferpool.engine.images import Pixels
from inferpool.engine.model import Model
from inferpool.engine.projector import Chunks, Projector
from inferpool.engine.prompt import Prompt, begin_answer, grammar_of, visible_tokens
from inferpool.engine.template import ChatTemplate
from inferpool.engine.turns import turns
from inferpool.errors import ContextLengthExceeded, InvalidRequest, ModelLoadError
from inferpool.messages import ChatDelta, Conversation

__all__ = ["VisionEngine"]


class VisionEngine:
    """Answers requests about images, each to its end before the next.

    Attributes:
        n_ctx: tokens of prompt, images and answer together at most.
    """

    def __init__(
        self,
        model: Model,
        projector: Projector,
        *,
        n_ctx: int | None,
        n_batch: int,
        n_threads: int | None,
        flash_attn: bool,
        chat_template: str | None,
    ) -> None:
        """Prepare ``model`` and ``projector``, which stay the caller's to close.

        Args:
            model: a generative model.
            projector: its vision encoder.
            n_ctx: context length in tokens, see `context_length`.
            n_batch: tokens of a prompt decoded together at most.
            n_threads: None takes the CPUs this process may run on.
            flash_attn: whether to use flash attention.
            chat_template: jinja text to use in place of the model's own.

        Raises:
            ModelLoadError: if there is no usable chat template, the model generates no text
                from a prompt alone, or memory is short.
        """
        source = chat_template or model.chat_template
        if source is None:
            raise ModelLoadError(
                f"{model.path.name} has no chat template. hint: pass chat_template="
            )
        self._template = ChatTemplate(source, bos=model.bos, eos=model.eos)
        self._reasoning = reasoning_of(source)
        self._model = model
        self._projector = projector
        self.n_ctx = context_length(n_ctx, model.n_ctx_train)
        self._context = Context(
            model,
            n_ctx=self.n_ctx,
            n_batch=min(n_batch, self.n_ctx),
            n_threads=n_threads,
            flash_attn=flash_attn,
        )
        self._batch = Batch(self._context.n_batch)

    def close(self) -> None:
        """Free the context. Closing twice is harmless."""
        self._context.close()

    def stream(
        self, images: Sequence[Pixels], request: Conversation, *, abort: AbortToken | None = None
    ) -> Iterator[ChatDelta]:
        """Answer ``request`` about ``images`` piece by piece; the last piece says why it ended.

        The images come before the text of the last turn, in their order.

        Raises:
            ContextLengthExceeded: if prompt and images leave no room for an answer.
            InvalidRequest: if an image can't be used, or the chat template drops it or refuses the
                messages.
            CallCancelled: if ``abort`` was set.
            ModelError: if llama.cpp or the chat template fails.
        """
        since = time.perf_counter()
        parts = self._parts(images, request)
        with closing(self._projector.tokenize(parts)) as chunks:
            answer = Answer(self._prompt(chunks, str(parts[-1]), request), since)
            with closing(answer.sampler):
                for token in self._generate(chunks, answer, abort):
                    if not answer.add(token):
                        break
                    while answer.untold:
                        yield answer.untold.popleft()
        yield from answer.untold

    def _parts(self, images: Sequence[Pixels], request: Conversation) -> list[str | Pixels]:
        """The prompt, which ends with a text."""
        # No text can spell out a marker that it doesn't know.
        marker = f"<image {secrets.token_hex(16)}>"
        conversation = turns(request.messages)
        conversation[-1]["content"] = marker * len(images) + conversation[-1]["content"]
        prompt = self._template.render(conversation)
        if self._model.adds_bos and not prompt.startswith(self._model.bos):
            prompt = self._model.bos + prompt
        texts = prompt.split(marker)
        if len(texts) != len(images) + 1 or not texts[-1]:
            raise InvalidRequest("the chat template drops the images, or ends with one")
        parts: list[str | Pixels] = [texts[0]]
        for image, text in zip(images, texts[1:], strict=True):
            parts += [image, text]
        return [part for part in parts if not isinstance(part, str) or part]

    def _prompt(self, chunks: Chunks, ending: str, request: Conversation) -> Prompt:
        n_prompt = sum(chunk.n_tokens for chunk in chunks)
        n_images = sum(chunk.n_tokens for chunk in chunks if chunk.tokens is None)
        room = self.n_ctx - n_prompt
        if room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {n_prompt} tokens, {n_images} of them for images, and the answer "
                f"needs at least 1; the context holds {self.n_ctx}",
                asked=n_prompt,
                images=n_images,
                context=self.n_ctx,
                response_budget=1,
            )
        thinking, grammar = begin_answer(ending, self._reasoning, grammar_of(request))
        return Prompt(
            model=self._model,
            request=request,
            tokens=np.concatenate([chunk.tokens for chunk in chunks if chunk.tokens is not None]),
            n_images=n_images,
            budget=min(request.max_tokens or room, room),
            grammar=grammar,
            reasoning=self._reasoning,
            thinking=thinking,
            visible=visible_tokens(self._model, self._reasoning),
        )

    def _generate(self, chunks: Chunks, answer: Answer, abort: AbortToken | None) -> Iterator[int]:
        """Token after token of the answer, without end; the last result is always unread."""
        self._context.set_abort(abort)
        self._projector.set_abort(abort)
        self._context.clear()
        position = 0
        for chunk in chunks:
            if chunk.tokens is None:
                self._projector.decode(self._context, chunk, position)
            else:
                self._decode(chunk.tokens, position)
            position += chunk.n_positions
        answer.sampler.accept_prompt(answer.prompt.tokens)
        while True:
            token = answer.sampler.sample(self._context)
            yield token
            self._decode(np.array([token], np.int32), position)
            position += 1

    def _decode(self, tokens: npt.NDArray[np.int32], position: int) -> None:
        """Decode text; the result of its last token can be read afterwards."""
        n_batch = self._context.n_batch
        for start in range(0, len(tokens), n_batch):
            self._batch.clear()
            piece = tokens[start : start + n_batch]
            self._batch.add(piece, start=position + start, output=False)
            self._batch.want_last()
            self._context.decode(self._batch)
