"""The same sessions in frame after frame, as one cohort."""

from collections.abc import Callable

import httpx
import numpy as np
from serving import Oracle, Running, raw_steps
from streams import Client, Dial, Reply, frame

Oracles = Callable[..., Oracle]


class Crew:
    """Sessions that step together repeatedly, with the inputs and the outputs of each."""

    def __init__(self, running: Running, client: Client, rng: np.random.Generator) -> None:
        self.running = running
        self.client = client
        self.rng = rng
        self.handles = [*range(6)]
        self.ids = dict(zip(self.handles, client.bind(*self.handles), strict=True))
        self.given: dict[int, list[np.ndarray]] = {handle: [] for handle in self.handles}
        self.got: dict[int, list[np.ndarray]] = {handle: [] for handle in self.handles}

    def position(self, handle: int) -> int:
        return sum(map(len, self.given[handle]))

    def steps(self, number: int = 1) -> np.ndarray:
        return self.rng.standard_normal((number, 3)).astype("<f4")

    def took(self, handle: int, x: np.ndarray, reply: Reply) -> None:
        self.given[handle].append(x)
        self.got[handle].append(reply.outputs[0])
        assert (reply.position, reply.steps) == (self.position(handle), len(x))

    def step(self, *handles: int, number: int = 1, pinned: bool = True) -> list[tuple]:
        """Send a frame of these sessions, or of all."""
        at = [(handle, self.position(handle) if pinned else None) for handle in handles or self.handles]
        sent = [(handle, position, self.steps(number)) for handle, position in at]
        for handle, reply in self.client.step(*sent).items():
            self.took(handle, next(x for h, _, x in sent if h == handle), reply)
        return sent

    def together(self) -> list[tuple]:
        """Step until the sessions form a cohort."""
        for pinned in (True, True, False, True):
            sent = self.step(pinned=pinned)
        table = self.running.model("lstm").scheduler.sessions
        assert {s.id for cohort in table.cohorts for s in cohort.sessions}.issuperset(self.ids.values())
        return sent

    def bind(self, handle: int) -> None:
        """Open a new session on a free handle."""
        (self.ids[handle],) = self.client.bind(handle)
        self.given[handle], self.got[handle] = [], []


def test_recurring_frames_among_other_work(any_server: Running, dial: Dial, oracle: Oracles, rng: np.random.Generator):
    """Each session ends where it would without the others, whatever runs in between."""
    model, client = oracle("lstm"), dial(running=any_server)
    crew = Crew(any_server, client, rng)
    rest = httpx.Client(base_url=f"http://{any_server.address}/v1/models/lstm/sessions")

    def right() -> None:
        for handle in crew.handles:
            assert np.array_equal(np.concatenate(crew.got[handle]), model(np.concatenate(crew.given[handle])))

    def steps_by_rest(handle: int) -> None:
        x, at = crew.steps(), {"Unroll-Position": f"{crew.position(handle)}"}
        answer = rest.post(f"/{crew.ids[handle]}/steps", content=x.tobytes(), headers={**raw_steps(x), **at})
        reached = int(answer.headers["unroll-position"])
        crew.took(handle, x, Reply(handle, 1, reached, [np.frombuffer(answer.content, "<f4").reshape(1, 2)]))

    def odd_one(handle: int, position: int, x: np.ndarray, code: str, *, pinned: bool = True) -> None:
        """One entry is refused; the rest step."""
        sent = [(h, crew.position(h) if pinned else None, crew.steps()) for h in crew.handles if h != handle]
        sent.insert(handle, (handle, position, x))
        client.socket.send(frame(*sent))
        good, (error,) = client.receive(6)
        assert (error["handle"], error["code"]) == (handle, code)
        for reply in good:
            crew.took(reply.handle, sent[reply.handle][2], reply)

    def again(sent: list[tuple]) -> None:
        for handle, reply in client.step(*sent).items():
            assert reply.outputs[0].tobytes() == crew.got[handle][-1].tobytes()

    with rest:
        again(crew.together())
        steps_by_rest(2)
        crew.together()
        assert rest.get(f"/{crew.ids[3]}").json()["position"] == crew.position(3)
        crew.together()
        crew.step(1)
        crew.together()
        crew.step(*crew.handles[:3])
        crew.step(*crew.handles[::-1])
        crew.together()
        crew.step(number=2)
        again(crew.step())
        crew.together()
        odd_one(4, crew.position(4) + 1, crew.steps(), "position_gap")
        crew.together()
        odd_one(2, crew.position(2) + 1, crew.steps(), "position_gap", pinned=False)
        crew.together()
        odd_one(1, crew.position(1), np.full((1, 3), np.nan, "<f4"), "non_finite_input")
        crew.together()
        odd_one(0, crew.position(0) - 1, crew.steps(), "payload_mismatch")
        crew.together()
        right()

        at, x = {handle: crew.position(handle) for handle in crew.handles}, [crew.steps() for _ in crew.handles]
        client.socket.send(frame(*[(h, at[h] if h % 2 else None, x[h]) for h in crew.handles]))
        for reply in client.receive(6)[0]:
            crew.took(reply.handle, x[reply.handle], reply)
        crew.together()

        forked = rest.post(f"/{crew.ids[5]}/fork").json()
        assert forked["position"] == crew.position(5)
        crew.together()
        client.control("close", handles=[5])
        crew.bind(5)
        crew.together()

        before = crew.ids[4]
        client.control("detach", handles=[4])
        where = crew.position(4)
        crew.bind(4)
        crew.step(pinned=False)
        crew.together()
        assert rest.get(f"/{before}").json()["position"] == where
        right()

        other = dial(running=any_server)
        other.open({"handle": 9, "session_id": crew.ids[0], "mode": "resume"})
        x = crew.steps()
        crew.took(0, x, other.step((9, crew.position(0), x))[9])
        crew.together()
        right()


def test_a_frame_that_runs_with_longer_work_gets_its_own_steps(
    server: Running, dial: Dial, oracle: Oracles, rng: np.random.Generator
):
    client = dial()
    client.bind(0, 1, 2)
    long, *short = [rng.standard_normal((length, 3)).astype("<f4") for length in (4, 3, 3)]
    with server.in_one_turn():
        client.socket.send(frame((2, None, long)))
        client.socket.send(frame((0, None, short[0]), (1, None, short[1])))
    found = {reply.handle: reply.outputs[0] for reply in client.receive(3)[0]}
    for handle, x in enumerate([*short, long]):
        assert np.array_equal(found[handle], oracle("lstm")(x))
