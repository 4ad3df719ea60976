"""The page as HTML: what is in it, that texts of others do no harm, and how many bytes its pictures take."""

import json
import math

import numpy as np
import pytest
from pages import board, noise, page_of, picture_of
from PIL import Image

from flax_diffusion.core.io.metrics_file import MetricsFile
from flax_diffusion.core.io.sheets import contact_sheet, save_picture
from flax_diffusion.core.report import pictures
from flax_diffusion.core.report.files import PAGE
from flax_diffusion.core.report.options import changed_options, differing_options, shown_value, without_home
from flax_diffusion.core.report.pictures import Grids, embedded_pixels, evenly_spaced
from flax_diffusion.core.report.seen import Seen

EVIL = '</script><img src=x onerror="alert(1)"> & <b>bold</b> \u2028 \ud800'


def grid(folder, step, captions=(), side=8, count=4):
    rng = np.random.default_rng(step)
    sheet = contact_sheet([noise(rng, side) for _ in captions or range(count)], captions=captions)
    texts = {"step": str(step)} | ({"captions": json.dumps(list(captions))} if captions else {})
    save_picture(sheet, folder / f"samples/{step:08d}.png", texts)
    return sheet


def seen(**changes):
    address, size = embedded_pixels(np.full((8, 8, 3), 200, np.uint8), 10_000)
    one = Seen(name="1.png", caption="a dog", rest="", beside="", address=address, size=size)
    return [Seen(**one | changes)]  # pyright: ignore[reportArgumentType]


def test_what_is_on_it(tmp_path):
    sheets = {step: grid(tmp_path, step, ["a dog\nseed 1", "a cat"]) for step in (2, 6)}
    options = {"learning_rate": 0.5, "seed": 0, "output_dir": str(tmp_path), "resolution": 64}
    run = board(tmp_path, see=seen, options=options)
    for step in range(1, 7):
        run.scalars({"train/loss": 1 / step, "train/grad_norm": math.inf if step == 3 else 1.0}, step)
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, writes=True)
    metrics.add(3, {"fid": 30.0})
    metrics.add(6, {"fid": 20.0, "kid": math.nan})
    run.close()
    page = page_of(tmp_path)
    assert page.curve("train/loss") == pytest.approx({step: 1 / step for step in range(1, 7)})
    assert page.curve("fid") == {3: 30, 6: 20}
    assert math.isnan(page.curve("train/grad_norm")[3])
    assert [chart["title"] for chart in page.data["charts"]] == ["Loss", "FID", "KID", "Gradient norm"]
    assert [plot["data-curve"] for plot in page.all("div") if plot.get("class") == "plot"] == [
        "train/loss", "fid", "kid", "train/grad_norm",
    ]  # fmt: skip
    assert "Ended: step 6 of 6" in page.texts[""]
    for text in ("unconditional", "DDPMPipeline", "12 train, 0 stay as they are", "1 x cpu"):
        assert text in page.texts[""]
    (run,) = page.data["runs"]
    assert [one["step"] for one in run["grids"]] == [2, 6]
    assert run["grids"][0]["captions"] == ["a dog\nseed 1", "a cat"]
    assert (picture_of(run["grids"][0]["src"]) == np.asarray(sheets[2])).all()
    last, first_batch = page.all("img")
    assert run["grids"][1]["src"] == ""  # it is there already
    assert (picture_of(last["src"]) == np.asarray(sheets[6])).all()
    assert last["alt"] == "Samples of step 6, 2 pictures"
    assert (picture_of(first_batch["src"]) == 200).all()
    (slider,) = [one for one in page.all("input") if one["id"] == "step"]
    assert (slider["min"], slider["max"], slider["aria-valuetext"]) == ("0", "1", "step 6")
    assert "a cat" in page.texts["samples"]
    assert "a dog 1.png" in page.texts["seen"]
    assert "--learning_rate0.50.0001" in page.texts["options"]
    assert page.texts["options"].index("--learning_rate") < page.texts["options"].index("--seed")
    assert "python -m flax_diffusion.train unconditional" in page.texts["command"]
    assert "numpy2" in page.texts["environment"]
    assert "FID20.0020.0030.00" in page.texts["values"]
    assert "Step" in page.texts["curves"]
    assert "not finite" in page.texts["curves"]


def test_texts_of_others_stay_texts(tmp_path):
    grid(tmp_path, 1, [EVIL.replace("\ud800", ""), "b"])
    options = {"validation_prompts": [EVIL], f"x{EVIL}": EVIL, "learning_rate": "</style>"}
    run = board(
        tmp_path, see=lambda: seen(name=EVIL, caption=EVIL, rest="bold", beside=EVIL), options=options,
        task=EVIL, model=EVIL, devices=EVIL, command=EVIL, again=EVIL, environment={EVIL: EVIL},
    )  # fmt: skip
    run.scalars({"train/loss": 1.0, f"train/{EVIL}": 2.0}, 1)
    run.close()
    page = page_of(tmp_path)
    assert not page.all("b")
    assert len(page.all("img")) == 2
    assert not [image for image in page.all("img") if image["src"] == "x"]
    text = (tmp_path / PAGE).read_text()
    assert text.count("</script>") == 2
    assert 'onerror="alert' not in text
    assert EVIL[:9] + "<img" in page.texts["samples"]
    assert page.data["runs"][0]["grids"][0]["captions"][0].startswith("</script><img")
    (damaged,) = [name for name in page.data["runs"][0]["curves"] if name != "train/loss"]
    assert damaged.startswith("train/</script>")


