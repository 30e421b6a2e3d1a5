"""Requests that concern all workers: the receiving worker forwards them to every worker, and answers for all."""

import asyncio
import re
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import closing
from dataclasses import dataclass, field
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
_UP = "unroll_worker_up 1 if the worker answers.\n# TYPE unroll_worker_up gauge"


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
    _reading: dict[bytes, asyncio.Future[list[WorkerAnswer | None]]] = field(default_factory=dict)

    async def ask(self, http: Request) -> Answers:
        """Forward a request. Equal requests that only read share the answers, since workers limit connections."""
        request = await read_request(http.scope, http.receive, MOST_BYTES)
        headers = [b"%b: %b\r\n" % (name, request.headers[name]) for name in _FORWARDED if name in request.headers]
        sent = b"%b %b HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n%bContent-Length: %d\r\n\r\n%b" % (
            http.method.encode(),
            http.scope["raw_path"],
            b"".join(headers),
            len(request.body),
            request.body,
        )
        if http.method != "GET":
            return await self._ask(sent, _PATIENCE_OF_OPERATORS)
        reading = self._reading.get(sent)
        if reading is None:
            reading = self._reading[sent] = self._ask(sent, _PATIENCE)
            reading.add_done_callback(lambda _: self._reading.pop(sent))
        return await asyncio.shield(reading)

    def _ask(self, request: bytes, patience: float) -> asyncio.Future[list[WorkerAnswer | None]]:
        return asyncio.gather(*[_answer(socket, request, patience) for socket in self.sockets])


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
    fields = dict(re.findall(r"\r\n([\w-]+): ([^\r]*)", head.decode("latin-1")))
    if fields.get("content-length") != str(len(body)):
        return None  # the worker ended before its answer
    return WorkerAnswer(int(head[9:12]), fields.get("content-type"), body)


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
        families[_UP].append(f'unroll_worker_up{{worker="{number}"}} {int(text is not None)}.0')
        for family in f"\n{text or ''}".rstrip("\n").split("\n# HELP ")[1:]:
            described, kind, *samples = family.split("\n")  # labels may contain other line breaks
            families.setdefault(f"{described}\n{kind}", []).extend(_labelled(line, number) for line in samples)
    merged = "".join("\n".join([f"# HELP {head}", *samples, ""]) for head, samples in families.items())
    return Response(merged, media_type=METRICS_TEXT)


def _labelled(sample: str, number: int) -> str:
    if "{" in sample:
        return sample.replace("{", f'{{worker="{number}",', 1)
    return sample.replace(" ", f'{{worker="{number}"}} ', 1)
