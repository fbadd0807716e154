"""Logits to a token: llama.cpp's sampler chain, and a grammar beside it."""

from __future__ import annotations

import ctypes

import msgspec
import numpy as np
import numpy.typing as npt

from inferpool.engine.backend import lib
from inferpool.engine.context import Context
from inferpool.engine.grammar import TOKEN_DATA, Grammar, GrammarState
from inferpool.engine.model import Model
from inferpool.errors import InvalidRequest, ModelError
from inferpool.messages import Sampling, TokenLogprob, TopLogprob

__all__ = ["Candidates", "Sampler"]

# Below it a division of the logits overflows 32 bits, and nothing differs from 0 anyway.
_GREEDY_TEMPERATURE = 1e-6
# typical_p and mirostat 1 take the logarithm of probabilities, also of those that are 0 since a ban
# or a grammar forbids the token, and then mistake what is likely. What is less likely than this,
# relative to the likeliest, is never drawn anyway.
_LEAST_LIKELY = 1e-30
# How many tokens mirostat 1 estimates its rank from; llama.cpp's only value.
_MIROSTAT_M = 100


class Candidates:
    """Every token of a vocabulary with its logit: a ``llama_token_data_array`` over numpy."""

    def __init__(self, n_vocab: int) -> None:
        self._data = np.zeros(n_vocab, TOKEN_DATA)
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._begin = self._data.ctypes.data_as(lib.llama_token_data_p)
        self._native = lib.llama_token_data_array(data=self._begin)

    def fill(self, logits: npt.NDArray[np.float32]) -> None:
        """Start anew from ``logits``, shape (n_vocab,)."""
        self._data["id"] = self._ids
        self._data["logit"] = logits
        # Anew too: a sampler may drop what comes first by moving the pointer on, as XTC does.
        self._native = lib.llama_token_data_array(
            data=self._begin, size=len(logits), selected=-1, sorted=False
        )

    def apply(self, sampler: lib.llama_sampler_p) -> None:
        """Let ``sampler`` remove, reorder, or select."""
        lib.llama_sampler_apply(sampler, ctypes.byref(self._native))

    @property
    def possible(self) -> bool:
        """Whether any token is left with a chance."""
        left = self._data["logit"][: self._native.size]
        return bool((left > -np.inf).any())

    @property
    def selected(self) -> int:
        """Id of the token that the last sampler selected."""
        return int(self._native.data[self._native.selected].id)


