"""Requests that concern all workers: the receiving worker forwards them to every worker, and answers for all."""

import asyncio
import re
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from unroll.service.api.request import read_request

#: Maximum size of the body of such a request.
MOST_BYTES = 2**16
#: Seconds to wait for a worker, which may be busy or starting, and for one that loads models.
_PATIENCE, _PATIENCE_OF_OPERATORS = 2.0, 600.0
_FORWARDED = (b"authorization", b"x-api-key")
#: Media type of Prometheus's text format.
METRICS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
#: The name of a sample, and the brace if it has labels.
_SAMPLE = re.compile(r"(\w+)(\{?)")
_UP = "# HELP unroll_worker_up 1 if the worker answers.\n# TYPE unroll_worker_up gauge\n"


@dataclass(frozen=True, slots=True)
class WorkerAnswer:
    status: int
    media_type: str | None
    body: bytes


#: The answers in worker order; None for a worker that did not answer.
Answers = Sequence[WorkerAnswer | None]


@dataclass(frozen=True, slots=True)
class AllWorkers:
    """sockets: on which each worker listens for the others, in worker order. ports: shared by all workers."""

    sockets: Sequence[Path]
    ports: Collection[int]

    async def ask(self, http: Request) -> Answers:
        request = await read_request(http.scope, http.receive, MOST_BYTES)
        headers = [b"%b: %b\r\n" % (name, request.headers[name]) for name in _FORWARDED if name in request.headers]
        head = b"%b %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%bContent-Length: %d\r\n\r\n" % (
            http.method.encode(),
            http.scope["raw_path"],
            b"".join(headers),
            len(request.body),
        )
        patience = _PATIENCE if http.method == "GET" else _PATIENCE_OF_OPERATORS
        return await asyncio.gather(*[_answer(socket, head + request.body, patience) for socket in self.sockets])


def route_class(workers: AllWorkers | None, join: Callable[[Answers], Response]) -> type[APIRoute]:
    """Routes that answer for all workers on a shared port, and for this process elsewhere. join: merges the answers."""
    if workers is None:
        return APIRoute
    ask, ports = workers.ask, workers.ports

    class RouteOfAll(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle_here = super().get_route_handler()

            async def handle(http: Request) -> Response:
                return join(await ask(http)) if http.scope["server"][1] in ports else await handle_here(http)

            return handle

    return RouteOfAll


async def _answer(socket: Path, request: bytes, patience: float) -> WorkerAnswer | None:
    try:
        async with asyncio.timeout(patience):
            reader, writer = await asyncio.open_unix_connection(socket)
            with closing(writer):
                writer.write(request)
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    except OSError:  # TimeoutError is one
        return None
    if not head:
        return None
    media_type = re.search(rb"(?i)\r\ncontent-type: ([^\r]*)", head)
    return WorkerAnswer(int(head[9:12]), None if media_type is None else media_type[1].decode(), body)


def done_by_all(answers: Answers) -> Response:
    """An operation is done when every worker has done it. Otherwise, return the answer of a worker that has not.

    Raises HTTPException.
    """
    answered = [answer for answer in answers if answer is not None]
    worst = max(answered, key=lambda answer: answer.status, default=None)
    missing = [number for number, answer in enumerate(answers, 1) if answer is None]
    if worst is None or (missing and worst.status < HTTPStatus.BAD_REQUEST):
        raise HTTPException(504, f"workers {missing} do not answer; the others are done: send the request again")
    return Response(worst.body, worst.status, media_type=worst.media_type)


def metrics_of_all(answers: Answers) -> Response:
    """Merge the metrics of all workers. Each sample gets the label `worker`."""
    families: dict[str, list[str]] = {_UP: []}
    for number, answer in enumerate(answers, 1):
        text = answer.body.decode() if answer is not None and answer.status == HTTPStatus.OK else None
        families[_UP].append(f'unroll_worker_up{{worker="{number}"}} {int(text is not None)}.0\n')
        for family in re.findall(r"(?ms)^# HELP .*?(?=^# HELP |\Z)", text or ""):
            lines = re.findall(r".*\n", family)  # labels may contain other line breaks
            labelled = [_SAMPLE.sub(partial(_label, number), line, count=1) for line in lines[2:]]
            families.setdefault("".join(lines[:2]), []).extend(labelled)
    merged = "".join(head + "".join(samples) for head, samples in families.items())
    return Response(merged, media_type=METRICS_TEXT)


def _label(number: int, sample: re.Match[str]) -> str:
    return f'{sample[1]}{{worker="{number}"' + ("," if sample[2] else "}")
