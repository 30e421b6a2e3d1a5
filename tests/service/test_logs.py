"""Log lines: JSON of bounded size without request headers."""

import json
import subprocess
import sys

import pytest
from waiting import PATIENCE

PROGRAM = """
import logging, sys
import structlog
from unroll.service.telemetry import logs

logs.configure("debug")

def fail(depth, message):
    authorization = "a" + " secret"
    if depth:
        fail(depth - 1, message)
    raise ValueError(message)

def chain(links):
    try:
        if links:
            chain(links - 1)
        else:
            fail(200, "end")
    except Exception as error:
        raise ValueError(links * "x") from error

causes = {"deep": lambda: fail(200, "end"), "long": lambda: fail(0, 400_000 * "x"), "chain": lambda: chain(200)}
for name in causes:
    try:
        causes[name]()
    except Exception:
        logging.getLogger("uvicorn.error").exception(name)
        structlog.get_logger("x").error(name, exc_info=True)
structlog.get_logger("x").error("values", text=400_000 * "x", values=100_000 * ["x"], nested={"a": ["y" * 5000]})
logging.getLogger("uvicorn.error").error("%s", 400_000 * "x")
hostile = "hostile\\r\\n{} \\x1b[31m \\x00 \\x85 \\u2028 \\u202e \\ud800"
structlog.get_logger("x").error(hostile, session=hostile, **{hostile: [hostile]})
logging.getLogger("uvicorn.error").error("%s", hostile)
"""


@pytest.fixture(scope="module")
def lines() -> list[str]:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=PATIENCE, check=True)
    return ran.stderr.splitlines()


def test_lines_are_bounded_documents(lines: list[str]) -> None:
    documents = [json.loads(line) for line in lines]
    assert [document["event"][:6] for document in documents] == [
        "deep",
        "deep",
        "long",
        "long",
        "chain",
        "chain",
        "values",
        "xxxxxx",
        "hostil",
        "hostil",
    ]
    assert all(document["level"] == "error" for document in documents)
    assert max(map(len, lines)) < 40_000


def test_client_input_is_escaped(lines: list[str]) -> None:
    for line in lines[-2:]:
        assert line.isascii()
        assert line.isprintable()
        assert "\x1b" in json.loads(line)["event"]


def test_exception_keeps_its_location(lines: list[str]) -> None:
    for line in lines[:4]:
        (raised,) = json.loads(line)["exception"]
        assert raised["exc_type"] == "ValueError"
        assert raised["frames"][-1]["name"] == "fail"


def test_no_line_has_the_values_of_local_variables(lines: list[str]) -> None:
    assert not [line for line in lines if "secret" in line or "authorization" in line]


EMBEDDED = """
import structlog
from unroll.service.telemetry import logs

logs.configure_embedded()
authorization = "secret"
try:
    raise ValueError("x")
except ValueError:
    structlog.get_logger("x").error("failed", exc_info=True)
structlog.get_logger("x").debug("detail")
"""


def test_lines_in_a_process_of_another_program() -> None:
    ran = subprocess.run([sys.executable, "-c", EMBEDDED], capture_output=True, text=True, timeout=PATIENCE, check=True)
    (line,) = ran.stderr.splitlines()
    assert json.loads(line)["exception"][0]["exc_value"] == "x"
    assert "secret" not in line
