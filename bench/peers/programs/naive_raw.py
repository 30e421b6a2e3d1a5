"""The naive server after a first measurement: raw bytes instead of JSON and pydantic, one onnxruntime thread."""

import numpy as np
import onnxruntime as ort
import uvicorn
from fastapi import FastAPI, Request, Response

from bench.peers.programs.arguments import arguments

ARGUMENTS = arguments()
options = ort.SessionOptions()
options.intra_op_num_threads = 1
models = {name: ort.InferenceSession(str(path), options) for name, path in ARGUMENTS.models.items()}
shapes = {name: {node.name: node.shape for node in model.get_inputs()} for name, model in models.items()}
zeros = {name: np.zeros((1, shape["state"][1]), np.float32) for name, shape in shapes.items()}
states: dict[tuple[str, str], np.ndarray] = {}
app = FastAPI()


def run(model: str, body: bytes, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = np.frombuffer(body, np.float32).reshape(1, -1, shapes[model]["x"][-1])
    lens = np.array([x.shape[1]], np.int32)
    y, state = models[model].run(["y", "state_out"], {"x": x, "state": state, "sequence_lens": lens})
    return y, state


def reply(y: np.ndarray) -> Response:
    return Response(y.tobytes(), media_type="application/octet-stream")


@app.post("/models/{model}/sessions/{session_id}/steps")
async def steps(model: str, session_id: str, request: Request) -> Response:
    key = (model, session_id)
    y, states[key] = run(model, await request.body(), states.get(key, zeros[model]))
    return reply(y)


@app.post("/models/{model}/sessions/{session_id}")
async def start(model: str, session_id: str, request: Request) -> Response:
    """The first step."""
    y, states[model, session_id] = run(model, await request.body(), zeros[model])
    return reply(y)


@app.post("/models/{model}/sequences")
async def sequences(model: str, request: Request) -> Response:
    y, _ = run(model, await request.body(), zeros[model])
    return reply(y)


if __name__ == "__main__":
    uvicorn.run(app, port=ARGUMENTS.port, log_level="warning", access_log=False)
