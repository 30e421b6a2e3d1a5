"""A refused entry does not affect the rest of its frame."""

from collections.abc import Callable

import numpy as np
import pytest
from serving import Oracle, Serve
from streams import Dial, frame

Oracles = Callable[..., Oracle]


def test_refused_entry_does_not_affect_other_entries(dial: Dial, oracle: Oracles, x: np.ndarray):
    client = dial("lstm")
    client.bind(*range(6))
    client.step(*[(handle, 0, x[:2]) for handle in range(6)])
    nan = x[2:4].copy()
    nan[1, 2] = np.nan
    client.socket.send(
        frame(
            (0, 2, x[2:4]), (1, 9, x[2:4]), (2, 2, nan), (3, 0, x[:2]), (4, 0, x[2:4]), (99, 2, x[2:4]), (5, 2, x[2:4])
        )
    )
    good, bad = client.receive(7)
    assert {reply.handle: reply.position for reply in good} == {0: 4, 3: 2, 5: 4}
    assert {(error["handle"], error["position"], error["code"]) for error in bad} == {
        (1, 9, "position_gap"),
        (2, 2, "non_finite_input"),
        (4, 0, "payload_mismatch"),
        (99, 2, "malformed_request"),
    }
    after = client.step(*[(handle, None, x[2:4]) for handle in (1, 2, 3, 4)])
    for reply in (*after.values(), *[reply for reply in good if reply.handle != 3]):
        assert np.array_equal(reply.outputs[0], oracle("lstm")(x[:4])[2:])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_row_fails_alone(dial: Dial, oracle: Oracles, rng: np.random.Generator, bad: float):
    client = dial()
    client.bind(*range(20))
    x = rng.standard_normal((20, 1, 3)).astype("<f4")
    sent = x.copy()
    sent[7, 0, 1] = bad
    client.socket.send(frame(*[(handle, 0, sent[handle]) for handle in range(20)]))
    good, (error,) = client.receive(20)
    assert (error["handle"], error["position"], error["code"]) == (7, 0, "non_finite_input")
    for reply in (*good, client.step((7, 0, x[7]))[7]):
        assert np.array_equal(reply.outputs[0], oracle("lstm")(x[reply.handle]))


def test_non_finite_answer_fails_alone(dial: Dial, oracle: Oracles, rng: np.random.Generator):
    client = dial("hot")
    client.bind(*range(5))
    x = rng.standard_normal((5, 1, 3)).astype("<f4")
    sent = x.copy()
    sent[3] = 3e38
    positions = {3: 0}
    client.socket.send(frame((99, 7, x[0]), *[(handle, positions.get(handle), sent[handle]) for handle in range(5)]))
    good, (unbound, error) = client.receive(6)
    assert (unbound["handle"], unbound["position"]) == (99, 7)
    assert (error["handle"], error["position"], error["code"]) == (3, 0, "non_finite_output")
    assert client.refused(3, 0, sent[3])[0] == "non_finite_output"
    for reply in (*good, client.step((3, 0, x[3]))[3]):
        assert np.array_equal(reply.outputs[0], oracle("hot")(x[reply.handle]))


def test_tokens_out_of_range(dial: Dial):
    client = dial("tokens")
    client.bind(0, 1)
    assert client.refused(0, 0, np.array([11], "<i8"))[0] == "input_out_of_range"
    client.socket.send(frame((0, 0, np.array([-1], "<i8")), (1, 0, np.array([10], "<i8"))))
    good, (error,) = client.receive(2)
    assert (error["handle"], error["code"], good[0].handle) == (0, "input_out_of_range", 1)


def test_too_many_steps(serve: Serve, dial: Dial, x: np.ndarray):
    client = dial(running=serve(max_steps=3))
    client.bind(0, 1, 2)
    assert client.refused(0, 0, x[:4])[0] == "invalid_shape"
    client.socket.send(frame((0, 0, x[:4]), (1, 0, x[:3])))
    good, (error,) = client.receive(2)
    assert (error["handle"], error["code"], good[0].handle) == (0, "invalid_shape", 1)
