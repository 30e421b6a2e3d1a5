"""Streams through both clients: many sessions over one connection."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from serving import Oracle, Running

from unroll.client import AsyncClient, Client, errors

Oracles = Callable[[str], Oracle]


def test_many_sessions_step_in_one_message(client: Any, oracle: Oracles, rng: np.random.Generator) -> None:
    x = rng.standard_normal((40, 6, 3)).astype(np.float32)
    with client.stream("lstm") as stream:
        sessions = stream.open(40)
        got = [stream.step(sessions, x[:, 0])[:, np.newaxis], stream.steps(sessions, x[:, 1:4])]
        got.append(np.array([session.steps(steps) for session, steps in zip(sessions, x[:, 4:], strict=True)]))
        assert {session.position for session in sessions} == {6}
    for steps, outputs in zip(x, np.concatenate(got, 1), strict=True):
        assert np.array_equal(outputs, oracle("lstm")(steps))
    with pytest.raises(errors.SessionClosed):
        client.session("lstm", sessions[0].id, mode="resume")


def test_more_sessions_than_one_frame_holds(client: Any) -> None:
    with client.stream("tokens") as stream:
        sessions = stream.open(5000)
        outputs = stream.step(sessions, np.arange(5000) % 11)
        assert outputs.shape == (5000, 11)
        assert np.array_equal(outputs[3], outputs[14])
        assert {session.position for session in sessions} == {1}


def test_stream_handles_several_tensors_and_no_time_axis(
    client: Any, oracle: Oracles, rng: np.random.Generator
) -> None:
    a, b = rng.standard_normal((3, 4, 2)).astype("f4"), rng.standard_normal((3, 4, 3)).astype("f4")
    with client.stream("two") as stream:
        outputs = stream.steps(stream.open(3), {"a": a, "b": b})
        for i in range(3):
            (level, slope), _ = oracle("two").all(a[i], b[i])
            assert np.array_equal(outputs["level"][i], level)
            assert np.array_equal(outputs["slope"][i], slope)
    with client.stream("last") as stream:
        (session,) = stream.open()
        assert np.array_equal(session.steps(b[0]), oracle("last")(b[0]))


def test_a_session_of_http_continues_on_a_stream(client: Any, oracle: Oracles, rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, 3)).astype(np.float32)
    right = oracle("lstm")(x)
    with client.session("lstm", durability="stored") as session:
        session.steps(x[:2])
        with client.stream("lstm") as stream:
            (streamed,) = stream.open([session.id], mode="resume")
            assert (streamed.position, streamed.durability) == (2, "stored")
            assert np.array_equal(list(streamed.stream(x[2:4])), right[2:4])
            stream.disconnect()
            assert np.array_equal(streamed.step(x[4]), right[4])
    with pytest.raises(errors.SessionClosed):
        session.refresh()


def test_single_sessions_of_a_stream_may_be_refused(client: Any) -> None:
    x = np.ones((3, 3), np.float32)
    with client.stream("lstm") as stream:
        sessions = stream.open(3)
        ids = [session.id for session in sessions]
        client.session("lstm", ids[1], mode="resume").close()
        with pytest.raises(errors.SomeFailed, match="1 of the sessions failed, the one at index 1") as some:
            stream.step(sessions, x)
        assert [type(error) for error in some.value.errors.values()] == [errors.SessionClosed]
        assert np.any(some.value.outputs[0])
        assert not np.any(some.value.outputs[1])
        assert [session.position for session in sessions] == [1, 0, 1]
        with pytest.raises(errors.SessionClosed):
            sessions[1].step(x[0])
        with pytest.raises(errors.NonFiniteInput):
            sessions[0].step([np.inf, 0.0, 0.0])
        with pytest.raises(errors.SessionExists):
            stream.open([f"new {ids[1]}", ids[0]])
        with pytest.raises(errors.SessionUnknown):
            stream.open(["nobody"], mode="resume")
        with pytest.raises(errors.InvalidInput, match="once"):
            stream.step([sessions[0], sessions[0]], x[:2])
        with pytest.raises(errors.InvalidInput, match="2 sessions"):
            stream.step(sessions[:2], x)
        assert sessions[2].position == 1
    with pytest.raises(errors.ModelUnknown), client.stream("nothing") as stream:
        stream.open()
    with pytest.raises(errors.NotStreamable), client.stream("whole") as stream:
        stream.open()


def test_closed_and_foreign_sessions_are_refused(client: Any) -> None:
    with client.stream("lstm") as stream, client.stream("lstm") as other:
        one, two = stream.open(2)
        (three,) = other.open()
        one.close()
        with pytest.raises(errors.SessionClosed):
            one.step([1.0, 2.0, 3.0])
        with pytest.raises(errors.InvalidInput, match="belongs to another stream"):
            stream.step([three], np.ones((1, 3), np.float32))
        assert two.step([1.0, 2.0, 3.0]).shape == (2,)
        assert (two.position, three.position) == (1, 0)


def test_sessions_end_with_their_block_also_after_an_error(client: Any) -> None:
    ids = []

    def fail() -> None:
        with client.stream("lstm") as stream:
            ids.extend(session.id for session in stream.open())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with pytest.raises(errors.SessionClosed):
        client.session("lstm", ids[0], mode="resume")


def test_attached_session_stays_open_if_another_is_refused(client: Any) -> None:
    with client.session("lstm") as session:
        with client.stream("lstm") as stream, pytest.raises(errors.SessionUnknown):
            stream.open([session.id, "nobody"], mode="resume")
        assert session.refresh() == 0


def test_tasks_may_step_concurrently_on_one_stream(server: Running, oracle: Oracles, rng: np.random.Generator) -> None:
    x = rng.standard_normal((50, 8, 3)).astype(np.float32)

    async def run() -> tuple[list[np.ndarray], float]:
        async with AsyncClient(server.url) as client, client.stream("lstm") as stream:
            sessions = await stream.open(50)

            async def one(session: Any, steps: np.ndarray) -> np.ndarray:
                return np.array([y async for y in session.stream(steps)])

            return await asyncio.gather(*map(one, sessions, x))

    for steps, outputs in zip(x, asyncio.run(run()), strict=True):
        assert np.array_equal(outputs, oracle("lstm")(steps))


def test_outputs_of_a_cancelled_step_do_not_answer_the_next(
    server: Running, oracle: Oracles, rng: np.random.Generator
) -> None:
    """Only a retry of the cancelled step gets its outputs."""
    x = rng.standard_normal((3, 3)).astype(np.float32)
    right = oracle("lstm")(x)

    async def run() -> None:
        async with AsyncClient(server.url) as client, client.stream("lstm") as stream:
            (session,) = await stream.open()
            assert np.array_equal(await session.step(x[0]), right[0])
            with server.holding("lstm") as held:
                task = asyncio.create_task(session.step(x[1]))
                await asyncio.to_thread(held.reached.wait)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            with pytest.raises(errors.PayloadMismatch):
                await session.step(x[2])
            assert np.array_equal(await session.step(x[1]), right[1])
            assert np.array_equal(await session.step(x[2]), right[2])

    asyncio.run(run())


def test_cancelled_step_does_not_break_the_connection_for_other_tasks(
    server: Running, oracle: Oracles, rng: np.random.Generator
) -> None:
    """Even without retries, other tasks on the same connection get the outputs of their steps."""
    x = rng.standard_normal((2, 3)).astype(np.float32)
    right = oracle("lstm")(x)

    async def run() -> None:
        async with AsyncClient(server.url, retry_for=0) as client, client.stream("lstm") as stream:
            one, other = await stream.open(2)
            with server.holding("lstm") as held:
                cancelled, task = asyncio.create_task(one.step(x[0])), asyncio.create_task(other.step(x[0]))
                await asyncio.to_thread(held.reached.wait)
                cancelled.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await cancelled
                following = asyncio.create_task(one.step(x[0]))
            assert np.array_equal(await task, right[0])
            assert np.array_equal(await following, right[0])
            assert np.array_equal(await other.step(x[1]), right[1])

    asyncio.run(run())


def test_stream_belongs_to_its_opener(server: Running) -> None:
    with Client(server.url) as client, client.stream("lstm") as stream:
        (session,) = stream.open()
        assert repr(session).startswith("<StreamSession")
        assert session.step([1.0, 2.0, 3.0]).shape == (2,)
