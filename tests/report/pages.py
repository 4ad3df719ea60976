"""Reading of a page as a browser does, and runs for one."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np

from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.report.board import PageBoard
from flax_diffusion.core.report.curves import Curve

VOID = {"meta", "link", "img", "input", "br", "path", "wbr"}
FACTS = {
    "task": "unconditional", "model": "DDPMPipeline", "parameters": 12, "frozen": 0, "devices": "1 x cpu", "batch": 8,
    "total": 6, "command": "python -m flax_diffusion.train unconditional", "again": "python -m flax_diffusion.train",
    "environment": {"numpy": "2"},
}  # fmt: skip


class Page(HTMLParser):
    """A page: its tags, its text by the id of the section, and the data of its script. Tags must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.scripts, self.section = [], [], {}, [], ""
        self.styles = []
        self.feed(text)
        self.close()
        assert not self.open
        self.data = json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == "data"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attributes)["id"]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append((self.tags[-1][1], data))
        elif self.open[-1:] == ["style"]:
            self.styles.append(data)
        else:
            self.texts[self.section] = self.texts.get(self.section, "") + data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def curve(self, name, run=0):
        """Steps and means of a curve."""
        rows = Curve.from_json(self.data["runs"][run]["curves"][name]).rows
        return dict(zip(rows[:, 0].astype(int).tolist(), rows[:, 2].tolist(), strict=True))

    def check(self):
        """What holds for every page: it loads nothing, runs its own script alone, and is labelled throughout."""
        assert self.all("html") == [{"lang": "en"}]
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        for _, attributes in self.tags:
            for name in ("src", "href", "data", "action", "srcset", "poster"):
                assert attributes.get(name, "#").startswith(("#", "data:")), attributes
            assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert all("url(" not in style and "@import" not in style for style in self.styles)
        assert all(image["alt"] for image in self.all("img"))
        labels = {label.get("for") for label in self.all("label")}
        assert {one["id"] for one in self.all("input")} <= labels | {"log"}  # which lies in its label
        links = {link["href"][1:] for link in self.all("a")}
        assert links <= set(ids)
        assert len(self.all("h1")) == len(self.all("main")) == len(self.all("nav")) == 1
        assert all(any(name == "scope" for name in head) for head in self.all("th"))
        (_, code), (policy,) = self.scripts[-1], [m["content"] for m in self.all("meta") if "http-equiv" in m]
        for text in (code, *self.styles):
            assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
        assert "default-src 'none'" in policy
        assert len(self.scripts) == 2


def page_of(folder, name="report.html"):
    page = Page((folder / name).read_text())
    page.check()
    return page


def board(folder, first_step=1, see=list, options=None, clock=None, **facts):
    """The board of a run of six steps."""
    more = {} if clock is None else {"clock": clock}
    folder = as_path(str(folder))
    return PageBoard(folder, folder / "logs/report_data.json", FACTS | facts, options or {}, first_step, see, **more)


def noise(rng, side, channels=3):
    return rng.integers(0, 256, (side, side, channels), dtype=np.uint8)


def picture_of(address):
    """The pixels of an address that holds a picture."""
    import io

    from PIL import Image

    kind, _, content = address.partition(";base64,")
    assert re.fullmatch("data:image/(png|jpeg)", kind)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
