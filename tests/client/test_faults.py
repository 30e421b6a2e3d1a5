"""Clients survive connections broken at every point, killed servers and temporary refusals."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faults import client_kills
from faults.proxy import Fault, FaultProxy
from faults.replica import free_port
from serving import Oracle, Running

from unroll.client import AsyncClient, Client, errors
from unroll.client.retries import Retries, RetryPolicy


async def test_connections_may_break_at_every_point(
    server: Running, oracle: Callable[[str], Oracle], rng: np.random.Generator
) -> None:
    """Each step is applied once despite truncated requests and lost, truncated or missing replies."""
    x = rng.standard_normal((4, 25, 3)).astype(np.float32)
    chance = random.Random(1)
    weights = {Fault.NONE: 12, Fault.CUT_REQUEST: 1, Fault.LOSE_REPLY: 1, Fault.CUT_REPLY: 1, Fault.SILENCE: 0.2}

    async with FaultProxy(server.port, lambda: chance.choices([*weights], [*weights.values()])[0]) as proxy:
        options = {"timeout": 1.0, "retry_for": 200.0}
        url = f"http://127.0.0.1:{proxy.port}"

        def over_http() -> list[np.ndarray]:
            with Client(url, **options) as client, client.session("lstm") as session:
                return list(session.stream(x[0]))

        def over_stream() -> list[np.ndarray]:
            with Client(url, **options) as client, client.stream("lstm") as stream:
                (session,) = stream.open()
                return list(session.stream(x[1]))

        async def asynchronous() -> list[list[np.ndarray]]:
            async with AsyncClient(url, **options) as client, client.stream("lstm") as stream:
                (streamed,) = await stream.open()
                async with client.session("lstm") as session:
                    return [[y async for y in session.stream(x[2])], [y async for y in streamed.stream(x[3])]]

        one, two, (three, four) = await asyncio.gather(
            asyncio.to_thread(over_http), asyncio.to_thread(over_stream), asynchronous()
        )
    for steps, outputs in zip(x, (one, two, three, four), strict=True):
        assert np.array_equal(outputs, oracle("lstm")(steps))


async def test_clients_survive_a_killed_server(tmp_path: Path) -> None:
    """A short version of `make client-test`."""
    result = await client_kills.run(tmp_path, 7, kills=2, of_each=2)
    assert result.faults == []
    assert result.clients == 8
    assert result.steps > 20


def test_headers_cannot_carry_a_second_request() -> None:
    for value in ("a\r\nb: c", "\x00", "€"):
        with pytest.raises(errors.InvalidInput, match="line break"):
            Client("http://127.0.0.1", headers={"x": value})
        with pytest.raises(errors.InvalidInput, match="line break"):
            AsyncClient("http://127.0.0.1", api_key=value)


def test_absent_server_is_reported() -> None:
    with Client(f"http://127.0.0.1:{free_port()}", retry_for=0.2) as client:
        with pytest.raises(errors.ConnectionFailed, match="did not answer") as failed:
            client.models()
        assert isinstance(failed.value, ConnectionError)


def test_a_request_that_fails_for_a_second_leaves_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    retries = Retries(RetryPolicy("http://server", 60.0, lambda: 0.0))
    assert sum(retries.pause() or 0 for _ in range(4)) < 1
    assert caplog.messages == []
    for _ in range(4):
        retries.reconnect(ConnectionRefusedError("refused"))
    assert caplog.messages == ["http://server: 5 attempts failed (refused); retrying for 60 s"]


def test_temporary_refusal_is_retried_until_the_timeout(server: Running) -> None:
    """Both over HTTP and on a stream, the error is raised in the end, and the step can be sent again."""
    with Client(server.url, retry_for=0.3) as client, client.stream("gru") as stream:
        (streamed,) = stream.open()
        with client.session("gru") as session:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(server.model("gru").scheduler.admission, "_max_queue", 0)
                for stepping in (session, streamed):
                    with pytest.raises(errors.QueueFull):
                        stepping.step([1.0, 2.0, 3.0])
                    assert stepping.position == 0
            assert session.step([1.0, 2.0, 3.0]).tolist() == streamed.step([1.0, 2.0, 3.0]).tolist()
