"""`unroll serve`: settings, logs, application, uvicorn."""

import gc
import signal
import sys

import structlog
import uvicorn
from pydantic import ValidationError

from service import app
from service.catalog.catalog import CatalogError
from service.core.errors import UnrollError
from service.engine.runner import DeviceUnavailable
from service.settings import Settings
from service.telemetry import logs
from service.transport.uvicorn_config import uvicorn_config


def main(argv: list[str]) -> int:
    try:
        settings = Settings.from_arguments(argv)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            where = "".join(f"--{part}: ".replace("_", "-") for part in problem["loc"][:1])
            print(f"unroll serve: {where}{problem['msg']}", file=sys.stderr)
        return 2
    logs.configure(settings.log_level)
    log = structlog.get_logger(__name__)
    try:
        application, server = app.build(settings)
    except (CatalogError, DeviceUnavailable, UnrollError, OSError, ValueError) as error:
        log.error("not started", reason=str(error))
        return 1
    config = uvicorn_config(application, server, settings.host, settings.port)
    # What was built so far stays; and what a step allocates is freed by counting references, not by a collection.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    # uvicorn handles these while it runs, and raises them once more when it has shut down in order.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGHUP, lambda *_: server.catalog.request_rescan())
    log.info("serving", host=settings.host, port=settings.port, repository=str(settings.repository))
    uvicorn.Server(config).run()
    return 1 if server.crashed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
