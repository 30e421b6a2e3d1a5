"""Merging the answers of all workers into one."""

import asyncio
from pathlib import Path

import pytest
from fastapi import HTTPException, Request
from serving import metrics

from unroll.service.api.all_workers import AllWorkers, WorkerAnswer, _answer, done_by_all, metrics_of_all
from unroll.service.telemetry.metrics import Collector, RequestFigures, StoreFigures

_SCRAPE = b"GET /metrics HTTP/1.1\r\n\r\n"


def test_samples_of_all_workers_are_kept_apart_and_their_families_together() -> None:
    texts = {}
    for number in (1, 2):
        requests = {'a "route" { of } words': RequestFigures()}
        requests['a "route" { of } words'].observe(200, 0.5 * number)
        texts[number] = b"".join(Collector(list, requests, (), (), dict, StoreFigures()).exposition())
    merged = bytes(metrics_of_all([*[WorkerAnswer(200, None, text) for text in texts.values()], None]).body).decode()
    heads = [line for line in merged.splitlines() if line.startswith("# HELP")]
    assert len(heads) == len(set(heads)) > 5
    found = metrics(merged)
    for number, text in texts.items():
        worker = {("worker", str(number))}
        assert {(name, labels - worker): v for (name, labels), v in found.items() if worker <= labels} == {
            **metrics(text.decode()),
            ("unroll_worker_up", frozenset()): 1.0,
        }
    assert found["unroll_worker_up", frozenset({("worker", "3")})] == 0.0


def test_operation_fails_unless_every_worker_did_it() -> None:
    done, refused = WorkerAnswer(200, None, b""), WorkerAnswer(404, "application/json", b"{}")
    assert done_by_all([done, done]).status_code == 200
    answer = done_by_all([done, refused, None])
    assert (answer.status_code, answer.body, answer.media_type) == (404, b"{}", "application/json")
    for answers in ([None, done], [None]):
        with pytest.raises(HTTPException, match=r"workers \[1\] do not answer") as missing:
            done_by_all(answers)
        assert missing.value.status_code == 504


async def test_a_worker_that_is_not_there(tmp_path: Path) -> None:
    assert await _answer(tmp_path / "1", _SCRAPE, 60.0) is None


@pytest.mark.parametrize(("body", "complete"), [(b"whole", True), (b"half", False), (b"", False)])
async def test_an_answer_that_breaks_off_is_none(tmp_path: Path, body: bytes, complete: bool) -> None:
    async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\n" + body)
        writer.close()

    async with await asyncio.start_unix_server(end, tmp_path / "1"):
        answer = await _answer(tmp_path / "1", _SCRAPE, 60.0)
    assert answer == (WorkerAnswer(200, "text/plain", body) if complete else None)


async def test_scrapes_at_once_ask_each_worker_once(tmp_path: Path) -> None:
    """A stopped worker answers none for seconds, and has places for few connections."""
    asked = list[bytes]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(2))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"{}"}  # some clients send one with GET

    def request(key: bytes) -> Request:
        headers = [(b"authorization", key)]
        return Request({"type": "http", "method": "GET", "raw_path": b"/metrics", "headers": headers}, receive)

    workers = AllWorkers([tmp_path / "1", tmp_path / "2"], ())
    async with await asyncio.start_unix_server(answer, tmp_path / "1"):
        answers = await asyncio.gather(*[workers.ask(request(key)) for key in [b"a", b"b"] * 20])
        assert answers == [[WorkerAnswer(200, "text/plain", b""), None]] * 40
        await workers.ask(request(b"a"))
    assert len(asked) == 3, "one for each key, and one later"
