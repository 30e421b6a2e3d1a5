"""Plays a conversation with the client under test, and checks its answers and what the server saw."""

import base64
import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from unroll.client.conformance.driver import Driver, DriverFailed
from unroll.client.conformance.refusals import Refusal
from unroll.client.conformance.script import Conversation
from unroll.client.conformance.scripted_server import ScriptedServer
from unroll.client.conformance.snapshots import read_snapshot
from unroll.client.conformance.toy_models import MODELS, ToyModel, json_of
from unroll.client.conformance.toy_rollouts import Rolled, roll
from unroll.client.conformance.toy_sessions import ToySession, ToySessions

#: Members of a command that describe its expected outcome, and are not sent to the client.
_EXPECTATIONS = ("fails", "position", "errors")


class Wrong(Exception):
    """An outcome differs from the expected one."""


class _Unsupported(Exception):
    """The client does not support an operation."""


@dataclass
class Result:
    """The result of a conversation; `faults` lists deviations from the expected behaviour."""

    name: str
    says: str
    status: Literal["passed", "failed", "unsupported"] = "passed"
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


async def play(conversation: Conversation, server: ScriptedServer, driver: Driver) -> Result:
    result, begin = Result(conversation.name, conversation.says), time.monotonic()
    await _talk(conversation, server, driver, result)
    result.seconds = round(time.monotonic() - begin, 3)
    return result


async def _talk(conversation: Conversation, server: ScriptedServer, driver: Driver, result: Result) -> None:
    player = _Player(conversation, server)
    await server.begin(conversation.server, conversation.given)
    limits = {"timeout": conversation.timeout, "retry_for": conversation.retry_for}
    start = {"do": "start", "url": server.url, **limits, "needs": list(conversation.needs)}
    try:
        for number, command in enumerate((start, *conversation.client)):
            server.script.command = number
            try:
                outcome = await driver.do(player.command(command))
                player.judge(command, outcome)
            except (Wrong, DriverFailed) as fault:
                result.faults.append(f"command {number}, {json.dumps(command)}: {fault}")
                break
        else:
            await server.script.settle()
            result.faults += player.end()
    except _Unsupported as reason:
        result.status, result.faults = "unsupported", [str(reason)]
        return
    result.faults += server.script.faults
    result.status = "failed" if result.faults else "passed"


