"""Samples are assigned to layers and shares converted to microseconds. No test runs py-spy itself."""

from collections import Counter

import pytest

from bench.internals.budget import OTHER, Run, fold, layer_of, table

ROOT = "_run_module_as_main (<frozen runpy>);main (service/serve.py);run_forever (loop.c);Handle__run (loop.c)"
FEED = "HttpProtocol.data_received (service/transport/http.py);feed_data (httptools/parser/parser.c)"
STEPS = "HttpProtocol.on_message_complete (service/transport/http.py);steps (service/api/steps.py)"


@pytest.mark.parametrize(
    ("inner", "layer"),
    [
        ("uv__io_poll (linux.c);epoll_pwait (libc.so.6)", "idle"),
        ("UVStream__try_write (loop.c);write (libc.so.6)", "kernel: sockets"),
        ("uv__read (stream.c);read (libc.so.6)", "kernel: sockets"),
        ("0x7f00 (libc.so.6)", "event loop"),
        (FEED, "HTTP parser"),
        (f"{FEED};HttpProtocol.on_url (service/transport/http.py)", "transport"),
        (f"{FEED};{STEPS};_PyObject_Malloc (obmalloc.c)", "api"),
        (f"{FEED};{STEPS};Codec.from_raw (service/protocol/tensors.py);array_all (numpy/x.so)", "protocol"),
        (f"{FEED};{STEPS};Loop.submit (service/scheduler/loop.py)", "scheduler"),
        ("Loop.run (service/scheduler/loop.py);HostEngine.run (service/engine/host.py)", "engine"),
        ("Runner.__call__ (service/engine/runner.py);Session.run (onnxruntime/capi/x.py);0x7f (x.so)", "onnxruntime"),
        ("StreamProtocol.data_received (service/transport/websocket.py);parse (websockets/frames.py)", "transport"),
    ],
)
def test_innermost_matching_frame_decides(inner: str, layer: str) -> None:
    assert layer_of(f"{ROOT};{inner}".split(";"))[0] == layer


def test_waiting_thread_is_idle_and_working_thread_is_not() -> None:
    thread = "Thread.run (threading.py);_worker (concurrent/futures/thread.py)"
    waiting = f"{thread};_queue_SimpleQueue_get (_queuemodule.c.h);0x7f00 (libc.so.6)"
    assert layer_of(waiting.split(";"))[0] == "idle"
    working = f"{thread};_WorkItem.run (concurrent/futures/thread.py);HostEngine.run (service/engine/host.py)"
    assert layer_of(working.split(";"))[0] == "engine"


def test_unknown_frames_are_shown_as_other() -> None:
    assert layer_of(["main (somewhere.py)"]) == (OTHER, "main (somewhere.py)")


def test_samples_add_up_without_idle_ones() -> None:
    write, read = "write (libc.so.6)", "read (libc.so.6)"
    lines = [
        f"{ROOT};{write} 3",
        f"{ROOT};x (a.c);{write} 2",
        f"{ROOT};{read} 4",
        f"{ROOT};epoll_wait (libc.so.6) 90",
        "",
    ]
    assert fold(lines) == {("kernel: sockets", write): 5, ("kernel: sockets", read): 4}


def test_shares_become_microseconds_per_step() -> None:
    folded = Counter({("api", "steps (a.py)"): 50, ("api", "find (a.py)"): 10, ("engine", "run (b.py)"): 40})
    lines = [line.split() for line in table(folded, Run(20_000.0, 40e-6), functions=1).splitlines()]
    assert lines[1:] == [
        ["api", "24.00", "60.0%", "60"],
        ["steps", "(a.py)", "20.00", "50.0%", "50"],
        ["engine", "16.00", "40.0%", "40"],
        ["run", "(b.py)", "16.00", "40.0%", "40"],
        ["together", "40.00", "100.0%", "100"],
    ]
