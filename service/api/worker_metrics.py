"""All workers' metrics in one scrape: fetched from each worker's own port, and labelled `worker`."""

import asyncio
import re
import ssl
from collections.abc import Callable, Mapping
from functools import partial

#: The name of a sample, and the brace if it has labels.
_SAMPLE = re.compile(r"(\w+)(\{?)")
#: Seconds to wait for a worker, which may be busy or starting.
_PATIENCE = 2.0
_UP = "# HELP unroll_worker_up 1 if the worker answers.\n# TYPE unroll_worker_up gauge\n"
_HOST = b"127.0.0.1"
#: Where to connect to a server that listens on all addresses.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 nothing is bound


class WorkerMetrics:
    """Scrapes all workers. ports: in worker order. tls: creates the client's context, if the workers use TLS."""

    def __init__(self, host: str, ports: range, tls: Callable[[], ssl.SSLContext] | None = None) -> None:
        self._tls = tls
        self._host = _LOOPBACK.get(host, host)
        self._ports = ports

    async def exposition(self, key: bytes) -> bytes:
        """The text of a scrape. key: header line with the caller's API key, which is forwarded to the workers."""
        tls = None if self._tls is None else self._tls()
        texts = await asyncio.gather(*[self._ask(port, key, tls) for port in self._ports])
        return merge(dict(enumerate(texts, 1))).encode()

    async def _ask(self, port: int, key: bytes, tls: ssl.SSLContext | None) -> str | None:
        try:
            async with asyncio.timeout(_PATIENCE):
                reader, writer = await asyncio.open_connection(self._host, port, ssl=tls)
                writer.write(b"GET /metrics HTTP/1.1\r\nHost: %b\r\n%bConnection: close\r\n\r\n" % (_HOST, key))
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
                writer.close()
        except OSError:
            return None
        return body.decode() if head.startswith(b"HTTP/1.1 200 ") else None


def merge(texts: Mapping[int, str | None]) -> str:
    """Merge the texts of workers, by number; None for a worker that did not answer."""
    families: dict[str, list[str]] = {_UP: []}
    for number, text in texts.items():
        families[_UP].append(f'unroll_worker_up{{worker="{number}"}} {int(text is not None)}.0\n')
        for family in re.findall(r"(?ms)^# HELP .*?(?=^# HELP |\Z)", text or ""):
            lines = re.findall(r".*\n", family)  # labels may contain other line breaks
            labelled = [_SAMPLE.sub(partial(_label, number), line, count=1) for line in lines[2:]]
            families.setdefault("".join(lines[:2]), []).extend(labelled)
    return "".join(head + "".join(samples) for head, samples in families.items())


def _label(number: int, sample: re.Match[str]) -> str:
    return f'{sample[1]}{{worker="{number}"' + ("," if sample[2] else "}")
