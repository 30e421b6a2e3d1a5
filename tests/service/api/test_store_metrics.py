"""Metrics of the session store."""

from pathlib import Path

import httpx
import numpy as np
from redis_server import RedisServer
from serving import Serve, metric, raw_steps

STEP = np.ones((1, 3), "<f4")


def stepped(url: str, session: str) -> int:
    path = f"{url}/v1/models/gru/sessions/{session}/steps"
    return httpx.post(path, content=STEP.tobytes(), headers=raw_steps(STEP)).status_code


def scraped(url: str, name: str, **labels: str) -> float:
    return metric(httpx.get(f"{url}/metrics").text, name, **labels)


def test_commits_are_counted_by_outcome_and_a_store_that_ends_is_down(serve: Serve, tmp_path: Path) -> None:
    redis = RedisServer(tmp_path / "redis")
    redis.start()
    try:
        first, second = (serve(store=redis.url).url for _ in range(2))
        assert httpx.post(f"{first}/v1/models/gru/sessions", json={"session_id": "s"}).status_code == 201
        assert [stepped(url, "s") for url in (first, second, first)] == [200] * 3
        assert scraped(first, "unroll_store_up") == 1
        assert scraped(first, "unroll_store_commits_total", outcome="stored") == 3
        assert scraped(first, "unroll_store_commits_total", outcome="contended") == 1, "its copy was stale"
        assert scraped(first, "unroll_store_exchange_seconds_count") >= 4
    finally:
        redis.kill()
    assert stepped(first, "s") == 503
    assert scraped(first, "unroll_store_up") == 0
    assert scraped(first, "unroll_store_commits_total", outcome="unavailable") == 1


def test_the_size_of_a_folder_is_known(serve: Serve, tmp_path: Path) -> None:
    url = serve(store=f"file://{tmp_path}/store").url
    assert scraped(url, "unroll_store_bytes", kind="file") >= scraped(url, "unroll_store_bytes", kind="used") > 0
