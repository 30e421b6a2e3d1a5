"""A synchronous interface to the asynchronous client, so that one test covers both clients."""

import asyncio
import inspect
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from unroll.client import AsyncClient, AsyncSession, AsyncStream, AsyncStreamSession

_WRAPPED = AsyncClient | AsyncSession | AsyncStream | AsyncStreamSession


class Blocking:
    """Wraps an object of the asynchronous client and runs its coroutines to completion."""

    def __init__(self, target: _WRAPPED, runner: asyncio.Runner) -> None:
        self.target, self._runner = target, runner

    def __enter__(self) -> "Blocking":
        self._run(self.target.__aenter__())  # type: ignore[union-attr]
        return self

    def __exit__(self, *error: Any) -> None:
        self._run(self.target.__aexit__(*error))  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.target, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            return self._wrapped(value(*map(_unwrapped, arguments), **options))

        return call

    def _wrapped(self, value: Any) -> Any:
        if inspect.isasyncgen(value):
            return self._iterate(value)
        if inspect.isawaitable(value):
            value = self._run(value)
        if isinstance(value, _WRAPPED):
            return Blocking(value, self._runner)
        if isinstance(value, list):
            return [self._wrapped(item) for item in value]
        return value

    def _iterate(self, items: AsyncGenerator[Any]) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._run(anext(items))
                except StopAsyncIteration:
                    return
        finally:
            self._run(items.aclose())

    def _run(self, awaitable: Any) -> Any:
        async def wait() -> Any:
            return await awaitable

        return self._runner.run(wait())


def _unwrapped(value: Any) -> Any:
    if isinstance(value, Blocking):
        return value.target
    return [_unwrapped(item) for item in value] if isinstance(value, list) else value
