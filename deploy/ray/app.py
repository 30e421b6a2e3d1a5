"""Unroll as a Ray Serve application: replicas behind Ray's proxy, which share their sessions through Redis.

    serve run deploy.ray.app:app repository=examples/repository store=redis://127.0.0.1:6379/0

The arguments are the settings of `unroll serve`. Ray's proxy knows no sessions and sends each step to any replica,
so sessions have to be durable; it also costs more than the model does, so take it where Ray runs already.
"""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from unroll.service.app import build
from unroll.service.settings import Settings


@serve.deployment(
    num_replicas=2,
    # Ray's default of 5 would leave nothing to batch.
    max_ongoing_requests=1024,
    # What runs is finished before a replica goes.
    graceful_shutdown_timeout_s=15,
    health_check_period_s=2,
    logging_config=LoggingConfig(enable_access_log=False),
)
@serve.ingress()
class Unroll:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._application, self._server = build(Settings(**settings))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray builds the application in each replica: a loaded model cannot be sent there."""
        return self._application

    def check_health(self) -> None:
        """Ray replaces a replica whose health check raises."""
        if not self._server.ready:
            raise RuntimeError("a model's loop has ended")


def app(settings: dict[str, Any]) -> Application:
    """For `serve run` and for a Serve configuration's `import_path`. Raises for a setting that does not exist."""
    Settings(**settings)
    if "store" not in settings:
        raise ValueError("two replicas that share no store would each know half of the sessions: set store=redis://...")
    return Unroll.bind(settings)
