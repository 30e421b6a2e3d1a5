"""The inference routes: what each path begins, and how its errors look. Called by the transport, and by FastAPI."""

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

#: A path, split at its slashes.
Path = list[str]


@dataclass(frozen=True, slots=True)
class Route:
    """name: as metrics have it. fixed: the parts of its paths that are always the same, by their place.

    begin: starts the work on a request; raises UnrollError. failure: the error's form.
    """

    name: str
    parts: int
    fixed: dict[int, str]
    begin: Callable[[Server, Path, Request, Respond], Cancel]
    failure: Callable[[UnrollError], Answer]

    def matches(self, path: Path) -> bool:
        return len(path) == self.parts and all(path[i] == part for i, part in self.fixed.items())

    def handle(self, server: Server, path: Path, request: Request, respond: Respond) -> Cancel:
        """Begin; `respond` is called once whatever happens."""
        try:
            return self.begin(server, path, request, respond)
        except UnrollError as error:
            respond(self.failure(error))
        except Exception as error:
            _log.error("an unforeseen error", route=self.name, exc_info=error)
            respond(self.failure(EngineFailed("the server failed on this request; its log says why")))
        return nothing_to_cancel


_STEPS = Route(
    "v1/steps",
    7,
    {1: "v1", 2: "models", 4: "sessions"},
    lambda server, path, request, respond: steps(server, path[3], path[5], request, respond),
    problem,
)
_SEQUENCES = Route(
    "v1/sequences",
    5,
    {1: "v1", 2: "models"},
    lambda server, path, request, respond: sequences(server, path[3], request, respond),
    problem,
)
_INFER = Route(
    "v2/infer",
    5,
    {1: "v2", 2: "models"},
    lambda server, path, request, respond: infer(server, path[3], None, request, respond),
    open_inference_error,
)
_INFER_VERSION = Route(
    "v2/infer",
    7,
    {1: "v2", 2: "models", 4: "versions"},
    lambda server, path, request, respond: infer(server, path[3], path[5], request, respond),
    open_inference_error,
)

#: By the last part of the path.
_ROUTES = {"steps": (_STEPS,), "sequences": (_SEQUENCES,), "infer": (_INFER, _INFER_VERSION)}


def find(path: Path) -> Route | None:
    """The inference route of a POST to this path, if it is one."""
    for route in _ROUTES.get(path[-1], ()):
        if route.matches(path):
            return route
    return None


async def answer(server: Server, path: str, request: Request) -> Answer:
    """The answer to a POST to the path of an inference route; cancelling the caller cancels the work."""
    parts = path.split("/")
    route = find(parts)
    assert route is not None, path
    started = perf_counter()
    found = await answered(lambda respond: route.handle(server, parts, request, respond))
    server.count(route.name, found.status, perf_counter() - started)
    return found
