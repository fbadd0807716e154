"""Logits to a token: llama.cpp's sampler chain."""

from __future__ import annotations

from collections.abc import Iterable

from inferpool.engine.backend import lib
from inferpool.engine.context import Context
from inferpool.engine.model import Model
from inferpool.messages import ChatRequest

__all__ = ["Sampler"]

# llama.cpp's default for penalty_last_n: how many of the last tokens are penalised.
_PENALTY_WINDOW = 64


class Sampler:
    """The sampling options of one request, with the state of one answer.

    The order of the chain is llama.cpp's default (``common_params_sampling``): penalties,
    top_k, top_p, min_p, temperature, then a draw. Temperature 0 takes the likeliest token.
    """

    def __init__(self, request: ChatRequest, model: Model) -> None:
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        self._penalises = request.repeat_penalty != 1.0
        if self._penalises:
            self._add(
                lib.llama_sampler_init_penalties(
                    model.n_vocab, _PENALTY_WINDOW, request.repeat_penalty, 0.0, 0.0
                )
            )
        if request.temperature == 0.0:
            self._add(lib.llama_sampler_init_greedy())
            return
        seed = lib.LLAMA_DEFAULT_SEED if request.seed is None else request.seed
        self._add(lib.llama_sampler_init_top_k(request.top_k))
        self._add(lib.llama_sampler_init_top_p(request.top_p, 1))
        self._add(lib.llama_sampler_init_min_p(request.min_p, 1))
        self._add(lib.llama_sampler_init_temp(request.temperature))
        self._add(lib.llama_sampler_init_dist(seed))

    def _add(self, sampler: lib.llama_sampler_p) -> None:
        lib.llama_sampler_chain_add(self._chain, sampler)  # the chain frees it

    def close(self) -> None:
        """Free the chain. Closing twice is harmless."""
        if self._chain is not None:
            lib.llama_sampler_free(self._chain)
            self._chain = None

    def accept_prompt(self, tokens: Iterable[int]) -> None:
        """Let the repeat penalty know the prompt, as llama.cpp's server does."""
        if self._penalises:
            for token in tokens:
                lib.llama_sampler_accept(self._chain, token)

    def sample(self, context: Context, index: int = -1) -> int:
        """Draw the next token of the answer.

        Args:
            context: what decoded the last batch.
            index: position in that batch of the token whose result is to be continued, or -1
                for the last one that has a result.
        """
        return int(lib.llama_sampler_sample(self._chain, context.handle, index))