class _Player:
    """Knows the expected outcomes. Its sessions are what the server's should be if each step was applied once."""

    def __init__(self, conversation: Conversation, server: ScriptedServer) -> None:
        self._conversation = conversation
        self._server = server
        self._sessions: dict[str, ToySession] = {}
        self._saved: dict[str, tuple[str, ToySession]] = {}

    def command(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """The command as sent to the client."""
        sent = {name: value for name, value in command.items() if name not in _EXPECTATIONS}
        if sent["do"] == "open":
            sent = {"over": self._conversation.over, "model": "toy", "mode": "new", **sent}
        if "snapshot" in sent:
            sent["snapshot"] = self._saved[sent["snapshot"]][0]
        return sent

    def judge(self, command: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
        """Check the outcome of a command. Raises Wrong."""
        if "unsupported" in outcome:
            raise _Unsupported(f"{command['do']}: {outcome['unsupported']}")
        if (expected := command.get("fails")) is not None:
            codes = expected if isinstance(expected, list) else [expected]
            code = outcome.get("error", {}).get("code")
            if code is None or (code not in codes and codes != ["any"]):
                raise Wrong(f"expected the error {' or '.join(codes)}, saw {json.dumps(outcome)}")
            return
        if "ok" not in outcome:
            raise Wrong(f"expected success, saw {json.dumps(outcome)}")
        try:
            judge: Callable[..., None] = getattr(self, f"_{command['do']}", lambda *_: None)
            judge(command, outcome["ok"])
        except (KeyError, TypeError, ValueError) as error:
            raise Wrong(f"{json.dumps(outcome)} is not the outcome of this command: {error!r}") from error

    def end(self) -> list[str]:
        """Deviations found after the last command."""
        faults = []
        for name, expected in self._sessions.items():
            found = self._server.sessions.get(expected.id)
            if found is not None and found.place not in (expected.place, found.moved_to):
                faults.append(
                    f"session {name!r} of the server is at {found.position}, in the state {found.state}; "
                    f"its steps, each applied once, lead to {expected.position} and {expected.state}"
                )
        for kind, wanted in self._conversation.sees.items():
            count, least = self._server.script.counts[kind], str(wanted).removesuffix("+")
            if count < int(least) or (count != int(least) and least == str(wanted)):
                faults.append(f"the server saw {count} of {kind!r}, expected {wanted}")
        wanted_sessions = self._conversation.sessions
        if wanted_sessions is not None and len(self._server.sessions) != wanted_sessions:
            faults.append(f"{len(self._server.sessions)} sessions are open at the end, expected {wanted_sessions}")
        return faults

    # ── the outcome of each command ──────────────────────────────────────────────────────────────

    def _open(self, command: Mapping[str, Any], ok: Mapping[str, Any]) -> None:
        snapshot = command.get("snapshot")
        found = self._server.sessions.get(ok["id"])
        if snapshot is not None:
            expected = _copy_of(self._saved[snapshot][1], ok["id"])
        elif found is not None and command.get("mode", "new") != "new":
            expected = copy.deepcopy(found)
        else:
            model = MODELS[command.get("model", "toy").partition(":")[0]]
            expected = ToySessions().open(model, ok["id"], command.get("durability"), static=command.get("static"))
        if found is None and command.get("durability") != "client":
            raise Wrong(f"the server has no session {ok['id']!r}")
        _check("id", command.get("id", ok["id"]), ok["id"])
        self._has(command, expected, ok)
        self._sessions[command["session"]] = expected

    def _step(self, command: Mapping[str, Any], ok: Mapping[str, Any]) -> None:
        values = command["values"]
        several = {name: [value] for name, value in values.items()} if isinstance(values, dict) else [values]
        self._applied(command, several, ok, single=True)

    def _steps(self, command: Mapping[str, Any], ok: Mapping[str, Any]) -> None:
        self._applied(command, command["values"], ok)

    def _applied(self, command: Mapping[str, Any], values: Any, ok: Mapping[str, Any], *, single: bool = False) -> None:
        session = self._sessions[command["session"]]
        begin = command.get("at", session.position)
        expected = _advance(session, begin, values)
        _check_outputs(session.model, expected, ok["outputs"], single=single)
        self._has(command, session, ok)

    def _together(self, command: Mapping[str, Any], ok: Mapping[str, Any]) -> None:
        refused = command.get("errors", {})
        _check("errors", {str(index): code for index, code in refused.items()}, ok.get("errors", {}))
        for index, (name, values) in enumerate(zip(command["sessions"], command["values"], strict=True)):
            session = self._sessions[name]
            if index not in refused:
                expected = _advance(session, session.position, [values])
                _check_outputs(session.model, expected, ok["outputs"][index], single=True)
            _check(f"position of {name!r}", session.position, ok["positions"][index])

    def _rollout(self, command: Mapping[str, Any], ok: Mapping[str, Any]) -> None:
        session, begin = self._sessions[command["session"]], self._sessions[command["session"]].position
        model = session.model
        last = model.json_of(model.last_of(model.outputs_of([session.state], begin - 1)))
        origin = {} if "inputs" in command else {"outputs": last}
        pieces = list(roll(session, begin, {**origin, **command}))
        _check("steps", [_last_step(model, piece) for piece in pieces][: command.get("take")], ok["steps"])
        for between, outcome in zip(command.get("between", ()), ok.get("between", ()), strict=True):
            self.judge(between, outcome)
        if command.get("applies") and "take" not in command:
            for piece in pieces:
                _advance(session, session.position, json_of(model.inputs, piece.inputs))
        self._has(command, session, ok)

    def _fork(self, command: Mapping[str, Any], ok: Mapping[str, Any]) -> None:
        fork = _copy_of(self._sessions[command["session"]], ok["id"])
        self._has(command, fork, ok)
        self._sessions[command["as"]] = fork

    def _snapshot(self, command: Mapping[str, Any], ok: Mapping[str, Any]) -> None:
        session = self._sessions[command["session"]]
        try:
            found = read_snapshot(base64.b64decode(ok["snapshot"]), session.model.digest)
        except Refusal as error:
            raise Wrong(str(error)) from error
        _check("position and state of the snapshot", (session.position, session.state), found)
        self._saved[command["as"]] = ok["snapshot"], copy.deepcopy(session)

    def _rewind(self, command: Mapping[str, Any], ok: Mapping[str, Any]) -> None:
        session = self._sessions[command["session"]]
        earlier = _copy_of(self._saved[command["snapshot"]][1], session.id)
        self._has(command, earlier, ok)
        self._sessions[command["session"]] = earlier

    def _refresh(self, command: Mapping[str, Any], ok: Mapping[str, Any]) -> None:
        found = self._server.sessions.get(self._sessions[command["session"]].id)
        if found is not None:  # not a client-held session
            self._sessions[command["session"]] = copy.deepcopy(found)
        self._has(command, self._sessions[command["session"]], ok)

    def _close(self, command: Mapping[str, Any], ok: Mapping[str, Any]) -> None:
        session = self._sessions.pop(command["session"])
        if self._server.sessions.get(session.id) is not None:
            raise Wrong("the session is still open on the server")

    def _sequence(self, command: Mapping[str, Any], ok: Mapping[str, Any]) -> None:
        model = MODELS[command.get("model", "toy")]
        states = model.states(model.first_state(command.get("static")), model.inputs_of_json(command["values"]))
        _check_outputs(model, model.outputs_of(states, 0), ok["outputs"])

    def _models(self, command: Mapping[str, Any], ok: Mapping[str, Any]) -> None:
        _check("models", sorted(MODELS), sorted(ok["models"]))

    def _has(self, command: Mapping[str, Any], session: ToySession, ok: Mapping[str, Any]) -> None:
        _check("position", command.get("position", session.position), session.position)
        _check("position", session.position, ok["position"])


def _copy_of(session: ToySession, session_id: str) -> ToySession:
    same = copy.deepcopy(session)
    same.id = session_id
    return same


def _advance(session: ToySession, begin: int, values: Any) -> list[np.ndarray]:
    """Apply steps with JSON values; returns their outputs."""
    states = session.model.states(session.states[begin], session.model.inputs_of_json(values))
    session.states |= {begin + 1 + step: state for step, state in enumerate(states)}
    session.position = begin + len(states)
    return session.model.outputs_of(states, begin)


def _last_step(model: ToyModel, piece: Rolled) -> dict[str, Any]:
    """The last step of a piece, as a client yields it."""
    inputs = json_of(model.inputs, [array[-1] for array in piece.inputs])
    return {"position": piece.end, "inputs": inputs, "outputs": model.json_of(model.last_of(piece.outputs))}


def _check_outputs(model: ToyModel, expected: list[np.ndarray], found: Any, *, single: bool = False) -> None:
    arrays = [array[0] if single and spec.time else array for spec, array in zip(model.outputs, expected, strict=True)]
    _check("outputs", model.json_of(arrays), found)


def _check(what: str, expected: Any, found: Any) -> None:
    """Raise Wrong if the values differ."""
    if expected != found:
        raise Wrong(f"expected {what} {expected}, saw {found}")
