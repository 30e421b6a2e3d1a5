"""Unroll as a Ray Serve application: replicas behind Ray's proxy share their sessions through Redis.

    serve run deploy.ray.app:app repository=examples/repository store=redis://127.0.0.1:6379/0

The arguments are the settings of `unroll serve`. Ray's proxy does not route by session and sends each step to any
replica, so sessions must be durable. The proxy also costs more than the model: use it only where Ray already runs.
"""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from unroll.service.app import build
from unroll.service.settings import Settings
from unroll.service.telemetry import logs


@serve.deployment(
    num_replicas=2,
    # Ray's default of 5 leaves nothing to batch.
    max_ongoing_requests=1024,
    # A replica completes running work before it stops.
    graceful_shutdown_timeout_s=15,
    health_check_period_s=2,
    logging_config=LoggingConfig(enable_access_log=False),
)
@serve.ingress()
class Unroll:
    def __init__(self, settings: dict[str, Any]) -> None:
        logs.configure_embedded()
        self._application, self._server = build(Settings(**settings))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called in each replica, because a loaded model cannot be pickled."""
        return self._application

    def check_health(self) -> None:
        """Raise if the replica must be replaced."""
        if not self._server.ready:
            raise RuntimeError("a model's loop has ended")


def app(settings: dict[str, Any]) -> Application:
    """Entry point for `serve run` and a Serve configuration's `import_path`. Raises for an unknown setting."""
    Settings(**settings)
    if "store" not in settings:
        raise ValueError(
            "replicas without a shared store would each know only their own sessions: set store=redis://..."
        )
    return Unroll.bind(settings)  # type: ignore[attr-defined]  # the decorator adds it
