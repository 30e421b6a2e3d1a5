"""unroll.mjs in a browser, served by a server that is killed and restarted."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.replica import Replica, tiny_repository
from oracle import Oracle
from waiting import PATIENCE

api = pytest.importorskip("playwright.async_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: Steps one session over HTTP and one on a stream. Each waits for the test before its fourth step.
LIVE = """async (x) => {
  const { Client } = await import("/page/unroll.mjs");
  const life = async (session) => {
    const outputs = [];
    for (const [step, values] of x.entries()) {
      if (step === 3) await window.pause();
      outputs.push(Array.from(await session.step(values)));
    }
    return [session.position, outputs];
  };
  const client = new Client(location.origin);
  const stream = await client.stream("tiny");
  const [streamed] = await stream.open();
  const lives = await Promise.all([life(await client.session("tiny")), life(streamed)]);
  await stream.close();
  return { lives, refused: await client.session("nothing").catch((error) => error.code) };
}"""


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[Replica]:
    store = ("--store", f"file://{tmp_path / 'store'}", "--durability", "stored")
    replica = Replica("server", tiny_repository(tmp_path), tmp_path, *store)
    await replica.start()
    yield replica
    replica.kill()


@pytest.fixture
async def page() -> AsyncIterator[Any]:
    """A browser page; an uncaught error in it fails the test."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    errors: list[str] = []
    async with api.async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        await browser.close()
    assert errors == []


async def test_sessions_and_streams_continue_after_the_server_is_killed(
    page: Any, replica: Replica, tmp_path: Path, rng: np.random.Generator
) -> None:
    oracle = Oracle(tmp_path / "repository", "tiny")
    x = rng.standard_normal((6, *oracle.manifest.inputs[0].shape)).astype(np.float32)
    waiting, go_on = asyncio.Semaphore(0), asyncio.Event()

    async def pause() -> None:
        waiting.release()
        await go_on.wait()

    await page.expose_function("pause", pause)
    await page.goto(f"http://127.0.0.1:{replica.port}/")
    living = asyncio.create_task(page.evaluate(LIVE, x.tolist()))
    async with asyncio.timeout(PATIENCE):
        for _ in range(2):
            await waiting.acquire()
    replica.kill()
    go_on.set()
    await replica.start()
    found = await living
    assert found["refused"] == "model_unknown"
    for position, outputs in found["lives"]:
        assert position == 6
        assert np.array_equal(np.array(outputs, np.float32), oracle(x))
