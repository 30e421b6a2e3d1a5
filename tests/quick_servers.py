"""`install()` shortens waits in servers under test, so that they start and stop faster."""

import asyncio
import itertools
from functools import partial

import uvicorn

from unroll.service.engine.curve import measure
from unroll.service.models import loading


def install() -> None:
    # The default of 0.15 s per model would take most of the start; a rougher curve suffices for tests.
    loading.measure = partial(measure, budget_seconds=0.005)  # type: ignore[assignment]
    uvicorn.Server.main_loop = _main_loop  # type: ignore[method-assign]


async def _main_loop(server: uvicorn.Server) -> None:
    """Check every 20 ms whether to exit; uvicorn's own loop checks every 0.1 s."""
    for look in itertools.count():
        if await server.on_tick(look // 5):
            return
        await asyncio.sleep(0.02)
