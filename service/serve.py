"""`unroll serve`: settings, logs, application, uvicorn."""

import asyncio
import gc
import os
import signal
import socket
from collections.abc import Sequence
from functools import partial
from threading import Event

import structlog

from unroll.service import app
from unroll.service.access.certificate import Tls
from unroll.service.core.errors import StoreUnavailable, UnrollError
from unroll.service.engine.runner import DeviceUnavailable
from unroll.service.models.contents import RepositoryError
from unroll.service.settings import Settings
from unroll.service.store.description import where_sessions_are
from unroll.service.store.embedded_store import EmbeddedStoreConfig
from unroll.service.store.interface import StoreRefused
from unroll.service.telemetry import logs
from unroll.service.transport.connections import ConnectionLimits
from unroll.service.transport.server import DrainingServer
from unroll.service.transport.uvicorn_config import operator_config, uvicorn_config
from unroll.service.workers import Worker, bind_for_operator, supervise

_EXPOSED = (
    "every user of this machine can read it in the process list: use @FILE, the environment, or the file of --config"
)


def main(settings: Settings, exposed: Sequence[str] = ()) -> int:
    """Serve until a signal arrives.

    Args:
        exposed: Flags that contain secrets.

    Returns:
        0 after an orderly shutdown, 1 if the server cannot start or has failed.
    """
    _open_standard_descriptors()
    worker = Worker.inherited()
    rescan = _catch_signals()
    logs.configure(settings.log_level, **({} if worker is None else {"worker": worker.number}))
    log = structlog.get_logger(__name__)
    if worker is None:
        for flag in exposed:
            log.warning("secret in a flag", flag=flag, reason=_EXPOSED)
    operator_address = settings.admin_host, settings.admin_port
    if settings.workers > 1 and worker is None:
        scheme = "http" if settings.tls_cert is None else "https"
        return supervise(settings.host, settings.port, settings.workers, scheme, operator_address)
    limits = ConnectionLimits.of(settings)
    try:
        files = settings.tls_files()
        tls = None if files is None else Tls(files)
        if worker is None:
            _check_address(settings.host, settings.port)
        asyncio.run(_check_store(settings))
        if worker is None or worker.number == 1:
            where = where_sessions_are(settings.store_config(), settings.state_file)
            log.info("sessions", durability=settings.default_durability, **asyncio.run(where))
        shared = () if worker is None else (worker.all(settings.workers), worker.ticket_secret)
        application, state = app.build(settings, None, *shared)
        listeners = None if worker is None else worker.listeners(settings.host, settings.worker_port)
        operator_listeners = bind_for_operator(*operator_address) if worker is None else worker.operator_listeners()
        config = uvicorn_config(application, state, settings.host, settings.port, limits, tls)
    except (RepositoryError, DeviceUnavailable, StoreRefused, UnrollError, OSError, ValueError) as error:
        log.error("not started", reason=str(error))
        return 1
    application.openapi()  # warm up: the first call takes a tenth of a second
    operator = None
    if operator_listeners:
        application.state.operator.openapi()
        operator = operator_config(config, application.state.operator, state, limits), operator_listeners
    _spare_the_collector()
    terminate = partial(signal.raise_signal, signal.SIGTERM)
    on_started = None if worker is None else partial(worker.serving, terminate)
    draining = DrainingServer(config, state, settings.drain_delay, settings.drain_timeout, on_started, operator)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, draining.handle_exit)

    def read_again(*_: object) -> None:
        state.gate.request_reload()
        state.repository.request_rescan()
        if tls is not None:
            tls.request_reload()

    signal.signal(signal.SIGHUP, read_again)
    if rescan.is_set():
        read_again()
    log.info("serving", host=settings.host, port=settings.port, repository=str(settings.repository))
    draining.run(listeners)
    _ignore_late_signals()
    return 1 if state.crashed or state.failed else 0


def _spare_the_collector() -> None:
    """Freeze existing objects and collect rarely: they stay anyway, and reference counting frees those of steps."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _ignore_late_signals() -> None:
    """Ignore signals while the interpreter exits, so that they do not change the exit status."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _open_standard_descriptors() -> None:
    """Ensure that descriptors 0 to 2 are open, so that no file or socket gets them: libraries print there."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def _check_address(host: str, port: int) -> None:
    """Check that the server can listen, before the models are loaded. Raises OSError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot listen on {host}, port {port}: {reason}; see --host and --port") from error


async def _check_store(settings: Settings) -> None:
    """Check that a Redis can work as configured, before the models are loaded. Raises StoreRefused."""
    config = settings.store_config()
    if config is not None and not isinstance(config, EmbeddedStoreConfig):
        from unroll.service.store.redis_store import RedisStore  # imported late: the client takes megabytes

        store = RedisStore(config)
        try:
            await store.check()
        except StoreUnavailable:
            pass  # it may answer later
        finally:
            await store.stop()


def _catch_signals() -> Event:
    """Until the server runs, make SIGTERM exit cleanly, and SIGHUP set the returned event."""
    rescan = Event()

    def end(*_: object) -> None:
        _ignore_late_signals()
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    signal.signal(signal.SIGHUP, lambda *_: rescan.set())
    return rescan
