"""The page at `/` in a browser: every view and button, its size, and the hosts it contacts."""

import re
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from chromium import chromium, launch
from playwright.sync_api import Browser, Page, Route, expect
from served_models import models
from serving import Running
from waiting import PATIENCE, until

from unroll.client import Client
from unroll.examples.sound import THRESHOLD, recorded
from unroll.models import synthesis
from unroll.service.access.keys import new_key
from unroll.service.settings import Settings

EXAMPLES = Path(__file__).parents[2] / "examples" / "repository"
#: Limit per view, in uncompressed bytes of all it loads, including the client and the example's measurements.
MOST_BYTES = {"models": 90_000, "playground": 200_000}

#: Opens a view such as "playground/co2" and returns its page.
Visit = Callable[..., Page]

expect.set_options(timeout=PATIENCE * 1000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of the examples and of models that do not stream, have two or static inputs, or are refused."""
    repository = models.link(tmp_path_factory.mktemp("repository"), "whole", "two", "voices")
    for example in EXAMPLES.iterdir():
        (repository / example.name).symlink_to(example)
    (repository / "broken" / "1").mkdir(parents=True)
    (repository / "broken" / "1" / "manifest.json").write_text("{}")
    running = Running(Settings(repository=repository))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(server: Running, browser: Browser) -> Iterator[Visit]:
    """Opens pages that must contact no other host and log no error."""
    faults: list[str] = []
    contexts = []

    def check(url: str) -> None:
        if urlsplit(url).scheme in ("http", "https", "ws", "wss") and urlsplit(url).netloc != server.address:
            faults.append(f"asked {url}")

    def open_page(view: str, *, scheme: str = "light", width: int = 1280) -> Page:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})  # type: ignore[arg-type]
        contexts.append(context)
        context.set_default_timeout(PATIENCE * 1000)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: check(request.url))
        page.on("websocket", lambda socket: check(socket.url))
        page.goto(f"{server.url}/#{view}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def shades(page: Page, selector: str) -> int:
    """Return the number of colours on a canvas; an empty canvas has one."""
    return page.locator(selector).evaluate(
        """canvas => new Set(new Uint32Array(
            canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"""
    )


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def wait_for_position(page: Page, least: int) -> None:
    page.wait_for_function(
        "least => Number(document.getElementById('playground').dataset.position) >= least", arg=least
    )


def says(page: Page, text: str) -> int:
    """Wait for the message; return the first number after the text, if any."""
    message = page.locator(".messages li", has_text=text).first
    expect(message).to_be_visible()
    found = re.match(r" (\d+)", message.inner_text().partition(text)[2])
    return int(found[1]) if found else -1


def play_to(page: Page, least: int) -> None:
    page.get_by_label("Speed").select_option("60 steps a second")
    press(page, "Play")
    wait_for_position(page, least)
    press(page, "Pause")


#: By view: the element that appears last.
SHOWN = {
    "models": "article",
    "playground/bytes": ".stage canvas",
    "playground/co2": ".stage canvas",
    "live": "dl.facts dd",
    "lattice": "svg",
}


@pytest.mark.parametrize(
    ("scheme", "views"),
    [
        ("dark", ["playground/co2"]),
        pytest.param("light", [*SHOWN], marks=pytest.mark.long),
        pytest.param("dark", [*SHOWN], marks=pytest.mark.long),
    ],
    ids=["short", "light", "dark"],
)
def test_no_view_has_a_serious_accessibility_fault(visit: Visit, scheme: str, views: list[str]) -> None:
    page = visit("models", scheme=scheme)
    for view in views:
        page.evaluate("view => (location.hash = view)", view)
        page.locator(f"#{view.split('/')[0]} {SHOWN[view]}").first.wait_for()
        found = Axe().run(page).response["violations"]
        serious = [fault for fault in found if fault["impact"] in ("serious", "critical")]
        assert not serious, (view, [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in serious])


def test_models_are_described_with_the_reason_if_they_do_not_stream(visit: Visit, server: Running) -> None:
    page = visit("models")
    co2 = page.get_by_role("article", name="co2")
    expect(co2).to_contain_text("layer 1 · h")
    expect(co2).to_contain_text("streams")
    whole = page.get_by_role("article", name="whole")
    expect(whole).to_contain_text(server.model("whole").manifest.not_streamable_because or "?")
    expect(whole.get_by_role("link", name="Play")).to_have_count(0)
    expect(page.locator("#models .notice").first).to_contain_text("broken version 1 is not served: ")
    expect(page.get_by_role("link", name="API")).to_have_attribute("href", "docs")
    co2.get_by_role("link", name="Play").click()
    expect(page).to_have_url(f"{server.url}/#playground/co2")


def test_a_session_is_played_forked_rewound_retried_and_rolled_out(visit: Visit, server: Running) -> None:
    page = visit("playground/co2")
    press(page, "Step")
    wait_for_position(page, 1)
    play_to(page, 20)
    assert shades(page, ".stage canvas >> nth=0") > 10
    assert shades(page, ".stage canvas >> nth=1") > 10  # layer 0, h
    assert shades(page, ".stage canvas >> nth=2") > 10
    press(page, "Snapshot")
    kept = says(page, "Snapshot at position")
    press(page, "Fork")
    says(page, "Forked at position")
    play_to(page, kept + 10)
    expect(page.locator(".legend")).to_contain_text("fork: y")
    before = server.model("co2").scheduler.counters.replayed
    press(page, "Send the last step again")
    says(page, "the same answer, bit for bit; the session is still at position")
    assert server.model("co2").scheduler.counters.replayed == before + 1
    page.get_by_label("Steps of the forecast").fill("12")
    press(page, "Forecast")
    end = says(page, "12 steps ahead of position")
    expect(page.locator(".legend")).to_contain_text("forecast: y")
    press(page, "Rewind")
    says(page, f"Back at position {kept}, from {end}")
    play_to(page, end)
    says(page, f"{end - kept} of {end - kept} repeated steps gave the same outputs, bit for bit")
    expect(page.locator(".badge")).to_contain_text("lost when the process ends")
    page.get_by_label("kept in").select_option("stored")
    press(page, "New session")
    says(page, "durability_unavailable")


def test_files_curves_and_signals_are_inputs(visit: Visit) -> None:
    page = visit("playground/co2")
    expect(page.locator(".facts")).to_contain_text("CO₂ at Mauna Loa")
    page.get_by_label("Input", exact=True).select_option("A CSV file")
    press(page, "Step")
    says(page, "There is no input yet")
    rows = "week,ppm\n" + "".join(f"{week},{330 + week % 9}\n" for week in range(30))
    file = {"name": "weeks.csv", "mimeType": "text/csv", "buffer": rows.encode()}
    page.locator("input[type=file]").set_input_files(files=[file])  # type: ignore[list-item]
    says(page, "weeks.csv: 30 steps")
    play = page.get_by_label("Speed")
    play.select_option("chunks of 16 steps")
    press(page, "Play")
    says(page, "The input has ended")
    wait_for_position(page, 30)
    expect(page.locator(".facts")).to_contain_text("Position30")
    page.locator("input[type=file]").set_input_files(files=[{**file, "buffer": b"a,b\nx,y\n"}])  # type: ignore[list-item]
    says(page, "needs as many columns of numbers")
    page.get_by_label("Input", exact=True).select_option("A drawn curve")
    box = page.locator(".drawing").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 5, box["y"] + 90, steps=4)
    page.mouse.up()
    page.get_by_label("Fill the curve with").select_option("a step")
    play_to(page, 40)
    page.get_by_label("Input", exact=True).select_option("A generated signal")
    play_to(page, 50)
    page.evaluate("location.hash = 'playground/two'")
    expect(page.get_by_label("Model")).to_have_value("two")
    play_to(page, 5)
    assert shades(page, ".stage canvas >> nth=1") > 10


def test_playground_asks_for_static_inputs(visit: Visit, server: Running) -> None:
    page = visit("playground/voices")
    fields = page.locator("fieldset label")
    expect(fields).to_have_text(["speaker int64", "gain float32 [2]"])
    expect(page.get_by_label("gain")).to_have_value("0, 0")
    fields.nth(1).locator("input").fill("0.5, -2")
    fields.nth(0).locator("input").fill("4")
    fields.nth(0).locator("input").press("Tab")
    press(page, "Step")
    wait_for_position(page, 1)
    session = page.locator(".facts code").inner_text()
    row = np.frombuffer(httpx.get(f"{server.url}/v1/models/voices/sessions/{session}/state").content[52:-16], "<f4")
    for spec in server.model("voices").manifest.static:
        values = {"speaker": [4], "gain": [0.5, -2.0]}[spec.name]
        assert row[spec.offset : spec.offset + spec.size].tolist() == values
    page.get_by_label("gain").fill("1")
    page.get_by_label("gain").press("Tab")
    says(page, 'gain takes 2 values, each a number: not "1".')


def test_play_waits_for_the_session_that_opens(visit: Visit) -> None:
    page = visit("models")

    def press_before(route: Route) -> None:
        press(page, "Play")
        route.continue_()

    page.route("**/v1/models/two:1/sessions/*", press_before, times=1)
    page.evaluate("location.hash = 'playground/two'")
    wait_for_position(page, 3)
    press(page, "Pause")


def test_playground_shows_the_rows_of_its_batch(visit: Visit, server: Running) -> None:
    page = visit("playground/two")
    rows = page.locator(".facts div", has_text="Rows in its batch").locator("dd")
    press(page, "Step")
    expect(rows).to_have_text("1")
    loop = server.model("two").loop
    given = {name: np.ones((1, size), np.float32) for name, size in (("a", 2), ("b", 3))}
    with Client(server.url) as client, ThreadPoolExecutor(4) as threads, server.holding("two") as held:
        sessions = [client.session("two") for _ in range(4)]
        waiting = [threads.submit(sessions[0].steps, given)]
        held.wait()
        waiting += [threads.submit(session.steps, given) for session in sessions[1:]]
        press(page, "Step")
        until(lambda: loop.scheduler.in_flight == 5)
        held.release()
        for one in waiting:
            one.result(PATIENCE)
    expect(rows).to_have_text("4")


def test_text_is_read_byte_by_byte_and_continued(visit: Visit) -> None:
    page = visit("playground/bytes", scheme="dark", width=390)
    page.get_by_label("Text to read, byte by byte").fill("import os\n\ndef f(self):\n    return self.")
    play_to(page, 30)
    expect(page.locator(".text")).to_contain_text("def f(self):")
    expect(page.locator(".next code")).to_have_count(5)
    press(page, "Fork")
    says(page, "Forked at position")
    press(page, "Step")
    page.get_by_label("Steps of the forecast").fill("8")
    press(page, "Forecast")
    says(page, "8 steps ahead of position")
    expect(page.locator(".text .forecast")).to_have_count(8)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_microphone_is_an_input_of_models_that_declare_a_rate(
    server: Running, browser: Browser, tmp_path: Path
) -> None:
    """A recording heard through the page's microphone gives the same detections as the recording itself."""
    recording = tmp_path / "whistle.wav"
    frames = synthesis.single("whistle", np.random.default_rng(7)).samples
    with wave.open(str(recording), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(synthesis.RATE)
        file.writeframes((frames * 2**15).clip(-(2**15), 2**15 - 1).astype("<i2").tobytes())
    with Client(server.url) as client, client.session("sound") as session:
        right = session.steps(recorded(recording)).max(0) > THRESHOLD
    hearing = launch(browser.browser_type, f"--use-file-for-fake-audio-capture={recording}")
    page = hearing.new_page()
    page.goto(f"{server.url}/#playground/load")
    expect(page.get_by_label("Input", exact=True)).not_to_contain_text("Microphone")
    page.goto(f"{server.url}/#playground/sound")
    expect(page.get_by_label("Input", exact=True)).to_have_value("Microphone")
    press(page, "Listen")
    expect(page.locator(".facts")).to_contain_text("256 of 16,000 samples a second in a step")
    press(page, "Step")
    wait_for_position(page, 1)
    page.get_by_label("Input", exact=True).select_option("A CSV file")
    press(page, "Step")
    says(page, "There is no input yet")
    listen = """async () => {
        const { microphone } = await import("/page/sources.mjs");
        const { Client } = await import("/page/unroll.mjs");
        const source = await microphone(256, 16000);
        const session = await new Client(location.origin).session("sound");
        const frames = [];
        while (frames.length < 130) frames.push(Array.from(await source.next()));
        source.stop();
        const outputs = await session.steps(frames.flat());
        await session.close();
        return Array.from(outputs);
    }"""
    assert right.tolist() == [True, False, False]
    # A machine under load may leave gaps in the audio, which sound like claps.
    until(lambda: (np.reshape(page.evaluate(listen), (-1, 3)).max(0) > THRESHOLD).tolist() == right.tolist())
    hearing.close()


def test_live_figures_follow_the_metrics(visit: Visit) -> None:
    page = visit("live")
    expect(page.locator("#live .facts")).to_contain_text("Sessions opened")
    expect(page.locator("#live")).to_contain_text("Call of the model")
    expect(page.locator("#live .charts b").first).not_to_have_text("–")  # a rate, which needs two scrapes
    assert all(shades(page, f"#live canvas >> nth={i}") > 2 for i in range(4))


def test_both_orders_of_the_lattice_compute_the_same_cells_and_numbers(visit: Visit) -> None:
    page = visit("lattice/co2")
    page.locator("#lattice svg").first.wait_for()
    press(page, "One cell")
    page.get_by_label("Cells computed").fill("16")
    expect(page.locator("#lattice .cell.done")).to_have_count(32)
    press(page, "Run both on this server")
    expect(page.locator(".verdict")).to_have_text("Equal, bit for bit: all 8 numbers of y.")
    page.get_by_label("Model").select_option("whole")
    expect(page.locator("#lattice")).to_contain_text("This model runs whole sequences only")
    press(page, "Pause")  # the view starts playing when it opens
    press(page, "Play")


def test_the_page_is_small(visit: Visit) -> None:
    for view, most in MOST_BYTES.items():
        page = visit(view)
        page.locator("article, .facts dd").first.wait_for()
        sizes = page.evaluate(
            """performance.getEntries().filter(({ decodedBodySize }) => decodedBodySize)
                .map(({ name, decodedBodySize }) => [new URL(name).pathname, decodedBodySize])"""
        )
        assert {"/", "/page/app.mjs", "/page/unroll.mjs", "/page/style.css"} <= {path for path, _ in sizes}
        assert sum(size for _, size in sizes) < most, sizes


def test_page_of_another_origin_learns_why_its_stream_was_closed(server: Running, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(f"http://localhost:{server.port}/livez")  # this server under another name, hence another origin
    closed = page.evaluate(
        """async url => {
            const { Client, Stream } = await import("/page/unroll.mjs");
            const model = await new Client(location.origin).model("co2");
            try { await new Stream(new Client(url), "co2", model).open(1) }
            catch (error) { return [error.code, error.detail] }
        }""",
        server.url,
    )
    page.close()
    assert closed == ["forbidden", "pages of this origin may not open streams here; see --allowed-origins"]


def test_figures_and_files_are_read_correctly(visit: Visit) -> None:
    page = visit("models")
    text = (
        'a_bucket{le="1",m="x\\"y"} 2\na_bucket{le="2",m="x\\"y"} 6\na_bucket{le="+Inf",m="x\\"y"} 8\n# HELP a\nb 1e3\n'
    )
    read = page.evaluate(
        """async text => {
            const { Scrape, quantile } = await import("/page/prometheus.mjs");
            const { columnsOf } = await import("/page/sources.mjs");
            const { Stage } = await import("/page/stage.mjs");
            const x = { name: "x", dtype: "float32", shape: [] }, y = { name: "y", shape: [10] };
            const scrape = new Scrape(text, 0), counts = scrape.counts("a");
            return [counts.map(([, count]) => count), quantile(counts, 0.5), quantile(counts, 0.99), scrape.sum("b"),
                    columnsOf("# c\\nwhen;v\\nmon;1.5\\ntue;-2\\n"), columnsOf("1,2\\n3,4"),
                    new Stage({ inputs: [x], outputs: [y], state: [] }).note];
        }""",
        text,
    )
    assert read[:4] == [[2, 4, 2], 1.5, 2, 1000]
    assert read[4] == [{"name": "v", "values": [1.5, -2]}]
    assert read[5] == [{"name": "column 1", "values": [1, 3]}, {"name": "column 2", "values": [2, 4]}]
    assert read[6] == "4 of 10 outputs are drawn"


def test_page_asks_for_an_api_key_if_the_server_needs_one(browser: Browser, tmp_path: Path) -> None:
    secret, entry = new_key("page", "acme", ["infer"])
    (tmp_path / "keys.toml").write_text(entry)
    running = Running(
        Settings.model_validate({"repository": models.link(tmp_path, "gru"), "keys": tmp_path / "keys.toml"})
    )
    page = browser.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    page.goto(f"{running.url}/#playground/gru")
    for key, asked in (("wrong", "requires an API key"), (secret, "the API key is unknown")):
        expect(page.get_by_role("alert")).to_contain_text(asked)  # in a new form
        page.get_by_label("API key").fill(key)
        press(page, "Use this key")
    press(page, "Step")  # over a WebSocket opened with a ticket
    wait_for_position(page, 1)
    page.reload()
    press(page, "Step")
    wait_for_position(page, 1)
    page.close()
    running.stop()
