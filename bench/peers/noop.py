"""FastAPI that sends a pydantic body back: the cost of an empty route."""

import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()


class Steps(BaseModel):
    inputs: list[list[float]]


class Reply(BaseModel):
    outputs: list[list[float]]


@app.post("/steps")
async def steps(body: Steps) -> Reply:
    return Reply(outputs=body.inputs)


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
