"""Checks of v1 errors as RFC 9457 problem details."""

import httpx

#: One step for any model with three features.
GOOD = [[0.1, 0.2, 0.3]]


def assert_problem(answer: httpx.Response, status: int, code: str) -> None:
    """Check that the answer is this error as RFC 9457 problem details."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    problem = answer.json()
    assert problem["code"] == code, problem
    assert problem["status"] == status
    assert problem["type"] == f"urn:unroll:error:{code}"
    assert problem["title"]
    assert problem["detail"]