def test_an_address_that_is_none_is_left_out(tmp_path):
    """The data file lies on a disk that others may write to."""
    board(tmp_path, see=lambda: seen(address="https://example.com/a.png")).close()
    assert not page_of(tmp_path).all("img")


def test_a_run_that_reads_latents_has_captions_alone(tmp_path):
    board(tmp_path, see=lambda: seen(address="", size=(0, 0))).close()
    page = page_of(tmp_path)
    assert "The run reads latents" in page.texts["seen"]
    assert "a dog" in page.texts["seen"]
    assert not page.all("img")


def test_nothing_to_show_yet(tmp_path):
    board(tmp_path, total=9).close()
    page = page_of(tmp_path)
    assert "Stopped early: step 0 of 9" in page.texts[""]
    assert {link["href"] for link in page.all("a")} == {"#main", "#command", "#environment"}


def test_which_grids_are_shown():
    names = [f"{step}" for step in range(1, 200)]
    for count in range(1, 200):
        chosen = evenly_spaced(names[:count])
        assert len(chosen) <= pictures.MOST_GRIDS + 1
        assert (chosen[0], chosen[-1]) == ("1", str(count))
        assert set(evenly_spaced(names[: count + 1])[:-1]) <= {*chosen}  # what was left out does not come back
    assert evenly_spaced(names[:50]) == names[:50]
    assert evenly_spaced([]) == []


def test_more_grids_than_a_page_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_GRIDS", 4)
    for step in range(1, 10):
        grid(tmp_path, step, side=4, count=1)
    (tmp_path / "samples/notes.txt").write_text("mine")
    run = board(tmp_path)
    run.close()
    page = page_of(tmp_path)
    assert [one["step"] for one in page.data["runs"][0]["grids"]] == [1, 5, 9]
    assert "3 of 9 grids are here" in page.texts["samples"]


def test_each_grid_is_read_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(pictures, "_read", lambda file, limit: read.append((file.stem, limit)))
    grids = Grids(tmp_path / "samples", budget=160)
    (tmp_path / "samples").mkdir()
    for step in range(1, 10):
        (tmp_path / f"samples/{step}.png").touch()
        grids.all()
    assert read == [(str(step), 20) for step in range(1, 9)] + [(str(step), 10) for step in range(1, 10)]


def test_a_grid_that_is_damaged_is_left_out(tmp_path, caplog):
    grid(tmp_path, 1)
    grid(tmp_path, 2)
    (tmp_path / "samples/00000003.png").write_bytes(b"no picture")
    (tmp_path / "samples/00000004.png").write_bytes((tmp_path / "samples/00000001.png").read_bytes()[:200])
    board(tmp_path).close()
    assert [one["step"] for one in page_of(tmp_path).data["runs"][0]["grids"]] == [1, 2]
    assert "00000003.png is left out of the page" in caplog.text
    assert "00000004.png is left out of the page" not in caplog.text or len(caplog.records) == 2


@pytest.mark.parametrize(("side", "limit"), [(20, 10_000), (300, 400_000), (300, 30_000), (700, 30_000), (90, 3_000)])
def test_pictures_fit_their_share(side, limit):
    """Noise is what takes the most bytes."""
    pixels = noise(np.random.default_rng(0), side)
    address, size = embedded_pixels(pixels, limit)
    shown = picture_of(address)
    assert shown.shape == (size[1], size[0], 3)
    if side <= 128:  # of few pixels, without loss
        assert (shown == pixels).all()
        return
    assert len(address) <= limit
    assert size[0] >= 60
    if limit == 400_000:
        assert size == (300, 300)


def test_a_picture_of_another_mode(tmp_path):
    sheet = Image.fromarray(noise(np.random.default_rng(0), 300)).convert("RGBA")
    (tmp_path / "samples").mkdir()
    sheet.save(tmp_path / "samples/00000001.png")
    assert sheet.mode == "RGBA"
    (one,) = Grids(tmp_path / "samples").all()
    assert (one.size, one.captions) == ((300, 300), ())


def test_options_as_they_are_shown(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert shown_value("/home/me/pictures") == "~/pictures"
    assert shown_value(["/home/me/a", "b"]) == "~/a, b"
    assert shown_value("/home/menace/a") == "/home/menace/a"
    assert [shown_value(value) for value in (True, None, [], 0.5, {"a": 1})] == [
        "true",
        "none",
        "none",
        "0.5",
        "{'a': 1}",
    ]
    assert without_home(["train", "--data", "/home/me/my pictures", "a b"]) == "train --data ~/'my pictures' 'a b'"
    values = {"learning_rate": 1e-4, "seed": 3, "unet": {"a": 1}, "of_another_version": 1, "report_to": ["csv"]}
    assert changed_options("unconditional", values) == {
        "seed": "0", "unet": "none", "of_another_version": None, "report_to": "tensorboard",
    }  # fmt: skip
    assert changed_options("of_a_package", {"a": 1}) == {"a": None}
    assert differing_options([{"a": 1, "b": 2, "output_dir": "x"}, {"a": 1, "c": 2, "output_dir": "y"}]) == ["b", "c"]