class Sampler:
    """The sampling options of one request, with the state of one answer.

    The order of the chain is llama.cpp's default (``common_sampler_init``): logit_bias,
    penalties, dry, top_k, typical_p, top_p, min_p, xtc, temperature, then a draw. Mirostat
    takes the place of all between logit_bias and the draw, but for temperature. Temperature 0
    takes the likeliest token after penalties and dry.

    Attributes:
        logprob: how likely the last sampled token was, if the request asks for it.
    """

    def __init__(self, request: Sampling, model: Model, grammar: Grammar | None = None) -> None:
        """Make the chain.

        Raises:
            InvalidRequest: for a token id outside the vocabulary, or a grammar that llama.cpp
                can't read.
        """
        self._model = model
        self._request = request
        self.logprob: TokenLogprob | None = None
        self._chain: lib.llama_sampler_p | None = lib.llama_sampler_chain_init(
            lib.llama_sampler_chain_default_params()
        )
        self._grammar: GrammarState | None = None
        self._has_bias = False
        try:
            self._add_bias()
            self._add_choice()
            if grammar is not None:
                self._grammar = GrammarState(grammar, model)
                self._candidates = Candidates(model.n_vocab)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the chain. Closing twice is harmless."""
        if self._chain is not None:
            lib.llama_sampler_free(self._chain)
            self._chain = None
        if self._grammar is not None:
            self._grammar.close()

    def accept_prompt(self, tokens: npt.NDArray[np.int32]) -> None:
        """Let penalties and dry know the prompt, shape (n,), as llama.cpp's server does."""
        if self._memory:
            for token in tokens[-self._memory :].tolist():
                lib.llama_sampler_accept(self._handle, token)

    def sample(self, context: Context, index: int = -1) -> int:
        """Draw the next token of the answer.

        Args:
            context: what decoded the last batch.
            index: position in that batch of the token whose result is to be continued, or -1
                for the last one that has a result.

        Raises:
            ModelError: no token of the vocabulary fits the grammar.
        """
        if self._grammar is not None:
            token = self._sample_constrained(self._grammar, context.logits(index))
        elif self._likeliest:
            # What the chain would choose too, for a sixth of the time: it copies every logit.
            token = int(context.logits(index).argmax())
        else:
            token = int(lib.llama_sampler_sample(self._handle, context.handle, index))
        if self._request.logprobs:
            self.logprob = self._measure(token, context.logits(index))
        return token

    def _sample_constrained(self, grammar: GrammarState, logits: npt.NDArray[np.float32]) -> int:
        # Asking the grammar about one token is cheap and about all of them is not, so it is
        # asked about all only if it refuses the one chosen without it (as in common_sampler).
        token = self._choose(logits)
        if not grammar.allows(token):
            token = self._choose(logits, grammar)
        lib.llama_sampler_accept(self._handle, token)
        grammar.accept(token)
        return token

    def _choose(self, logits: npt.NDArray[np.float32], grammar: GrammarState | None = None) -> int:
        self._candidates.fill(logits)
        if grammar is not None:
            self._candidates.apply(grammar.handle)
        if self._candidates.possible:
            self._candidates.apply(self._handle)
            token = self._candidates.selected
            if grammar is None or grammar.allows(token):
                return token
        # llama.cpp would abort on a token that its grammar does not allow.
        raise ModelError("no token of the vocabulary fits the grammar at this point of the answer")

    def _measure(self, token: int, logits: npt.NDArray[np.float32]) -> TokenLogprob:
        n_top = min(self._request.top_logprobs, len(logits))
        greatest = float(logits.max())
        total = greatest + float(np.log(np.exp(logits - greatest).sum(dtype=np.float64)))
        top = np.argpartition(logits, -n_top)[-n_top:] if n_top else np.empty(0, np.intp)
        top = top[np.argsort(-logits[top], kind="stable")]

        def described(token: int) -> TopLogprob:
            data = self._model.piece(token, special=True)
            return TopLogprob(
                token=data.decode("utf-8", "replace"),
                logprob=float(logits[token]) - total,
                bytes=list(data),
            )

        return TokenLogprob(
            **msgspec.structs.asdict(described(token)),
            top_logprobs=[described(int(token)) for token in top],
        )

    @property
    def _handle(self) -> lib.llama_sampler_p:
        if self._chain is None:
            raise RuntimeError("the sampler is closed")
        return self._chain

    def _add(self, sampler: lib.llama_sampler_p) -> None:
        lib.llama_sampler_chain_add(self._handle, sampler)  # the chain frees it

    def _add_bias(self) -> None:
        biases = {int(token): bias for token, bias in self._request.logit_bias.items()}
        for token in biases:
            if not 0 <= token < self._model.n_vocab:
                raise InvalidRequest(
                    f"logit_bias: token {token} is outside the vocabulary of "
                    f"{self._model.n_vocab} tokens"
                )
        # As llama.cpp's common_sampler_init does: placeholders of images, say, which mean nothing.
        biases |= dict.fromkeys(self._model.suppressed, -np.inf)
        if biases:
            self._has_bias = True
            pairs = np.array(list(biases.items()), [("token", np.int32), ("bias", np.float32)])
            native = pairs.ctypes.data_as(ctypes.POINTER(lib.llama_logit_bias))
            self._add(lib.llama_sampler_init_logit_bias(self._model.n_vocab, len(biases), native))

    def _add_choice(self) -> None:
        asked = self._request
        seed = lib.LLAMA_DEFAULT_SEED if asked.seed is None else asked.seed
        greedy = asked.temperature < _GREEDY_TEMPERATURE
        self._memory = 0
        self._likeliest = False
        if asked.mirostat == 0 or greedy:
            self._add_penalties()
        if greedy:
            self._add(lib.llama_sampler_init_greedy())
            self._likeliest = not self._memory and not self._has_bias
            return
        if asked.mirostat == 0:
            self._add(lib.llama_sampler_init_top_k(asked.top_k))
            if asked.typical_p < 1.0:
                self._add(lib.llama_sampler_init_min_p(_LEAST_LIKELY, 0))
                self._add(lib.llama_sampler_init_typical(asked.typical_p, 0))
            self._add(lib.llama_sampler_init_top_p(asked.top_p, 0))
            self._add(lib.llama_sampler_init_min_p(asked.min_p, 0))
            self._add(
                lib.llama_sampler_init_xtc(asked.xtc_probability, asked.xtc_threshold, 0, seed)
            )
        self._add(lib.llama_sampler_init_temp(asked.temperature))
        tau, eta = asked.mirostat_tau, asked.mirostat_eta
        if asked.mirostat == 1:
            n_vocab = self._model.n_vocab
            self._add(lib.llama_sampler_init_min_p(_LEAST_LIKELY, 0))
            self._add(lib.llama_sampler_init_mirostat(n_vocab, seed, tau, eta, _MIROSTAT_M))
        elif asked.mirostat == 2:
            self._add(lib.llama_sampler_init_mirostat_v2(seed, tau, eta))
        else:
            self._add(lib.llama_sampler_init_dist(seed))

    def _window(self, asked: int) -> int:
        """How many tokens to remember; llama.cpp allocates as many, however many there are."""
        window = min(asked, self._model.n_ctx_train)
        self._memory = max(self._memory, window)
        return window

    def _add_penalties(self) -> None:
        """Penalties and dry; they alone remember tokens, ``_memory`` of them."""
        asked = self._request
        penalties = (asked.repeat_penalty, asked.frequency_penalty, asked.presence_penalty)
        if penalties != (1.0, 0.0, 0.0):
            last_n = self._window(asked.repeat_last_n)
            self._add(lib.llama_sampler_init_penalties(self._model.n_vocab, last_n, *penalties))
        if asked.dry_multiplier != 0.0:
            last_n = self._window(asked.dry_penalty_last_n)
            breakers = [text.encode() for text in asked.dry_sequence_breakers]
            self._add(
                lib.llama_sampler_init_dry(
                    lib.llama_model_get_vocab(self._model.handle),
                    asked.dry_multiplier,
                    asked.dry_base,
                    asked.dry_allowed_length,
                    last_n,
                    (ctypes.c_char_p * len(breakers))(*breakers),
                    len(breakers),
                )
            )
