"""Rollouts of the toy models, which feed outputs back as inputs. Without I/O."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unroll.client.conformance.refusals import Refusal
from unroll.client.conformance.toy_models import ToyModel, json_of
from unroll.client.conformance.toy_sessions import ToySession
from unroll.client.tensors import Tensor

_MEMBERS = {"steps", "map", "on", "inputs", "outputs", "position", "steps_per_event", "send"}


@dataclass(frozen=True)
class Rolled:
    """The given time steps, or one that was fed back; `end` is the position after them."""

    end: int
    inputs: list[np.ndarray]
    outputs: list[np.ndarray]

    def document(self, model: ToyModel) -> dict[str, Any]:
        inputs, outputs = json_of(model.inputs, self.inputs), json_of(model.outputs, self.outputs)
        return {"position": self.end, "inputs": inputs, "outputs": outputs}


class ToyRollout:
    """A rollout requested by a client.

    Args:
        session: The session that it starts from.
        wish: The members of the request.

    Attributes:
        pieces: The pieces to send, in order.
        end: The position after the rollout.
        is_placed: Whether the request has the position it needs; one on the session must have it.

    Raises:
        Refusal: The rollout cannot start.
    """

    def __init__(self, session: ToySession, wish: Mapping[str, Any]) -> None:
        wish = {name: value for name, value in wish.items() if value is not None}
        self._session = session
        self._on_session = wish.get("on") == "session"
        self.is_placed = "position" in wish or not self._on_session
        self._begin = wish.get("position", session.position)
        self._content = json.dumps([wish.get(name) for name in ("steps", "map", "inputs", "outputs")]).encode()
        _check(wish)
        if self._on_session:
            session.answered(self._begin, self._content)
        elif self._begin != session.position:
            raise session.misplaced(self._begin)
        if "inputs" not in wish and "outputs" not in wish:
            wish["outputs"] = session.model.json_of(_kept(session))
        self.pieces = list(roll(session, self._begin, wish))
        self.end = self.pieces[-1].end

    def apply(self) -> None:
        """Apply a rollout on the session: once, and as a whole."""
        if self._on_session:
            columns = zip(*[piece.inputs for piece in self.pieces], strict=True)
            self._session.apply(self._begin, [np.concatenate(column) for column in columns], self._content)


def roll(session: ToySession, begin: int, wish: Mapping[str, Any]) -> Iterator[Rolled]:
    """Yield the pieces of a rollout from a current or earlier position; `wish` has inputs or outputs."""
    model, state, end = session.model, session.states[begin], begin
    given = model.inputs_of_json(wish["inputs"]) if "inputs" in wish else None
    last = model.last_outputs_of_json(wish["outputs"]) if "outputs" in wish else []
    for _ in range(wish["steps"] + (given is not None)):
        inputs = _fed_back(model, wish["map"], last) if given is None else given
        states = model.states(state, inputs)
        outputs = model.outputs_of(states, end)
        end, state, given = end + len(states), states[-1], None
        yield Rolled(end, inputs, outputs)
        last = model.last_of(outputs)


def _check(wish: Mapping[str, Any]) -> None:
    if unknown := wish.keys() - _MEMBERS:
        raise Refusal("malformed_request", f"a rollout has no member {min(unknown)!r}")
    if {"inputs", "outputs"} <= wish.keys():
        raise Refusal("malformed_request", "a rollout begins with given inputs or from outputs, not from both")
    if wish.get("on") == "session" and not wish.keys() & {"inputs", "outputs"}:
        raise Refusal("malformed_request", "a rollout on the session needs inputs or outputs")
    if wish.get("send", "both") != "both":
        raise Refusal("malformed_request", "the toy models send both inputs and outputs")
    if not isinstance(wish.get("steps"), int) or wish["steps"] < 1 or not isinstance(wish.get("map"), dict):
        raise Refusal("malformed_request", "a rollout needs steps, 1 or more, and a map")


def _kept(session: ToySession) -> list[np.ndarray]:
    """The outputs of the session's last time step."""
    for reply in session.replies.values():
        if reply.end == session.position:
            return session.model.last_of(reply.outputs)
    raise Refusal("malformed_request", "the outputs of the last step were not kept: send them, or the next inputs")


def _fed_back(model: ToyModel, maps: Mapping[str, Any], outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The inputs of the next step, for maps of the kinds `identity` and `columns` with `from` and `constant`."""
    by_name = {model.inputs[0].name: maps} if isinstance(maps.get("kind"), str) else maps
    if by_name.keys() != {spec.name for spec in model.inputs}:
        raise Refusal("map_invalid", f"the map is not one for the inputs of {model.name!r}")
    made = dict(zip([spec.name for spec in model.outputs], outputs, strict=True))
    return [_mapped(by_name[spec.name], spec, made) for spec in model.inputs]


def _mapped(source: Mapping[str, Any], spec: Tensor, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    name = source.get("output", next(iter(outputs)) if len(outputs) == 1 else None)
    try:
        values = outputs[name].reshape(-1).tolist()
        if source["kind"] == "columns":
            values = [values[each["from"]] if "from" in each else each["constant"] for each in source["columns"]]
        elif source["kind"] != "identity":
            raise Refusal("map_invalid", f"the toy models have no map of the kind {source['kind']!r}")
        return np.array(values).astype(spec.numpy).reshape(1, *spec.shape)
    except (KeyError, IndexError, ValueError) as error:
        raise Refusal("map_invalid", f"the map does not make {spec.name!r} of the output {name!r}: {error}") from error
