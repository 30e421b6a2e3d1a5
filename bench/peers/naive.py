"""What one writes first: FastAPI, a dictionary of states, one call of the model per request.

Nothing in it is slow on purpose: raw bytes, no validation, an `async` handler, no access log.
"""

import sys

import numpy as np
import onnxruntime as ort
import uvicorn
from fastapi import FastAPI, Request, Response

session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
shapes = {node.name: node.shape for node in session.get_inputs()}
features, state_size = shapes["x"][-1], shapes["state"][-1]
states: dict[str, np.ndarray] = {}
app = FastAPI()


@app.post("/sessions/{session_id}/steps")
async def steps(session_id: str, request: Request) -> Response:
    x = np.frombuffer(await request.body(), np.float32).reshape(1, -1, features)
    state = states.get(session_id)
    if state is None:
        state = np.zeros((1, state_size), np.float32)
    lens = np.array([x.shape[1]], np.int32)
    y, states[session_id] = session.run(None, {"x": x, "state": state, "sequence_lens": lens})
    return Response(y.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", access_log=False)
