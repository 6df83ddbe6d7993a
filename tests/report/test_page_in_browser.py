"""The page in headless Chromium: on a phone nothing sticks out, in the dark it is dark, and its pictures are there.

The page itself runs no script, so another one holds it in a frame of the device's width and measures.
"""

import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from full_document import full_document
from nets import labelled, mlp_onnx
from PIL import Image
from precision_records import record

from rsi_deploy import export
from rsi_deploy.report.pages.bench import bench_page
from rsi_deploy.report.pages.report import report_page
from rsi_deploy.report.schema import read_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

LONG = "model.encoder.layers.{}.a_module_with_a_rather_long_name.attention.self.query_key_value.projection"
MEASURE = """
const frame = document.querySelector("iframe");
const page = frame.contentDocument, root = page.documentElement;
const box = e => e.getBoundingClientRect();
const outside = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll, .hidden, .skip, svg, details"))
  .filter(e => box(e).right > root.clientWidth + 0.5 || box(e).left < -0.5).map(e => e.tagName + "." + e.className);
const seen = e => box(e).width > 0;  // of the narrow and the wide drawing of a picture, one is
const pictures = [...page.querySelectorAll("svg")].filter(seen);
const share = e => box(e).width / box(e.closest(".block")).width;
const letters = pictures.flatMap(p => [...p.querySelectorAll("text")]).filter(e => e.textContent.trim())
  .map(e => box(e));  // a logarithmic axis leaves some labels empty
const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;  // a box is a little larger than its letters
const labels = p => [...p.querySelectorAll("text")].filter(e => e.textContent.trim());
const covered = [...page.querySelectorAll("#precision svg")].map(labels).flatMap(all => all.flatMap(
  (a, i) => all.slice(0, i).filter(b => meet(box(a), box(b))).map(b => `${a.textContent} on ${b.textContent}`)));
document.querySelector("#found").textContent = JSON.stringify({
  width: root.clientWidth, needed: root.scrollWidth, outside: outside.slice(0, 5),
  pictures: pictures.map(p => [box(p).width, box(p).height]),
  alone: pictures.filter(p => !p.closest(".both")).map(share),
  clipped: letters.filter(b => b.right > root.clientWidth || b.left < 0).length,
  smallest: Math.min(...letters.map(b => Math.min(b.width, b.height))),
  ground: getComputedStyle(page.body).backgroundColor, ink: getComputedStyle(page.body).color,
  bars: [...new Set([...page.querySelectorAll("svg path[fill='#0068a8']")].map(e => getComputedStyle(e).fill))],
  covered: covered,
  framed: page.querySelectorAll("section").length,
});
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    data = labelled(root / "d.npz", mlp_onnx(root / "m.onnx"))
    export(
        str(root / "m.onnx"),
        root / "b",
        rank=6,
        data=data,
        calib=data,
        allow_shared_data=True,
        bench_seconds=0.2,
        allow_slower=True,
    )
    report = read_report(root / "b")
    sites = tuple(
        site.model_copy(update={"name": LONG.format(i), "reason": "split " + "because of much " * 6})
        for i, site in enumerate(report.sites * 20)
    )
    return {
        "report": (root / "b" / "report.html").read_text(encoding="utf-8"),
        "long": report_page(report.model_copy(update={"sites": sites, "command": "x" * 300}), "{}"),
        "precision": report_page(report.model_copy(update={"precision": record()}), "{}"),
        "bench": bench_page(full_document()),
    }


def chromium(tmp_path, *arguments, dark=False):
    command = [
        CHROMIUM,
        "--headless=new",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--no-sandbox"] * (os.getuid() == 0)
    command += ["--blink-settings=preferredColorScheme=0"] * dark
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        pytest.skip(f"Chromium does not start here: {done.stderr.strip()[-200:]}")
    return done.stdout


def measured(tmp_path, page, width, *, dark=False):
    """What a frame of this width finds of the page."""
    framed = f'<iframe style="width:{width}px;height:4000px;border:0" srcdoc="{html.escape(page)}"></iframe>'
    script = f'<script>addEventListener("load", () => {{{MEASURE}}})</script>'
    harness = tmp_path / "harness.html"
    harness.write_text(f"<!doctype html><body>{framed}<pre id=found></pre>{script}", encoding="utf-8")
    dom = chromium(tmp_path, "--window-size=1400,900", "--dump-dom", f"file://{harness}", dark=dark)
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))


def brightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@pytest.mark.parametrize("name", ["report", "long", "precision", "bench"])
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_sticks_out(tmp_path, pages, name, width):
    found = measured(tmp_path, pages[name], width)
    assert found["framed"] > 5
    assert found["width"] == width
    assert found["needed"] <= width, found["outside"]
    assert found["outside"] == []
    assert found["clipped"] == 0
    assert found["covered"] == []
    assert len(found["pictures"]) >= 5
    assert all(0 < w <= max(480, width - 100) and h > 40 for w, h in found["pictures"])
    assert found["alone"] != []
    assert all(share >= 0.98 for share in found["alone"]), "they take the width of the content"
    assert found["smallest"] >= 5  # px; the letter that is smallest


def test_the_measurement_sees_labels_that_overlap(tmp_path, pages):
    page = re.sub(r"(<text[^>]*>)3(</text>)", r"\g<1>3 covers others\2", pages["precision"])
    assert page != pages["precision"]
    assert len(measured(tmp_path, page, 360)["covered"]) > 0


def test_the_measurement_sees_what_sticks_out(tmp_path, pages):
    page = pages["report"].replace("<main", '<p style="width:500px">x</p><main', 1)
    found = measured(tmp_path, page, 360)
    assert found["needed"] > 360
    assert found["outside"] != []


@pytest.mark.parametrize("dark", [False, True])
def test_colours_follow_the_reader(tmp_path, pages, dark):
    found = measured(tmp_path, pages["report"], 360, dark=dark)
    ground, ink = brightness(found["ground"]), brightness(found["ink"])
    assert (ground < 60 and ink > 200) if dark else (ground > 230 and ink < 80)
    assert found["bars"] == (["rgb(90, 180, 240)"] if dark else ["rgb(0, 104, 168)"])


@pytest.mark.parametrize("dark", [False, True])
def test_a_screenshot_shows_the_page(tmp_path, pages, dark):
    (tmp_path / "page.html").write_text(pages["report"], encoding="utf-8")
    shot = tmp_path / "page.png"
    chromium(tmp_path, "--window-size=1200,1600", f"--screenshot={shot}", f"file://{tmp_path / 'page.html'}", dark=dark)
    pixels = np.asarray(Image.open(shot).convert("L"), dtype=float)
    assert pixels.shape == (1600, 1200)
    median = np.median(pixels)
    assert median < 60 if dark else median > 230
    assert pixels.std() > 10  # it is not blank
