"""A first version: FastAPI, pydantic bodies, a dictionary of states, one model call per request."""

import numpy as np
import onnxruntime as ort
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from bench.peers.programs.arguments import arguments

ARGUMENTS = arguments()
models = {name: ort.InferenceSession(str(path)) for name, path in ARGUMENTS.models.items()}
zeros = {
    name: np.zeros((1, node.shape[1]), np.float32)
    for name, model in models.items()
    for node in model.get_inputs()
    if node.name == "state"
}
states: dict[tuple[str, str], np.ndarray] = {}
app = FastAPI()


class Steps(BaseModel):
    session_id: str
    inputs: list[list[float]]
    reset: bool = False


class Sequence(BaseModel):
    inputs: list[list[float]]


def run(model: str, inputs: list[list[float]], state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = np.array([inputs], np.float32)
    lens = np.array([x.shape[1]], np.int32)
    y, state = models[model].run(["y", "state_out"], {"x": x, "state": state, "sequence_lens": lens})
    return y, state


@app.post("/models/{model}/steps")
async def steps(model: str, body: Steps) -> dict:
    key = (model, body.session_id)
    state = zeros[model] if body.reset else states.get(key, zeros[model])
    y, states[key] = run(model, body.inputs, state)
    return {"outputs": y[0].tolist()}


@app.post("/models/{model}/sequences")
async def sequences(model: str, body: Sequence) -> dict:
    y, _ = run(model, body.inputs, zeros[model])
    return {"outputs": y[0].tolist()}


if __name__ == "__main__":
    uvicorn.run(app, port=ARGUMENTS.port, log_level="warning", access_log=False)
