"""The HTML page as a person meets it: Chromium driven by Playwright, with keyboard, phone and dark.

Screenshots go to build/screenshots, or where `pytest --screenshots` says. Needs Chromium from the
distribution and the extra `browser`.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from test_diff_html import large, made  # noqa: F401  (a fixture)

from fxpass.diff_html import page as written

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: pip install 'fxpass[browser]'"
)
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser")) if p), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium; none is installed"),
]

DESK = {"viewport": {"width": 1400, "height": 900}}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
SITES = 1000


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(made, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("page") / "diff.html"
    path.write_text(written(large(made, SITES)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def show(browser, address):
    """`show(DESK, "dark")` is the page; it fails if the page asked for anything or complained."""
    contexts, faults = [], []

    def opened(device: dict, scheme: str = "light"):
        context = browser.new_context(**device, color_scheme=scheme)
        contexts.append(context)
        shown = context.new_page()
        shown.on("console", lambda message: faults.append(message.text))
        shown.on("pageerror", lambda error: faults.append(str(error)))
        shown.on("request", lambda asked: asked.url == address or faults.append(asked.url))
        shown.goto(address)
        return shown

    yield opened
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture
def shoot(request: pytest.FixtureRequest):
    folder = Path(request.config.getoption("--screenshots"))
    folder.mkdir(parents=True, exist_ok=True)

    def taken(shown, name: str) -> None:
        path = folder / f"{name}.png"
        shown.screenshot(path=path)
        assert path.stat().st_size > 5000

    return taken


def visible(shown) -> int:
    return shown.locator(".entry:visible").count()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", ["desk", "phone"])
def test_readable(show, shoot, device: str, scheme: str) -> None:
    shown = show({"desk": DESK, "phone": PHONE}[device], scheme)
    shoot(shown, f"top-{device}-{scheme}")
    for pair in ("ink paper", "dim paper", "dim soft", "ink out", "ink in", "link paper"):
        assert contrast(shown, *pair.split()) >= 4.5, pair
    shown.locator(".entry[data-type=site] summary").first.click()
    shown.locator(".entry[data-type=site] a").first.click()
    shoot(shown, f"picture-{device}-{scheme}")
    shown.locator("#graphs summary").first.click()
    shown.locator("#graphs tr.in").first.scroll_into_view_if_needed()
    shoot(shown, f"graph-{device}-{scheme}")
    wide = shown.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0, "the page scrolls sideways"
    assert shown.locator("#graphs tr.out").count() > shown.locator("#graphs tr.in").count() >= 4


def contrast(shown, ink: str, paper: str) -> float:
    """WCAG's contrast of two of the page's colours."""
    lights = sorted(_light(shown, name) for name in (ink, paper))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def _light(shown, name: str) -> float:
    text = shown.evaluate(
        """(name) => { const spot = document.createElement("i"); document.body.append(spot);
        spot.style.color = `var(--${name})`; const color = getComputedStyle(spot).color;
        spot.remove(); return color; }""",
        name,
    )
    parts = [int(part) / 255 for part in re.findall(r"\d+", text)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_dark_is_dark(show) -> None:
    assert _light(show(DESK, "dark"), "paper") < 0.05 < 0.9 < _light(show(DESK), "paper")


@pytest.mark.parametrize("device", [DESK, PHONE], ids=["desk", "phone"])
def test_search_and_filter(show, shoot, device: dict) -> None:
    shown = show(device)
    assert visible(shown) == SITES + 1
    shown.fill("#search", "LAYERS.123.norm")
    assert visible(shown) == 1
    assert shown.inner_text("#count") == f"1 of {SITES + 1} shown"
    shoot(shown, f"search-{'phone' if device is PHONE else 'desk'}")
    box = shown.locator(".entry:visible").bounding_box()
    assert box["y"] < device["viewport"]["height"], "what was found is out of sight"
    shown.fill("#search", "no such norm")
    assert visible(shown) == 0
    shown.fill("#search", "")
    shown.select_option("#show", "miss")
    assert visible(shown) == 1
    assert "mean is over dim -2" in shown.locator(".entry:visible").inner_text()
    shown.select_option("#show", "")
    shown.select_option("#kernel", "reference.eager")
    assert visible(shown) == SITES
    took = shown.evaluate(
        """() => { const start = performance.now(); $("search").value = "layers.9";
        $("search").dispatchEvent(new Event("input")); document.body.offsetHeight;
        return performance.now() - start; }"""
    )
    assert visible(shown) == 111
    assert took < 1000, "milliseconds to filter"


def test_keyboard_alone(show, shoot) -> None:
    shown = show(DESK)
    shown.keyboard.press("/")
    shown.keyboard.type("layers.5.")
    assert visible(shown) == 1
    assert focused(shown) == "INPUT"
    stops = []
    while not stops or stops[-1] != "SUMMARY":
        shown.keyboard.press("Tab")
        stops.append(focused(shown))
        assert len(stops) < 9
    assert stops == ["SELECT", "SELECT", "BUTTON", "SUMMARY"]
    outline = shown.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "3px"
    shown.keyboard.press("Enter")
    assert shown.locator(".entry:visible").evaluate("entry => entry.open")
    shoot(shown, "keyboard")
    shown.keyboard.press("Tab")
    shown.keyboard.press("Enter")
    assert shown.evaluate("location.hash") == "#kind-1"
    assert shown.locator("#kind-1").evaluate("kind => kind.open")
    shown.keyboard.press("Escape")
    assert visible(shown) == SITES + 1


def focused(shown) -> str:
    return shown.evaluate("document.activeElement.tagName")


def test_what_is_copied(show) -> None:
    shown = show(DESK)
    shown.context.grant_permissions(["clipboard-read", "clipboard-write"])
    shown.click("#copy-report")
    shown.wait_for_function("$('copy-report').textContent == 'copied'")
    report = clipboard(shown)
    assert len(report["rewritten"]) == SITES
    shown.locator(".entry[data-type=miss] .copy").click()
    assert clipboard(shown) == report["declined"][0]
    shown.locator(".entry[data-type=site] summary").first.click()
    shown.locator(".entry[data-type=site] .copy").first.click()
    site = clipboard(shown)
    assert site["module"] == "layers.0.norm"
    assert len(site["before"]) == site["nodes_before"]


def clipboard(shown) -> dict:
    shown.wait_for_timeout(100)
    return json.loads(shown.evaluate("navigator.clipboard.readText()"))


def test_controls_have_names(show) -> None:
    shown = show(DESK)
    nameless = shown.evaluate(
        """[...document.querySelectorAll("input, select, button, a, summary, svg")].filter((e) =>
        !(e.labels?.[0] ?? e).textContent.trim()).length"""
    )
    assert nameless == 0
    assert shown.get_by_role("searchbox", name="search").count() == 1
    assert shown.get_by_role("navigation").get_by_role("link").count() == 4
    assert shown.get_by_role("main").count() == 1
