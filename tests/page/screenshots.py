"""`make screenshots`: take the pictures of the page for docs/."""

from pathlib import Path

from page.chromium import chromium
from playwright.sync_api import Page
from serving import Running

from unroll.service.settings import Settings

ROOT = Path(__file__).parents[2]
#: By file: colour scheme, width, height, view.
PICTURES = {
    "page-light": ("light", 1240, 860, "playground/co2"),
    "page-dark": ("dark", 1240, 790, "playground/bytes"),
    "page-phone": ("light", 400, 860, "playground/co2"),
    "page-lattice": ("light", 1240, 620, "lattice/bytes"),
}
_WEEKS = {"playground/co2": 150, "playground/bytes": 110}


def main() -> None:
    server = Running(Settings(repository=ROOT / "examples" / "repository"))
    try:
        with chromium() as browser:
            for name, (scheme, width, height, view) in PICTURES.items():
                context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})  # type: ignore[arg-type]
                page = context.new_page()
                page.goto(f"{server.url}/#{view}")
                _play(page, _WEEKS[view]) if view in _WEEKS else _compute(page)
                page.screenshot(path=ROOT / "docs" / f"{name}.png")
                context.close()
    finally:
        server.stop()


def _play(page: Page, steps: int) -> None:
    def press(name: str) -> None:
        page.get_by_role("button", name=name, exact=True).click()

    def play_to(least: int) -> None:
        press("Play")
        condition = "least => Number(document.getElementById('playground').dataset.position) >= least"
        page.wait_for_function(condition, arg=least)
        press("Pause")

    page.get_by_label("Speed").select_option("60 steps a second")
    play_to(steps - 30)
    press("Fork")
    page.locator(".messages li", has_text="Forked").wait_for()
    play_to(steps)
    press("Forecast")
    page.locator(".messages li", has_text="ahead of position").wait_for()
    page.mouse.move(0, 0)
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_function(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
    )


def _compute(page: Page) -> None:
    page.locator("#lattice svg").first.wait_for()
    page.get_by_label("Cells computed").fill("11")


if __name__ == "__main__":
    main()
