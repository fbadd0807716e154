"""Calls that name their model: ``model=``."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TIRELESS, echo_role, eventually, is_running
from tiny_models import write_qwen3

from inferpool import (
    AsyncPool,
    ChatConfig,
    EmbedConfig,
    ModelNotFound,
    PoisonousRequest,
    Policy,
    Pool,
    PoolClosed,
    QueueFull,
    Role,
    WorkerCrashed,
)
from inferpool.host.incarnation import Incarnation
from inferpool.host.spec import RoleSpec
from inferpool.host.supervisor import Supervisor
from inferpool.testing import scripted_chat

PDF = b"%PDF"
# The id of the token that ends an answer.
END = 263


def naming_role(model: str = "0", **hosting: Any) -> Role:
    return Role("naming_role:make_session", "naming_role:HANDLERS", {"model": model}, **hosting)


def embedded(pool: Pool, **options: Any) -> int:
    """Which of the models of `naming_role` answers."""
    return int(pool.embed(["a"], **options).item())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two models that differ in their weights, for chat and embed alike."""
    folder = tmp_path_factory.mktemp("models")
    one = write_qwen3(folder / "one.gguf", "embed")
    other = write_qwen3(folder / "other.gguf", "embed", seed=8)
    return str(one), str(other)


# What a call may name, and what comes of it.

CALLS: dict[str, Callable[[Any, str], Any]] = {
    "embed": lambda pool, model: pool.embed(["a"], model=model),
    "embed_query": lambda pool, model: pool.embed.embed_query("a", model=model),
    "embed_documents": lambda pool, model: pool.embed.embed_documents(["a"], model=model),
    "rerank": lambda pool, model: pool.rerank("a", ["b"], model=model),
    "chat": lambda pool, model: pool.chat("a", model=model),
    "chat.complete": lambda pool, model: pool.chat.complete("a", model=model),
    "chat.stream": lambda pool, model: pool.chat.stream("a", model=model),
    "chat.stream_complete": lambda pool, model: pool.chat.stream_complete("a", model=model),
    "vision": lambda pool, model: pool.vision(b"", "a", model=model),
    "vision.stream": lambda pool, model: pool.vision.stream(b"", "a", model=model),
    "vision.pdf": lambda pool, model: pool.vision.pdf(PDF, "a", model=model),
}


def who(answer: Any) -> int:
    """The model that gave an answer of `naming_role`."""
    if isinstance(answer, np.ndarray):
        return int(answer.item())
    first = answer[0] if isinstance(answer, list) else answer
    return int(first.relevance_score if hasattr(first, "relevance_score") else first.text)


@pytest.mark.parametrize("name", CALLS)
def test_every_call_of_a_built_in_role_may_name_its_model(name: str) -> None:
    role = name.partition(".")[0].partition("_")[0]

    def whole(answer: Any) -> Any:
        return list(answer) if isinstance(answer, Iterator) else answer

    async def awaited(answer: Any) -> Any:
        if isinstance(answer, AsyncIterator):
            return [item async for item in answer]
        assert isinstance(answer, Awaitable)
        return await answer

    async def body(pool: AsyncPool) -> None:
        assert who(await awaited(CALLS[name](pool, "3"))) == 3

    with Pool(**{role: naming_role()}) as pool:
        assert who(whole(CALLS[name](pool, "2"))) == 2
        asyncio.run(body(pool.as_async()))
        assert pool.status()[role].model == "3"


def test_a_call_swaps_the_model_of_its_role_alone(tiny: tuple[str, str]) -> None:
    one, other = tiny
    config = EmbedConfig(one, n_threads=1, prompts={"query": "bee "})
    with Pool(embed=config, echo=echo_role()) as pool:
        stream = pool.stream("echo", "count", 20_000)
        first = pool.embed(["bee no"])
        before = pool.status()["embed"].pid
        assert before is not None
        second = pool.embed(["bee no"], model=Path(other))
        assert np.abs(first - second).max() > 0.01
        pid = pool.status()["embed"].pid
        assert eventually(lambda: not is_running(before))
        # It keeps the model, and the rest of its config.
        np.testing.assert_array_equal(pool.embed(["bee no"]), second)
        np.testing.assert_array_equal(pool.embed.embed_query("no", model=other), second[0])
        assert pool.status()["embed"].pid == pid
        assert pool.status()["embed"].model == other
        assert pool.status()["embed"].restarts == 0
        assert pool.status()["echo"].model is None
        assert list(stream) == list(range(20_000))
        np.testing.assert_array_equal(pool.embed(["bee no"], model=one), first)
        # As does whoever configures it: by a model, that is with the config's defaults.
        pool.configure("embed", EmbedConfig(other, n_threads=1))
        np.testing.assert_array_equal(pool.embed(["bee no"]), second)


def test_a_stream_goes_on_with_the_model_that_began_it(tmp_path: Path) -> None:
    one = str(write_qwen3(tmp_path / "one.gguf", "chat"))
    other = str(write_qwen3(tmp_path / "other.gguf", "chat", seed=8))
    options: dict[str, Any] = {"max_tokens": 200, "temperature": 0, "logit_bias": {END: -np.inf}}
    with Pool(chat=ChatConfig(one, n_threads=1)) as pool:
        first = pool.chat.complete("no", **options).text
        with pool.chat.stream_complete("no", **options) as stream:
            begun = next(stream).text
            second = pool.chat.complete("no", model=other, **options).text
            assert begun + "".join(delta.text for delta in stream) == first
        assert second != first
        assert pool.chat.complete("no", **options).text == second


