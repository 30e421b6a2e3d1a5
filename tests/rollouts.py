"""Rollouts computed by the client: the same steps one by one, with the same random draws."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np

#: Computes the next inputs from a step's outputs, each (*shape), and the next position.
Feed = Callable[[list[np.ndarray], int], list[np.ndarray]]


def split_mix(seed: int, position: int) -> float:
    """Return the number at the position in the sequence of SplitMix64, in [0, 1)."""
    state, mixed = seed, 0
    for _ in range(position + 1):
        state = mixed = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return (mixed >> 11) / 2**53


def sample(logits: np.ndarray, position: int, *, seed: int, temperature: float = 1.0, top_k: int | None = None) -> int:
    logits = logits.astype(np.float64)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    chosen = set(order[:top_k])
    weights = [np.exp((logits[i] - logits.max()) / temperature) if i in chosen else 0.0 for i in range(len(logits))]
    bound, total = split_mix(seed, position) * sum(weights), 0.0
    for i, weight in enumerate(weights):
        total += weight
        if total > bound:
            return i
    raise AssertionError


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict]]:
    """Parse server-sent events; yield their names and data."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def roll(client: httpx.Client, session: str, **body: Any) -> tuple[list[dict], dict]:
    """Request a rollout; return its steps and its final event."""
    with client.stream("POST", f"{session}/rollout", json=body) as answer:
        if answer.status_code != 200:
            answer.read()
            raise AssertionError(answer.text)
        assert answer.headers["content-type"].startswith("text/event-stream")
        *steps, (name, end) = events(answer.iter_lines())
    assert name == "end", end
    assert {kind for kind, _ in steps} <= {"steps"}
    return [step for _, step in steps], end


def by_hand(client: httpx.Client, session: str, feed: Feed, outputs: Any, position: int, count: int) -> list[Any]:
    """Send `count` steps one by one, each computed from the previous outputs; return their inputs and outputs."""
    found = []
    for i in range(count):
        inputs = feed(outputs, position + i)
        answer = client.post(f"{session}/steps", json={"inputs": [inputs], "position": position + i})
        assert answer.status_code == 200, answer.text
        (outputs,) = answer.json()["outputs"]
        found.append((inputs, outputs))
    return found
