"""LitServe: one API per model with one worker process, which holds the states."""

from pathlib import Path
from typing import Annotated

import litserve
import numpy as np
from fastapi import Depends, Request, Response

from bench.peers.programs import served
from bench.peers.programs.arguments import Arguments, arguments


async def received(request: Request) -> tuple[str | None, bool, bytes]:
    """The session's name, whether it starts, and the values."""
    return request.headers.get("session"), "start" in request.headers, await request.body()


class Steps(litserve.LitAPI):
    def __init__(self, name: str, model: Path) -> None:
        super().__init__(api_path=f"/{name}", max_batch_size=64, batch_timeout=0.01)
        self._model = model

    def setup(self, device: str) -> None:
        self._served = served.Served(self._model)

    def decode_request(self, request: Annotated[tuple, Depends(received)]) -> served.Request:
        session, start, body = request
        return served.Request(session, start, np.frombuffer(body, np.float32).reshape(-1, self._served.features))

    def batch(self, inputs: list[served.Request]) -> list[served.Request]:
        return inputs

    def predict(self, x: list[served.Request]) -> list[np.ndarray]:
        return self._served.answer(x)

    def unbatch(self, output: list[np.ndarray]) -> list[np.ndarray]:
        return output

    def encode_response(self, output: np.ndarray) -> Response:
        return Response(output.tobytes(), media_type="application/octet-stream")


def main(given: Arguments) -> None:
    apis = [Steps(name, path) for name, path in given.models.items()]
    server = litserve.LitServer(apis, accelerator="cpu")
    server.run(
        host="127.0.0.1",
        port=given.port,
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )


if __name__ == "__main__":
    main(arguments())