def test_one_that_is_not_there_fails_for_its_caller(tiny: tuple[str, str]) -> None:
    def wrong(pool: Pool, **options: Any) -> None:
        with pytest.raises(ModelNotFound, match="no-such-model"):
            pool.embed(["a"], **options)

    async def awaited(pool: AsyncPool) -> None:
        assert (await pool.embed(["a"], model=tiny[0])).shape == (1, 32)
        with pytest.raises(ModelNotFound, match="no-such-model"):
            await pool.embed(["a"], model="no-such-model")
        assert (await pool.embed(["a"], model=tiny[0])).shape == (1, 32)

    with Pool(embed=EmbedConfig(tiny[0], n_threads=1)) as pool:
        wrong(pool, model="no-such-model")
        wrong(pool)  # as after `configure`
        assert pool.embed(["a"], model=tiny[1]).shape == (1, 32)
        asyncio.run(awaited(pool.as_async()))


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"model"


@pytest.mark.parametrize(
    ("model", "problem"),
    [(3, "not int"), (b"1", "not bytes"), (BytesPath(), "not bytes")],
    ids=["int", "bytes", "a path of bytes"],
)
def test_what_is_no_model_is_refused(model: Any, problem: str) -> None:
    with Pool(embed=naming_role()) as pool:
        assert embedded(pool) == 0
        with pytest.raises(TypeError, match=problem):
            pool.embed(["a"], model=model)
        assert embedded(pool) == 0
        assert pool.status()["embed"].incarnation == 1


def test_a_role_without_a_model_can_not_be_given_one() -> None:
    with Pool(chat=echo_role()) as pool:
        with pytest.raises(TypeError, match="role 'chat' has no model"):
            pool.chat("a", model="1")
        assert pool.status()["chat"].incarnation == 0
    with pytest.raises(PoolClosed):
        pool.chat("a", model="1")


def test_scripted_roles_take_any_model() -> None:
    with Pool(chat=scripted_chat(["a"])) as pool:
        assert pool.chat("x", model="one").text == "a"
        assert pool.chat("x", model="other").text == "a"
        assert pool.status()["chat"].model == "other"
        assert pool.status()["chat"].incarnation == 2


# Racing callers.


@pytest.mark.parametrize("replicas", [1, 2])
def test_threads_that_name_models_in_turn_each_get_theirs(replicas: int) -> None:
    def caller(number: int) -> list[int]:
        models = [1, 2] * 3 if number % 2 else [2, 1] * 3
        answers = [embedded(pool, model=str(model)) for model in models]
        assert answers == models
        return answers

    with Pool(embed=naming_role(replicas=replicas)) as pool, ThreadPoolExecutor(3) as threads:
        for answers in threads.map(caller, range(3)):
            assert len(answers) == 6
        assert embedded(pool) in {1, 2}
        assert pool.status()["embed"].restarts == 0


def test_tasks_that_name_models_each_get_theirs() -> None:
    async def body() -> None:
        async with AsyncPool(embed=naming_role()) as pool:
            named = [str(number % 3) for number in range(12)]
            vectors = await asyncio.gather(*(pool.embed(["a"], model=model) for model in named))
            assert [str(who(each)) for each in vectors] == named

    asyncio.run(body())


@pytest.mark.parametrize("step", [(Supervisor, "pause"), (Incarnation, "begin")])
def test_a_swap_between_any_two_steps_of_a_call(
    step: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a worker is started, and before the call is begun with it, others name another."""
    real = getattr(*step)
    swaps = 2

    def swap_first(self: Any, *args: Any) -> Any:
        nonlocal swaps
        if swaps:
            left, swaps = swaps - 1, 0  # the swap comes here too
            assert embedded(pool, model="2") == 2
            swaps = left
        return real(self, *args)

    with Pool(embed=naming_role()) as pool:
        monkeypatch.setattr(*step, swap_first)
        assert embedded(pool, model="1") == 1
        assert embedded(pool) == 1
        assert swaps < 2


def test_no_swap_amid_a_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Supervisor.configure

    def swap_after(self: Supervisor, spec: RoleSpec) -> None:
        real(self, spec)
        if spec.model == "1" and other.ident is None:
            other.start()
            other.join(1)  # seconds in which it could have had a worker of its own

    answers: list[int] = []
    other = threading.Thread(target=lambda: answers.append(embedded(pool, model="2")))
    with Pool(embed=naming_role()) as pool:
        monkeypatch.setattr(Supervisor, "configure", swap_after)
        assert embedded(pool, model="1") == 1
        other.join()
        assert answers == [2]


# What else happens to calls.


def test_a_call_that_is_made_again_names_its_model_again(tmp_path: Path) -> None:
    with Pool(embed=naming_role(retry=1), policy=TIRELESS) as pool:
        assert pool.embed([str(tmp_path / "once")], model="1").item() == 1
        assert pool.status()["embed"].restarts == 1


def test_what_crashed_one_model_may_be_asked_of_another() -> None:
    with Pool(embed=naming_role(), policy=TIRELESS) as pool:
        for _ in range(2):
            embedded(pool)
            with pytest.raises(WorkerCrashed):
                pool.embed(["kill 0"])
        for options in ({}, {"model": "0"}):
            with pytest.raises(PoisonousRequest):
                pool.embed(["kill 0"], **options)
        assert pool.embed(["kill 0"], model="1").item() == 1


def test_a_call_that_is_refused_swaps_nothing() -> None:
    role = Role(
        "echo_role:make_session", "echo_role:HANDLERS", {"model": "0"}, policy=Policy(max_queue=1)
    )
    with Pool(chat=role) as pool:
        with pool.stream("chat", "count") as stream:
            next(stream)
            with pytest.raises(QueueFull):
                pool.chat("a", model="1")
        assert pool.status()["chat"].model == "0"
