"""MLServer: a custom runtime for steps and one for sequences, both in the server's process."""

import asyncio
import socket
from pathlib import Path

import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

from bench.peers.programs.arguments import Arguments, arguments
from bench.peers.programs.served import Request, Served


class Steps(MLModel):
    async def load(self) -> bool:
        self._served = Served(Path(self.settings.parameters.uri))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        tensors = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        y = np.stack(self._served.answer(self._requests(tensors)))
        values = ResponseOutput(name="y", datatype="FP32", shape=list(y.shape), data=y.ravel().tolist())
        return InferenceResponse(model_name=self.name, outputs=[values])

    def _requests(self, tensors: dict[str, np.ndarray]) -> list[Request]:
        sessions, starts = tensors["session"].ravel().tolist(), tensors["start"].ravel().tolist()
        rows = zip(sessions, starts, tensors["x"], strict=True)
        return [Request(str(session), start, x) for session, start, x in rows]


class Sequences(Steps):
    def _requests(self, tensors: dict[str, np.ndarray]) -> list[Request]:
        return [Request(None, True, x) for x in tensors["x"]]


def main(given: Arguments) -> None:
    settings = Settings(
        debug=False,
        host="127.0.0.1",
        http_port=given.port,
        grpc_port=_free_port(),
        parallel_workers=0,
        metrics_endpoint=None,
        gzip_enabled=False,
    )
    models = [
        ModelSettings(
            name=f"{name}{suffix}",
            implementation=runtime,
            max_batch_size=64,
            max_batch_time=0.001,
            parameters={"uri": str(path)},
        )
        for name, path in given.models.items()
        for suffix, runtime in (("", Steps), ("-sequences", Sequences))
    ]
    asyncio.run(MLServer(settings).start(models))


def _free_port() -> int:
    """For gRPC, which cannot be turned off."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main(arguments())
