"""Structured logs: one JSON object per line on stderr, including uvicorn's lines.

The length of a line is bounded regardless of client data. Tracebacks omit local variables, because these may contain
requests with tokens in their headers.
"""

import logging
import sys
from typing import Any

import structlog
from structlog.processors import ExceptionRenderer, JSONRenderer
from structlog.tracebacks import ExceptionDictTransformer

_MAX_STRING = 1_000
_MAX_LINE = 32_768
_MAX_FRAMES = 30

_to_json = JSONRenderer(sort_keys=False)
_PROCESSORS: tuple[structlog.typing.Processor, ...] = (
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    ExceptionRenderer(ExceptionDictTransformer(show_locals=False, max_frames=_MAX_FRAMES)),
)


def configure(level: str, **fields: int) -> None:
    """Configure logging for a server. fields: added to every line."""
    shared: list[structlog.typing.Processor] = [lambda logger, method, event: {**event, **fields}, *_PROCESSORS]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _render,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def configure_embedded() -> None:
    """Write the same lines to stderr, without touching the root logger, which belongs to another program."""
    structlog.configure(
        processors=[*_PROCESSORS, _render],
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )


def _render(logger: Any, method: str, event: structlog.typing.EventDict) -> str:
    line = str(_to_json(logger, method, _shortened(event)))
    if len(line) > _MAX_LINE:
        kept = {key: event[key] for key in ("event", "level", "timestamp") if key in event}
        line = str(_to_json(logger, method, _shortened({**kept, "left_out": f"{len(line)} characters"})))
    return line


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        half = _MAX_STRING // 2  # keep the end, where a traceback has the exception
        short = len(value) <= _MAX_STRING
        return value if short else f"{value[:half]}… ({len(value)} characters) …{value[-half:]}"
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(item) for item in value]
    return value
