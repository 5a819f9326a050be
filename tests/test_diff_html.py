"""The HTML page: self-contained, escaped, and alive in a real browser (where there is one)."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cli_models import make_misspelt

from fxpass import cli, diff, target
from fxpass.diff_html import page
from fxpass.diff_svg import picture
from fxpass.options import Options
from fxpass.sites import Decline
from fxpass.torch_private import inside_inductor

TARGET = f"{Path(__file__).parent / 'cli_models.py'}:make_misspelt"
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser")) if p), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium; none is installed")


@pytest.fixture(scope="module")
def made():
    model, args = make_misspelt()
    with inside_inductor():
        graphs = target.Target("model", model, args).graphs()
        return diff.of_graphs("model", graphs, Options(providers=("reference",), strict=True))


def large(made: diff.Diff, count: int) -> diff.Diff:
    """The same diff with many sites, each with a module path of its own."""
    sites = [
        dataclasses.replace(
            made.sites[i % 4],
            record=dataclasses.replace(made.sites[i % 4].record, module=f"layers.{i}.norm"),
        )
        for i in range(count)
    ]
    report = dataclasses.replace(made.report, rewritten=[site.record for site in sites])
    return dataclasses.replace(made, sites=tuple(sites), report=report)


def test_page_needs_no_network(made) -> None:
    text = page(made)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe)\b|@import|src=", text)


def test_everything_is_escaped(made) -> None:
    evil = '</script><script>alert("x")</script>'
    report = dataclasses.replace(made.report, declined=[Decline("n", evil, evil, evil, evil)])
    record = dataclasses.replace(made.sites[0].record, source=evil, module=evil)
    site = dataclasses.replace(made.sites[0], record=record, before=(evil,))
    text = page(dataclasses.replace(made, target=evil, report=report, sites=(site,)))
    assert evil not in text
    assert text.count("<script>") == 1
    (embedded,) = re.findall(
        r'<script type="application/json" id="report">(.*?)</script>', text, re.DOTALL
    )
    assert json.loads(embedded)["declined"][0]["reason"] == evil


def test_pictures_hold_every_value(made) -> None:
    flow = made.sites[0].flow_before
    svg = picture(flow, "a < b")
    assert svg.count("<rect") == len(flow.labels)
    assert svg.count("<path") == len(flow.edges)
    assert "<title>a &lt; b</title>" in svg


def summary_of(text: str) -> dict[str, str]:
    found = re.findall(r"<dt>(.*?)</dt><dd[^>]*>(.*?)</dd>", text)
    return {name.removesuffix(" *"): html.unescape(value) for name, value in found}


def test_summary_counts_launches_and_bytes() -> None:
    model, args = make_misspelt()
    options = Options(providers=("cpu",), strict=True)
    with inside_inductor():
        graphs = target.Target("model", model, args).graphs()
        found = diff.of_graphs("model", graphs, options)
    shown = summary_of(page(found))
    sites = found.report.rewritten
    old, new = sum(s.bytes_before for s in sites), sum(s.bytes_after for s in sites)
    assert shown["launches of these norms"] == "35 → 4"
    assert shown["bytes read and written by them"] == f"{old:,} → {new:,}"
    assert old > 5 * new
    assert "Left out" not in page(found)


def test_summary_says_what_is_not_counted(made) -> None:
    known = dataclasses.replace(
        made.report.rewritten[0], launches_before=8, launches_after=1, bytes_before=9
    )
    report = dataclasses.replace(made.report, rewritten=[known, *made.report.rewritten[1:]])
    text = page(dataclasses.replace(made, report=report))
    assert summary_of(text)["launches of these norms"] == "8 → 1"
    assert summary_of(text)["bytes read and written by them"] == "not known"
    said = " ".join(re.findall(r'<p class="note">(.*?)</p>', text, re.DOTALL)[0].split())
    assert "Left out: 3 norms of kernels that are not one launch" in said
    assert "for the bytes also 1 norms with sizes that are known only at run time" in said


def test_numerics_are_on_the_page(made) -> None:
    assert 'id="numerics"' not in page(made)
    change = {"elements": 1024, "differ": 17, "ulps": 3}
    site = {"name": "layers.1", "location": "m.py:1", "kernel": "k", "label": "", "change": change}
    whole = {"what": "rewritten / eager", "change": change, "top1": 0.5, "first_output": 0}
    text = page(made, {"sites": [site], "whole": [whole], "first_site": 0})
    assert "The first difference enters at layers.1." in text
    assert "<td>rewritten / eager</td><td>1024</td><td>17</td><td>3</td><td>50.00 %</td>" in text


def test_kinds_are_drawn_once(made) -> None:
    text = page(large(made, 500))
    assert text.count('<details class="entry" data-type="site"') == 500
    assert text.count("<svg") == 2 * 3


def test_command_writes_the_page(capsys, tmp_path: Path) -> None:
    path = tmp_path / "diff.html"
    assert cli.main(["diff", TARGET, "--html", str(path)]) == 0
    assert "mean is over dim -2" in path.read_text()
    assert "rewrote 4 of 5" in capsys.readouterr().out


SCRIPT = """
<script>
const shown = () => [...document.querySelectorAll(".entry")].filter((e) => !e.hidden).length;
const set = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("input")); };
const found = { all: shown(), wide: document.documentElement.scrollWidth, inner: innerWidth };
document.dispatchEvent(new KeyboardEvent("keydown", { key: "/" }));
found.focus = document.activeElement.id;
set("search", "LAYERS.123.norm"); found.one = shown(); found.count = $("count").textContent;
set("search", "mean is over"); found.reason = shown();
document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" })); found.again = shown();
set("show", "miss"); found.misses = shown(); set("show", "");
set("kernel", "reference.eager"); found.kernel = shown(); set("kernel", "");
document.querySelector(".entry[data-type=site] a").click();
found.picture = document.querySelector("[id^=kind-]").open;
let copied = null;
document.execCommand = () => { copied = document.activeElement.value; };
const button = document.querySelector("#copy-report");
button.click();
setTimeout(() => {
  found.copied = copied ? JSON.parse(copied).rewritten.length : "clipboard";
  found.button = button.textContent;
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
}, 300);
</script>
"""


def browse(path: Path, *options: str) -> str:
    """The page after its scripts ran, as Chromium has it."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    flags += [f"--user-data-dir={path.parent / 'profile'}", *options]
    command = [str(CHROMIUM), *flags, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_in_a_browser_with_500_sites(made, tmp_path: Path, width: int) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(large(made, 500)).replace("</body>", SCRIPT + "</body>"))
    dom = browse(path, "--dump-dom", f"--window-size={width},900")
    (text,) = re.findall(r'<pre id="found">(.*?)</pre>', dom)
    found = json.loads(html.unescape(text))
    assert (found["all"], found["one"], found["reason"], found["misses"]) == (501, 1, 1, 1)
    assert found["count"] == "1 of 501 shown"
    assert found["kernel"] == 500
    assert found["again"] == 501
    assert found["focus"] == "search"
    assert found["picture"] is True
    assert found["wide"] <= found["inner"], "the page scrolls sideways"
    assert found["copied"] in (500, "clipboard")
    assert found["button"] == "copied"
