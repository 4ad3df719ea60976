"""The page in Chromium: drawn in time, with no error and no request, by keyboard, at the width of a phone.

It is skipped where there is no Chromium.
"""

import html
import json
import math
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
from pages import board, page_of
from PIL import Image

from flax_diffusion.core.io.files import write_text
from flax_diffusion.core.io.sheets import contact_sheet, save_picture
from flax_diffusion.core.report.files import PAGE
from flax_diffusion.core.report.pictures import embedded_pixels
from flax_diffusion.core.report.seen import Seen
from flax_diffusion.report import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STEPS, GRIDS = 10_000, 50
EVIL = '</script><img src="http://example.com/x.png" onerror="alert(1)">'

pytestmark = [pytest.mark.acceptance, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]


def pictures(rng):
    """Photos, as far as their file sizes go: soft shapes with some noise."""
    base = Image.fromarray(rng.integers(0, 256, (10, 10, 3), np.uint8)).resize((128, 128), Image.Resampling.BICUBIC)
    for _ in range(16):
        yield np.clip(np.asarray(base) + rng.normal(0, 25, (128, 128, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A run of many steps and grids, and the seconds of processor time that its page took."""
    folder, rng = tmp_path_factory.mktemp("long"), np.random.default_rng(0)
    captions = [f"a photo of a dog on a sofa {EVIL}\nseed {number}" for number in range(16)]

    def see():
        for picture in pictures(rng):
            address, size = embedded_pixels(picture.repeat(4, 0).repeat(4, 1), 60_000)
            yield Seen(name="a.png", caption=EVIL, rest="", beside="", address=address, size=size)

    begun = time.process_time()
    run = board(folder, see=lambda: [*see()][:12], options={"seed": 3, "prompts": [EVIL]}, total=STEPS)
    upkeep = time.process_time() - begun
    for step in range(1, STEPS + 1):
        values = {"loss": 0.1 + math.exp(-step / 900) + 0.05 * abs(rng.normal()), "grad_norm": rng.random() + 0.2}
        values |= {"learning_rate": 1e-4 * min(1, step / 500), "images_per_second": 100 + rng.normal()}
        begun = time.process_time()
        run.scalars({f"train/{name}": value for name, value in values.items()}, step)
        upkeep += time.process_time() - begun
        if step % (STEPS // GRIDS) == 0:
            sheet = contact_sheet([*pictures(rng)], 4, captions)
            save_picture(sheet, folder / f"samples/{step:08d}.png", {"captions": json.dumps(captions)})
            begun = time.process_time()
            run.image("samples", sheet, step)
            run.flush()
            upkeep += time.process_time() - begun
    begun = time.process_time()
    run.close()
    return folder, upkeep + time.process_time() - begun


def opened(file):
    """The page as it is after its script has run, and what the browser said of errors."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--enable-logging=stderr", "--v=0", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000",
        "--window-size=1280,900", "--dump-dom", f"file://{file}",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout, [line for line in ran.stderr.splitlines() if ":CONSOLE" in line]


def asked(file, folder, script, width=1280):
    """What a script returns in the page, which may not run it: the copy that is opened has no policy.

    It is in a frame, since no window of Chromium is as narrow as a phone.
    """
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", file.read_text())
    own = f"<script>parent.postMessage(JSON.stringify((() => {{{script}}})()), '*');</script></body>"
    write_text(folder / "asked.html", text.replace("</body>", own))
    (folder / "frame.html").write_text(
        "<!DOCTYPE html><title>x</title><body><script>onmessage = (e) => { document.body.dataset.said = e.data; };"
        f'</script><iframe src="asked.html" style="border: 0; width: {width}px; height: 900px"></iframe></body>'
    )
    dom, errors = opened(folder / "frame.html")
    assert not errors
    return json.loads(html.unescape(re.search(r'data-said="([^"]*)"', dom)[1]))


def test_figures(long_run, figure):
    folder, upkeep = long_run
    page = page_of(folder)
    assert len(page.data["runs"][0]["grids"]) == GRIDS
    size = (folder / PAGE).stat().st_size
    assert size < 15e6
    dom, errors = opened(folder / PAGE)
    assert not errors
    drawn = int(re.search(r'data-drawn="(\d+)"', dom)[1])
    assert drawn < 2000
    assert dom.count("<svg") == 4
    # Of the 87 ms a step of the recipe of the digits on two idle CPU cores; its grids take more on top.
    share = upkeep / (STEPS * 0.087)
    assert share < 0.01
    figure("page", f"{STEPS:,} steps, {GRIDS} grids: {size / 1e6:.1f} MB, drawn in {drawn / 1000:.2f} s")
    figure("page", f"its upkeep takes {upkeep:.1f} s, {share:.2%} of {STEPS:,} steps of the digits' recipe")


def test_errors_and_requests_would_be_seen(tmp_path):
    """What the test above relies on: the page's own policy refuses requests, and each refusal is an error."""
    policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'
    for body in (f'{policy}<img src="http://example.com/x.png">', "<script>nothing()</script>"):
        (tmp_path / "page.html").write_text(f"<!DOCTYPE html><title>x</title>{body}")
        assert opened(tmp_path / "page.html")[1], body


KEYS = """
const key = (place, name) => place.dispatchEvent(new KeyboardEvent("keydown", { key: name, cancelable: true }));
const plot = document.querySelector(".plot");
const said = [];
plot.focus();
for (const name of ["Home", "ArrowRight", "End", "ArrowLeft", "PageDown"]) {
  key(plot, name);
  said.push(plot.getAttribute("aria-valuetext"));
}
const line = () => plot.querySelector(".line").getAttribute("d");
const before = line();
document.getElementById("log").click();
said.push(line() !== before);
const logarithmic = line();
const smooth = document.getElementById("smooth");
smooth.value = 0;
smooth.dispatchEvent(new Event("input"));
said.push(line() !== logarithmic, document.getElementById("smoothing").textContent);
return said;
"""


def test_charts_by_keyboard(long_run, tmp_path):
    said = asked(long_run[0] / PAGE, tmp_path, KEYS)
    steps = [int(re.match(r"step ([\d,]+): 0?\.?\d", text)[1].replace(",", "")) for text in said[:5]]
    first, second, last, before, page = steps
    assert (first, last) == (7, STEPS)  # the first bucket is that of the steps up to 7
    assert (second, before) == (15, STEPS - 1)
    assert 9000 < page < 9900
    assert "(" in said[0]  # least and largest of the bucket
    assert said[5:] == [True, True, "0.00"]


GRIDS_SHOWN = """
const slider = document.getElementById("step");
const said = [];
const tell = () => {
  const image = document.querySelector(".grid img");
  said.push([document.getElementById("shown").textContent, slider.getAttribute("aria-valuetext"), image.alt,
    image.src.slice(0, 30), document.querySelectorAll(".grid li").length]);
};
tell();
document.getElementById("previous").click();
tell();
slider.value = 0;
slider.dispatchEvent(new Event("input"));
tell();
said.push(document.getElementById("previous").disabled);
document.getElementById("next").click();
tell();
return said;
"""


def test_the_slider_through_the_grids(long_run, tmp_path):
    said = asked(long_run[0] / PAGE, tmp_path, GRIDS_SHOWN)
    assert said.pop(3) is True
    assert [one[0] for one in said] == ["10,000", "9,800", "200", "400"]
    for shown, text, alt, address, captions in said:
        assert (text, alt, captions) == (f"step {shown}", f"Samples of step {shown}, 16 pictures", 16)
        assert address == "data:image/jpeg;base64,/9j/4AA"


WIDTH = """
const wide = [...document.querySelectorAll("main *")].filter((one) => !one.closest(".wide, nav") &&
  one.getBoundingClientRect().right > innerWidth + 1);
return [innerWidth, document.documentElement.scrollWidth, wide.map((one) => one.outerHTML.slice(0, 80))];
"""


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(long_run, tmp_path, width):
    other = tmp_path / "other.html"
    report(long_run[0], output_file=other)
    shown, page, wide = asked(other, tmp_path, WIDTH, width=width)
    assert (shown, page, wide) == (width, width, [])


def test_several_runs(long_run, tmp_path):
    for name in "ab":
        run = board(tmp_path / name, total=20)
        for step in range(1, 21):
            run.scalars({"train/loss": 1 / step, "train/grad_norm": 1.0}, step)
        run.close()
    report(tmp_path / "a", tmp_path / "b", long_run[0], output_file=tmp_path / "page.html")
    dom, errors = opened(tmp_path / "page.html")
    assert not errors
    for style, count in {"run-0 dash-0": 2, "run-1 dash-1": 2, "run-2 dash-2": 4}.items():  # charts that it is in
        assert dom.count(f'class="{style}"') == count
        assert dom.count(f'class="key {style}"') == 1
    said = asked(tmp_path / "page.html", tmp_path, KEYS)
    assert re.fullmatch(r"step 1: A: 1, B: 1", said[0])
