"""The inference routes: what each path begins, and how its errors look. Called by the transport, and by FastAPI."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import structlog

from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import open_inference_error, problem
from unroll.service.api.infer import infer
from unroll.service.api.parameters import split_reference
from unroll.service.api.request import ATTEMPTS, Answer, Cancel, Request, Respond, answered, nothing_to_cancel
from unroll.service.api.steps import sequences, steps
from unroll.service.catalog.keeper import Keeper
from unroll.service.core.errors import EngineFailed, NeedsStoreLookup, SessionContended, UnrollError

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
    begin: Callable[[AppState, Path, Request, Respond], Cancel]
    failure: Callable[[UnrollError], Answer]

    def matches(self, path: Path) -> bool:
        return len(path) == self.parts and all(path[i] == part for i, part in self.fixed.items())

    def handle(self, app: AppState, path: Path, request: Request, respond: Respond) -> Cancel:
        """Begin; `respond` is called once whatever happens."""
        if app.catalog.keeper is not None:
            return _Attempts(self, app.catalog.keeper, app, path, request, respond).begin()
        return self.attempt(app, path, request, respond)

    def attempt(self, app: AppState, path: Path, request: Request, respond: Respond) -> Cancel:
        """Raises NeedsStoreLookup."""
        try:
            return self.begin(app, path, request, respond)
        except NeedsStoreLookup:
            raise
        except UnrollError as error:
            respond(self.failure(error))
        except Exception as error:
            _log.error("an unforeseen error", route=self.name, exc_info=error)
            respond(self.failure(EngineFailed("the server failed on this request; its log says why")))
        return nothing_to_cancel


class _Attempts:
    """A request that may have to be begun anew, since its session is in the store, or was moved on elsewhere."""

    def __init__(
        self, route: Route, keeper: Keeper, app: AppState, path: Path, request: Request, respond: Respond
    ) -> None:
        self._route = route
        self._keeper = keeper
        self._app = app
        self._path = path
        self._request = Request(request.headers, request.body)  # who gave us the other uses it again
        self._request.again = self._again
        self._respond = respond
        self._cancel: Cancel = nothing_to_cancel
        self._left = ATTEMPTS
        self._over = False

    def begin(self) -> Cancel:
        try:
            cancel = self._route.attempt(self._app, self._path, self._request, self._finish)
            if not self._over:
                self._cancel = cancel
        except NeedsStoreLookup as away:
            if not self._again(away.session_id):
                error = SessionContended(f"session {away.session_id!r} is moved on by others all the time", 0.1)
                self._finish(self._route.failure(error))
        return self.cancel

    def cancel(self) -> None:
        self._over = True
        self._cancel()

    def _finish(self, answer: Answer) -> None:
        """Answer, and let go of what would keep this alive until the garbage is collected."""
        self._over = True
        self._cancel, self._request.again = nothing_to_cancel, None
        self._respond(answer)

    def _again(self, session_id: str) -> bool:
        if not self._left:
            return False
        self._left -= 1
        self._cancel = nothing_to_cancel
        self._keeper.fetch(split_reference(self._path[3])[0], session_id, self._looked_up)
        return True

    def _looked_up(self, error: UnrollError | None) -> None:
        if self._over:
            return
        if error is not None:
            self._finish(self._route.failure(error))
            return
        self.begin()


_STEPS = Route(
    "v1/steps",
    7,
    {1: "v1", 2: "models", 4: "sessions"},
    lambda app, path, request, respond: steps(app, path[3], path[5], request, respond),
    problem,
)
_SEQUENCES = Route(
    "v1/sequences",
    5,
    {1: "v1", 2: "models"},
    lambda app, path, request, respond: sequences(app, path[3], request, respond),
    problem,
)
_INFER = Route(
    "v2/infer",
    5,
    {1: "v2", 2: "models"},
    lambda app, path, request, respond: infer(app, path[3], None, request, respond),
    open_inference_error,
)
_INFER_VERSION = Route(
    "v2/infer",
    7,
    {1: "v2", 2: "models", 4: "versions"},
    lambda app, path, request, respond: infer(app, path[3], path[5], request, respond),
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


async def answer(app: AppState, path: str, request: Request) -> Answer:
    """The answer to a POST to the path of an inference route; cancelling the caller cancels the work."""
    parts = path.split("/")
    route = find(parts)
    assert route is not None, path
    started = perf_counter()
    found = await answered(lambda respond: route.handle(app, parts, request, respond))
    app.count(route.name, found.status, perf_counter() - started)
    return found
