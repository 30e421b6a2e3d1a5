"""A job that dies or hangs is reported, and other jobs continue."""

import signal

from jobs import work

from conformance import children
from conformance.children import Died


def test_dead_or_hung_job_affects_no_other_job() -> None:
    jobs = ["one", "dies", "two", "hangs", "three"]
    found = dict(children.run(work, jobs, children=2, each=3, seconds=6, preload=[]))
    assert {job: found[job] for job in ("one", "two", "three")} == {"one": "ONE", "two": "TWO", "three": "THREE"}
    assert found["dies"] == Died(f"crashed ({-signal.SIGABRT})")
    assert found["hangs"] == Died("timed out")
