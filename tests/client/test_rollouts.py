"""Rollouts through both clients, compared with the same steps one by one.

test_conformance.py covers broken connections and rollouts that end early.
"""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.replica import Replica, tiny_repository
from rollouts import sample
from serving import Running, SlowEngine
from waiting import until

from unroll.client import AsyncClient, errors
from unroll.client.rollout_calls import Map, On

SCALED = {
    "kind": "columns",
    "columns": [{"from": 1}, {"from": 0, "scale": -0.7, "offset": 0.1}, {"future": [0.5, 1.5, 2.5, 3.5]}],
}


def scaled(y: np.ndarray, step: int) -> np.ndarray:
    return np.array([y[1], float(y[0]) * -0.7 + 0.1, 0.5 + step]).astype(np.float32)


def by_hand(session: Any, y: np.ndarray, steps: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    found = []
    for i in range(steps):
        x = scaled(y, i)
        y = session.step(x)
        found.append((x, y))
    return found


def same(rolled: list[Any], right: list[tuple[np.ndarray, np.ndarray]]) -> bool:
    return len(rolled) == len(right) and all(
        np.array_equal(step.inputs, x) and np.array_equal(step.outputs, y)
        for step, (x, y) in zip(rolled, right, strict=True)
    )


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((5, 3)).astype(np.float32)


@pytest.mark.parametrize("durability", ["memory", "stored", "client"])
def test_rollout_equals_the_steps_one_by_one(client: Any, x: np.ndarray, durability: str) -> None:
    with client.session("lstm", durability=durability) as session:
        y = session.steps(x)[-1]
        rolled = list(session.rollout(4, map=SCALED))
        assert [step.position for step in rolled] == [6, 7, 8, 9]
        assert session.position == session.refresh() == 5
        copy = session.fork()
        assert same(list(copy.rollout(4, map=SCALED)), by_hand(session, y))
        assert same(rolled, by_hand(copy, y))


def test_applied_rollout_advances_the_session_once(client: Any, x: np.ndarray) -> None:
    with client.session("lstm") as session:
        y = session.steps(x)[-1]
        copy = session.fork()
        right = by_hand(copy, y)
        rolled = list(session.rollout(4, map=SCALED, on="session"))
        assert same(rolled, right)
        rolled[-1].outputs[:] = 0  # the caller owns these arrays
        assert session.position == session.refresh() == 9
        right = by_hand(copy, right[-1][1])  # continues from this client's last outputs
        assert same(list(session.rollout(4, map=SCALED, on="session")), right)
        assert np.array_equal(session.step(x[0]), copy.step(x[0]))


def test_rollout_starts_from_given_inputs_or_outputs(client: Any, x: np.ndarray) -> None:
    with client.session("lstm") as session, client.session("lstm") as other:
        y = session.steps(x)[-1]
        right = by_hand(session, y)
        first, *rest = other.rollout(4, map=SCALED, inputs=x)
        assert (first.position, other.position) == (5, 0)
        assert np.array_equal(first.inputs, x[-1])
        assert np.array_equal(first.outputs, y)
        assert same(rest, right)
        other.rewind(other.snapshot())
        with pytest.raises(errors.InvalidRequest, match="has not kept the outputs"):
            list(other.rollout(4, map=SCALED))
        other.steps(x)
        other.rewind(other.snapshot())
        assert same(list(other.rollout(4, map=SCALED, outputs=y)), right)


def test_tokens_several_inputs_and_outputs_without_time(client: Any, x: np.ndarray) -> None:
    with client.session("tokens") as session:
        logits = session.step(3)
        for step in session.rollout(6, map={"kind": "sample", "seed": 8, "top_k": 4}):
            assert step.inputs == sample(logits, step.position - 1, seed=8, top_k=4)
            logits = session.step(step.inputs)
            assert np.array_equal(step.outputs, logits)
    slope = {"kind": "identity", "output": "slope"}
    given = {"a": np.ones((2, 2), np.float32), "b": np.ones((2, 3), np.float32)}
    with client.session("two") as session:
        b = {"kind": "columns", "output": "level", "columns": [{"from": 0}] * 3}
        rolled = list(session.rollout(2, map={"a": slope, "b": b}, inputs=given))
        assert [step.position for step in rolled] == [2, 3, 4]
        assert np.array_equal(rolled[1].inputs["a"], rolled[0].outputs["slope"])
        outputs = session.steps(given)
        assert np.array_equal(rolled[0].outputs["level"], outputs["level"][-1])
    with client.session("last") as session:
        y = session.steps(x)
        first, *rest = client.session("last").rollout(4, map=SCALED, inputs=x)
        assert np.array_equal(first.outputs, y)
        assert same(rest, by_hand(session, y))


def test_invalid_rollouts_are_refused(client: Any, x: np.ndarray) -> None:
    with client.session("lstm") as session:
        session.steps(x)
        with pytest.raises(errors.MapInvalid, match="shape"):
            list(session.rollout(4, map="identity"))
        with pytest.raises(errors.InvalidInput, match="'x' has the shape"):
            list(session.rollout(4, map=SCALED, inputs=x[:, :2]))
        with pytest.raises(errors.InvalidInput, match="'y' has the shape"):
            list(session.rollout(4, map=SCALED, outputs=x[0]))
        client.session("lstm", session.id, mode="resume").step(x[0])
        with pytest.raises(errors.PositionTooOld):
            list(session.rollout(4, map=SCALED))
    with client.session("lstm", durability="client") as session, pytest.raises(errors.InvalidInput, match="on a fork"):
        list(session.rollout(4, map=SCALED, on="session", inputs=x))


def test_stream_rollout_equals_the_steps_one_by_one(client: Any, x: np.ndarray) -> None:
    with client.session("lstm") as session, client.stream("lstm") as stream:
        y = session.steps(x)[-1]
        one, two, other = stream.open(3)
        one.steps(x)
        two.steps(x)
        rolled = []
        for step in one.rollout(4, map=SCALED):
            other.step(x[0])
            rolled.append(step)
        assert [step.position for step in rolled] == [6, 7, 8, 9]
        assert (one.position, other.position) == (5, 4)
        right = list(session.rollout(4, map=SCALED))
        assert same(rolled, [(step.inputs, step.outputs) for step in right])
        assert same(list(two.rollout(4, map=SCALED, on="session")), by_hand(one, y))
        assert two.position == 9
        assert same(list(two.rollout(4, map=SCALED, on="session")), by_hand(one, right[-1].outputs))
        assert np.array_equal(two.step(x[0]), one.step(x[0]))
        first, *rest = other.rollout(4, map=SCALED, inputs=x[4:])
        assert first.position == 5
        other.step(x[4])
        assert same(rest, by_hand(other, first.outputs))


def test_refused_stream_rollout_keeps_the_stream_usable(client: Any, x: np.ndarray) -> None:
    with client.stream("lstm") as stream:
        one, two = stream.open(2)
        for session in (one, two):
            session.steps(x)
        with pytest.raises(errors.InvalidRequest, match="steps"):  # concerns the whole message
            list(one.rollout(0, map=SCALED))
        with pytest.raises(errors.MapInvalid, match="shape"):
            list(one.rollout(4, map="identity"))
        with pytest.raises(errors.InvalidInput, match="'x' has the shape"):
            list(one.rollout(4, map=SCALED, inputs=x[:, :2]))
        rolling = one.rollout(4, map=SCALED)
        assert next(iter(rolling)).position == 6
        with pytest.raises(errors.InvalidInput, match="already has a rollout"):
            list(one.rollout(4, map=SCALED))
        client.session("lstm", one.id, mode="resume").step(x[0])
        with pytest.raises(errors.PositionError):  # from the step, not from the rollout
            one.step(x[1])
        assert [step.position for step in rolling] == [7, 8, 9]
        with pytest.raises(errors.PositionTooOld):
            list(one.rollout(4, map=SCALED))
        rolling = two.rollout(4, map=SCALED)
        next(iter(rolling))
        two.close()
        rolling.close()
        with pytest.raises(errors.SessionClosed):
            list(two.rollout(4, map=SCALED))


async def test_stream_rollout_continues_after_its_server_is_killed(tmp_path: Path) -> None:
    server = Replica("server", tiny_repository(tmp_path), tmp_path, "--store", f"file://{tmp_path}/store")
    try:
        await server.start()
        async with AsyncClient(f"http://127.0.0.1:{server.port}") as client, client.stream("tiny") as stream:
            session, other = await stream.open(2, durability="stored")
            features = stream.model.inputs[0].shape[0]
            fed: Map = {"kind": "columns", "columns": [{"from": 0, "scale": 0.5}] * features}
            for each in (session, other):
                await each.steps(np.ones((3, features), np.float32))
            rolled = []
            async for step in session.rollout(1000, map=fed, on="session"):
                rolled.append(step)
                if len(rolled) == 1:
                    server.kill()
                    await server.start()
            assert session.position == 1003
            over_http = await client.session("tiny", other.id, mode="resume")
            right = [(step.inputs, step.outputs) async for step in over_http.rollout(1000, map=fed)]
            assert same(rolled, right)  # type: ignore[arg-type]
            await session.step(np.ones(features, np.float32))  # the server is at the same position
    finally:
        server.kill()


@pytest.mark.parametrize("on", ["fork", "session"])
def test_caller_that_stops_early_ends_the_stream_rollout(client: Any, server: Running, x: np.ndarray, on: On) -> None:
    loop, growing = server.model("lstm").loop, {"kind": "columns", "columns": [{"from": 0}] * 3}
    with client.stream("lstm") as stream:
        (session,) = stream.open()
        y = session.steps(x)[-1]
        with SlowEngine(loop, 0.005):
            rolling = session.rollout(4096, map=growing, on=on)
            assert next(rolling).position == 6
            rolling.close()
            until(lambda: not len(loop.scheduler.rollouts))
        right = list(
            session.rollout(4, map=SCALED, outputs=y)
        )  # late steps of the first rollout must not count as steps of this one
        assert same(right, by_hand(session, y))


def test_unopened_session_reports_how_to_open_it(server: Running) -> None:
    async def use() -> None:
        async with AsyncClient(server.url) as client:
            session = client.session("lstm")
            for call in (session.step([1, 2, 3]), session.refresh(), session.snapshot(), session.close()):
                with pytest.raises(errors.InvalidInput, match="the session is not open yet: write `session = await"):
                    await call
            with pytest.raises(errors.InvalidInput, match="not open yet"):
                _ = session.position
            assert repr(session) == "<AsyncSession, not open>"
            with pytest.raises(errors.InvalidInput, match="the stream is not open yet: write `async with"):
                await client.stream("lstm").open()

    asyncio.run(use())
