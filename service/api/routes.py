"""The inference routes: what each path begins, and how its errors look. Called by the transport, and by FastAPI."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import structlog

from service.api.errors import open_inference_error, problem
from service.api.http import Answer, Cancel, Request, Respond, answered, nothing_to_cancel
from service.api.infer import infer
from service.api.server import Server
from service.api.steps import sequences, steps
from service.core.errors import EngineFailed, UnrollError

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Route:
    """name: as metrics have it. begin: starts the work on a request; raises UnrollError. failure: the error's form."""

    name: str
    begin: Callable[[Server, Request, Respond], Cancel]
    failure: Callable[[UnrollError], Answer]

    def handle(self, server: Server, request: Request, respond: Respond) -> Cancel:
        """Begin; `respond` is called once whatever happens."""
        try:
            return self.begin(server, request, respond)
        except UnrollError as error:
            respond(self.failure(error))
        except Exception as error:
            _log.error("an unforeseen error", route=self.name, exc_info=error)
            respond(self.failure(EngineFailed("the server failed on this request; its log says why")))
        return nothing_to_cancel

    async def answer(self, server: Server, request: Request) -> Answer:
        """For who can wait; cancelling the caller cancels the work."""
        started = perf_counter()
        answer = await answered(lambda respond: self.handle(server, request, respond))
        server.count(self.name, answer.status, perf_counter() - started)
        return answer


def steps_route(model: str, session_id: str) -> Route:
    return Route("v1/steps", lambda server, *rest: steps(server, model, session_id, *rest), problem)


def sequences_route(model: str) -> Route:
    return Route("v1/sequences", lambda server, *rest: sequences(server, model, *rest), problem)


def infer_route(model: str, version: str | None = None) -> Route:
    return Route("v2/infer", lambda server, *rest: infer(server, model, version, *rest), open_inference_error)


@functools.lru_cache(maxsize=4096)
def find(path: str) -> Route | None:
    """The inference route of a POST to this path, if it is one."""
    match path.split("/"):
        case ["", "v1", "models", model, "sessions", session_id, "steps"]:
            return steps_route(model, session_id)
        case ["", "v1", "models", model, "sequences"]:
            return sequences_route(model)
        case ["", "v2", "models", model, "infer"]:
            return infer_route(model)
        case ["", "v2", "models", model, "versions", version, "infer"]:
            return infer_route(model, version)
    return None
