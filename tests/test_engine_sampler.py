"""How tokens are drawn: the chain against llama.cpp's own and by hand, logprobs, grammars."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import closing
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_fakes import SETTINGS, stream
from engine_fakes import tokens as first_tokens
from llama_cpp import Llama
from tiny_models import write_qwen3

from inferpool.engine.answer import collect
from inferpool.engine.backend import lib
from inferpool.engine.chat import ChatEngine
from inferpool.engine.context import Batch, Context
from inferpool.engine.grammar import Grammar
from inferpool.engine.model import Model
from inferpool.engine.sampler import Sampler
from inferpool.errors import InvalidRequest, ModelError
from inferpool.messages import ChatMessage, ChatRequest, Sampling, read

PROMPT = "The colours of the rainbow are red, red, red, orange, red"


@pytest.fixture(scope="module")
def tokens(model: Model) -> np.ndarray:
    return model.tokenize(PROMPT, add_special=False, parse_special=False)


@pytest.fixture(scope="module")
def context(model: Model, tokens: np.ndarray) -> Iterator[Context]:
    """Where `PROMPT` has been decoded, with results for its last token and for the fifth."""
    made = Context(model, n_ctx=256, n_batch=64, n_threads=1)
    batch = Batch(64)
    batch.add(tokens[:4], output=False)
    batch.add(tokens[4:5], start=4, output=True)
    batch.add(tokens[5:], start=5, output=False)
    batch.want_last()
    made.decode(batch)
    yield made
    made.close()


@pytest.fixture(scope="module")
def logits(context: Context) -> np.ndarray:
    return context.logits().astype(np.float64)


def draw(
    model: Model,
    context: Context,
    *,
    prompt: np.ndarray | None = None,
    grammar: str | None = None,
    **options: Any,
) -> int:
    """One token after `PROMPT`."""
    constraint = None if grammar is None else Grammar(grammar)
    with closing(Sampler(Sampling(**options), model, constraint)) as sampler:
        if prompt is not None:
            sampler.accept_prompt(prompt)
        return sampler.sample(context)


# Against the reference


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.3, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"top_k": 7},
        {"top_p": 0.5},
        {"min_p": 0.3},
        {"typical_p": 0.4},
        {"temperature": 1.0, "mirostat": 1, "mirostat_tau": 3.0},
        {"temperature": 1.0, "mirostat": 2, "mirostat_eta": 0.3},
    ],
    ids=str,
)
def test_a_seed_gives_the_tokens_of_the_reference(
    model: Model, reference: Llama, options: dict[str, Any]
) -> None:
    engine = ChatEngine(model, **SETTINGS)
    asked = ChatRequest(messages=[ChatMessage("user", "Tell me a story.")], seed=42, **options)
    prompt = engine._prompts.build(asked)
    ours = first_tokens(engine, asked, 24)
    engine.close()
    names = {"temperature": "temp", "mirostat": "mirostat_mode"}
    given = {names.get(name, name): value for name, value in options.items()}
    reference.reset()
    reference._ctx.kv_cache_clear()
    reference.set_seed(42)
    theirs = reference.generate(prompt.tokens.tolist(), **{"temp": 0.8, **given})
    # Where an answer is short depends on how the CPU rounds.
    answer = takewhile(lambda token: not model.is_eog(token), theirs)
    assert ours == list(islice(answer, 24))
    assert ours


# By hand


def test_any_output_of_a_batch_can_be_read(
    model: Model, context: Context, tokens: np.ndarray
) -> None:
    last = len(tokens) - 1
    native = lib.llama_sampler_init_greedy()
    with closing(Sampler(Sampling(temperature=0), model)) as sampler:
        for index in (4, last):
            expected = lib.llama_sampler_sample(native, context.handle, index)
            assert sampler.sample(context, index) == expected
        assert sampler.sample(context) == sampler.sample(context, last)
        assert sampler.sample(context, 4) != sampler.sample(context, last)
    lib.llama_sampler_free(native)
    with pytest.raises(ModelError, match="no output at 3"):
        context.logits(3)


def test_penalties_are_what_their_formulas_say(
    model: Model, context: Context, tokens: np.ndarray, logits: np.ndarray
) -> None:
    greedy = int(logits.argmax())
    assert (tokens == greedy).sum() > 0, "the prompt must tempt the model to repeat"
    for repeat, frequency, presence, last_n in [
        (1.5, 0.0, 0.0, 64),
        (1.0, 1.5, 0.0, 64),
        (1.0, 0.0, 4.0, 64),
        (1.2, 0.5, 0.5, 64),
        (1.5, 0.0, 0.0, 2),
    ]:
        expected = logits.copy()
        ids, counts = np.unique(tokens[-last_n:], return_counts=True)
        seen = expected[ids]
        seen = np.where(seen > 0, seen / repeat, seen * repeat)
        expected[ids] = seen - counts * frequency - presence
        token = draw(
            model,
            context,
            prompt=tokens,
            temperature=0,
            repeat_penalty=repeat,
            frequency_penalty=frequency,
            presence_penalty=presence,
            repeat_last_n=last_n,
        )
        assert token == int(expected.argmax())


def test_dry_keeps_a_repetition_from_growing(
    model: Model, context: Context, tokens: np.ndarray, logits: np.ndarray
) -> None:
    # "… red, red, red, orange, red": what followed the same end before was a comma.
    greedy = int(logits.argmax())
    assert tokens[-2] == greedy
    options = {"prompt": tokens, "temperature": 0, "dry_allowed_length": 1}
    assert draw(model, context, **options, dry_multiplier=0.0) == greedy
    second = int(np.argsort(-logits)[1])
    assert draw(model, context, **options, dry_multiplier=1e3) == second
    # A breaker ends what counts as a repetition.
    breakers = {"dry_sequence_breakers": [model.piece(int(tokens[-1])).decode().strip()]}
    assert draw(model, context, **options, dry_multiplier=1e3, **breakers) == greedy


def test_xtc_leaves_the_least_likely_of_the_likely(
    model: Model, context: Context, logits: np.ndarray
) -> None:
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    order = np.argsort(-probabilities)
    threshold = float(probabilities[order[2]]) * 0.999  # three tokens reach it
    open_chain = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 0.001}
    assert draw(model, context, **open_chain) == order[0]
    excluded = draw(model, context, **open_chain, xtc_probability=1.0, xtc_threshold=threshold)
    assert excluded == order[2]


@pytest.mark.parametrize("bias", [0.0, -100.0, -math.inf])
def test_typical_tokens_are_those_whose_surprise_is_the_expected(
    model: Model, context: Context, logits: np.ndarray, bias: float
) -> None:
    likeliest = int(logits.argmax())
    biased = logits.copy()
    biased[likeliest] += bias  # to where a float32 can't tell its probability from 0
    ratios = np.exp(biased - biased.max())
    found = ratios > 0
    logarithms = np.log(ratios[found] / ratios.sum())
    deviation = np.abs(logarithms - (np.exp(logarithms) @ logarithms))
    order = np.argsort(deviation)
    n_typical = int((np.exp(logarithms)[order].cumsum() > 0.3).argmax()) + 1
    typical = set(np.flatnonzero(found)[order[:n_typical]].tolist())
    open_chain = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 0.3}
    drawn = {
        draw(model, context, seed=seed, **open_chain, logit_bias={likeliest: bias})
        for seed in range(100)
    }
    assert drawn <= typical


def test_mirostat_still_chooses_where_a_grammar_leaves_little(
    model: Model, context: Context
) -> None:
    options = {"mirostat": 1, "temperature": 2.0, "grammar": "root ::= [a-j]"}
    assert len({draw(model, context, seed=seed, **options) for seed in range(30)}) > 3


def test_logit_bias_bans_and_forces(model: Model, context: Context, logits: np.ndarray) -> None:
    first, second = (int(token) for token in np.argsort(-logits)[:2])
    assert draw(model, context, temperature=0, logit_bias={first: -math.inf}) == second
    assert draw(model, context, temperature=0, logit_bias={str(second): 100.0}) == second
    with pytest.raises(InvalidRequest, match=f"token {model.n_vocab} is outside"):
        draw(model, context, logit_bias={model.n_vocab: 1.0})


def test_what_a_model_suppresses_is_never_drawn(tmp_path: Path) -> None:
    def first(options: dict[str, Any], suppressed: list[int]) -> int:
        path = write_qwen3(tmp_path / f"{len(suppressed)}.gguf", "chat", suppressed=suppressed)
        with closing(Model(path)) as model:
            engine = ChatEngine(model, **{**SETTINGS, "n_ctx": 256}, chat_template="-")
            with closing(engine):
                asked = ChatRequest(prompt="yes", temperature=0, **options)
                return first_tokens(engine, asked, 1)[0]

    likeliest = first({}, [])
    for options in ({}, {"repeat_penalty": 1.1}, {"grammar": "root ::= [^\\x00]*"}):
        assert first(options, [likeliest]) != likeliest
    assert first({"logit_bias": {likeliest: 1e6}}, []) == likeliest
    assert first({"logit_bias": {likeliest: 1e6}}, [likeliest]) != likeliest


@pytest.mark.parametrize("options", [{"mirostat": 2}, {"xtc_probability": 1.0}, {"seed": 3}])
def test_temperature_zero_is_greedy_whatever_else(
    model: Model, context: Context, logits: np.ndarray, options: dict[str, Any]
) -> None:
    assert draw(model, context, temperature=0, **options) == int(logits.argmax())


def test_logprobs_are_those_of_the_model(
    model: Model, context: Context, logits: np.ndarray
) -> None:
    expected = logits - np.logaddexp.reduce(logits)
    order = np.argsort(-expected)
    # Sampling options change what is drawn, not how likely the model found it.
    asked = Sampling(
        temperature=0, logit_bias={int(order[0]): -50.0}, logprobs=True, top_logprobs=3
    )
    with closing(Sampler(asked, model)) as sampler:
        token = sampler.sample(context)
        found = sampler.logprob
    assert found is not None
    assert token == order[1]
    assert found.logprob == pytest.approx(expected[token], abs=1e-4)
    assert bytes(found.bytes) == model.piece(token)
    assert found.token == model.piece(token).decode()
    assert [top.logprob for top in found.top_logprobs] == pytest.approx(
        expected[order[:3]], abs=1e-4
    )
    assert [bytes(top.bytes) for top in found.top_logprobs] == [
        model.piece(int(token), special=True) for token in order[:3]
    ]


# Grammars


YES_OR_NO = 'root ::= " yes" | " no"'


def test_a_grammar_asks_about_all_tokens_only_if_the_choice_does_not_fit(
    model: Model, context: Context, logits: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inferpool.engine.sampler import Candidates

    applied = []
    apply = Candidates.apply
    monkeypatch.setattr(
        Candidates, "apply", lambda self, sampler: (applied.append(1), apply(self, sampler))[1]
    )
    anything = "root ::= [\\U00000001-\\U0010FFFF]+"
    assert draw(model, context, temperature=0, grammar=anything) == int(logits.argmax())
    assert len(applied) == 1  # the chain
    applied.clear()
    token = draw(model, context, temperature=0, grammar=YES_OR_NO)
    assert model.piece(token).decode() in {" ", " yes", " no", " y", " n", " ye"}
    assert len(applied) == 3  # the chain, the grammar, the chain


def test_a_grammar_draws_the_likeliest_token_that_fits(
    model: Model, context: Context, logits: np.ndarray
) -> None:
    fitting = [
        token
        for token in range(model.n_vocab)
        if (piece := model.piece(token))
        and any(text.startswith(piece) for text in (b" yes", b" no"))
    ]
    expected = max(fitting, key=lambda token: logits[token])
    assert draw(model, context, temperature=0, grammar=YES_OR_NO) == expected


@pytest.mark.parametrize(
    "options",
    [{}, {"xtc_probability": 1.0, "temperature": 2.0}, {"typical_p": 0.5}, {"mirostat": 2}],
    ids=str,
)
def test_a_grammar_that_everything_fits_changes_no_token(
    model: Model, options: dict[str, Any]
) -> None:
    engine = ChatEngine(model, **SETTINGS)
    with closing(engine):
        asked = {"prompt": PROMPT, "seed": 1, "max_tokens": 40, **options}
        constrained = ChatRequest(**asked, grammar=r"root ::= [^\x00]*")
        assert first_tokens(engine, constrained, 32) == first_tokens(
            engine, ChatRequest(**asked), 32
        )


def test_a_grammar_can_wait_for_a_text(model: Model, context: Context, logits: np.ndarray) -> None:
    greedy = int(logits.argmax())
    piece = model.piece(greedy).decode()
    with closing(
        Sampler(Sampling(temperature=0), model, Grammar('root ::= " yes"', after=piece * 2))
    ) as sampler:
        assert [sampler.sample(context) for _ in range(2)] == [greedy, greedy]
        assert b" yes".startswith(model.piece(sampler.sample(context)))


def test_a_grammar_that_nothing_fits_is_an_error_not_a_crash(
    model: Model, context: Context
) -> None:
    banned = {
        token: -math.inf for token in range(model.n_vocab) if b" yes".startswith(model.piece(token))
    }
    for temperature in (0.0, 1.0):
        with pytest.raises(ModelError, match="fits the grammar"):
            draw(
                model,
                context,
                temperature=temperature,
                grammar='root ::= " yes"',
                logit_bias=banned,
            )


@pytest.mark.parametrize(
    ("gbnf", "reason"),
    [
        ("root ::= (", "grammar"),
        ("root ::= missing", "missing"),
        ("other ::= [a-z]", "grammar"),
        ("root ::= root [a-z]", "grammar"),
        ("", "grammar"),
        ("root ::= [a-z]\0", "NUL"),
        ("root ::= " + "(" * 100_000, "deeper than"),
        ("root ::= [a-z]{100000}", "repetitions"),
        ('root ::= "{1,2}" [a"]{ 12 , 7}', "repeats from 12 to 7 times"),
        ("root ::= a\n" + "a ::= a\n" * 10_000, "more than 10000 rules"),
    ],
    ids=lambda text: text[:20],
)
def test_a_broken_grammar_is_refused_with_the_reason(
    model: Model, context: Context, gbnf: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        draw(model, context, grammar=gbnf)


def test_bounds_within_texts_are_texts(model: Model, context: Context) -> None:
    grammar = r'root ::= "{2,1}" | "\"" [{3,1}\]"]{1,2} # {4,1}'
    assert model.piece(draw(model, context, grammar=grammar))[:1] in {b"{", b'"'}


def test_what_llama_cpp_prints_about_a_grammar_still_reaches_the_log(
    model: Model, context: Context, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InvalidRequest):
        draw(model, context, grammar="root ::= missing")
    assert "error parsing grammar" in capfd.readouterr().err


def test_a_response_format_makes_json_of_that_form(model: Model) -> None:
    engine = ChatEngine(model, **SETTINGS)
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "warm": {"type": "boolean"}},
        "required": ["city", "warm"],
    }
    wanted = [
        {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema}},
        {"type": "json_object"},
    ]
    for response_format in wanted:
        for temperature in (0.0, 1.5):
            asked = read(
                {
                    "messages": [{"role": "user", "content": "How is the weather in Rome?"}],
                    "response_format": response_format,
                    "temperature": temperature,
                    "max_tokens": 96,
                    "seed": 1,
                },
                ChatRequest,
            )
            result = collect(stream(engine, asked))
            if result.finish_reason == "length":
                assert response_format == {"type": "json_object"}, result.text
                continue
            answer = json.loads(result.text)
            if response_format == wanted[0]:
                assert {name: type(value) for name, value in answer.items()} == {
                    "city": str,
                    "warm": bool,
                }
            assert isinstance(answer, dict)
    engine.close()


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "text", "json_schema": {"schema": {}}}},
        {"response_format": {"type": "text"}, "grammar": "root ::= [a-z]"},
    ],
    ids=str,
)
def test_contradictory_formats_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"json_schema|exclude each other"):
        read(options, Sampling)


# The options themselves


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"typical_p": 1.1}, "typical_p"),
        ({"xtc_probability": -0.1}, "xtc_probability"),
        ({"xtc_threshold": math.nan}, "xtc_threshold"),
        ({"repeat_last_n": -1}, "repeat_last_n"),
        ({"frequency_penalty": math.inf}, "frequency_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"dry_multiplier": -1.0}, "dry_multiplier"),
        ({"dry_base": math.inf}, "dry_base"),
        ({"dry_allowed_length": -1}, "dry_allowed_length"),
        ({"dry_penalty_last_n": 1 << 40}, "dry_penalty_last_n"),
        ({"dry_sequence_breakers": [""]}, "dry_sequence_breakers"),
        ({"dry_sequence_breakers": ["a"] * 65}, "dry_sequence_breakers must hold at most 64"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 257}, "stop must hold at most 256 texts, not 257"),
        ({"mirostat_tau": -1.0}, "mirostat_tau"),
        ({"mirostat_eta": math.inf}, "mirostat_eta"),
        ({"logit_bias": {"bee": 1.0}}, "logit_bias"),
        ({"logit_bias": {5: math.nan}}, "logit_bias"),
        ({"logit_bias": {5: 1e300}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "logprobs=True"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_option_out_of_range_is_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Sampling(**options)


def test_as_many_texts_as_there_may_be() -> None:
    Sampling(stop=["a"] * 256, dry_sequence_breakers=("a",) * 64)
