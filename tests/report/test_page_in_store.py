"""The page of a run whose folder is in an object store."""

import os

import fsspec
import numpy as np
import pytest
from fake_gcs import Store
from pages import Page, board
from PIL import Image

from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.io.sheets import save_picture
from flax_diffusion.core.report.files import DATA, PAGE
from flax_diffusion.report import report

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # of which the server here knows nothing


@pytest.fixture
def run():
    """Its folder; reads and writes go to a server of this process."""
    with Store() as store, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", store.url)
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        yield as_path("gs://bucket/runs/a")
        assert not store.unknown


def test_a_page_in_a_store(run, tmp_path):
    first = board(run)
    for step in (1, 2, 3):
        first.scalars({"train/loss": step}, step)
    save_picture(Image.fromarray(np.zeros((8, 8), np.uint8)), run / "samples/00000002.png")
    first.flush()
    assert not (run / PAGE).exists()  # it was not due
    second = board(run, first_step=3)
    second.scalars({"train/loss": 9.0}, 3)
    second.close()
    page = Page((run / PAGE).read_text())
    page.check()
    assert page.curve("train/loss") == {1: 1, 2: 2, 3: 9}
    assert [one["step"] for one in page.data["runs"][0]["grids"]] == [2]
    assert {path.name for path in run.iterdir()} == {PAGE, "samples", "logs"}
    assert [path.name for path in (run / "logs").iterdir()] == [DATA]
    assert str(report(str(run))) == f"{run}/{PAGE}"
    assert Page((run / PAGE).read_text()).data == page.data
    report(str(run), output_file=str(tmp_path / "here.html"))
    assert Page((tmp_path / "here.html").read_text()).data == page.data
