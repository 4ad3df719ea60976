"""Metadata files as people and programs write them: each gives its captions, or is refused in one line."""

import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from flax_diffusion.core.data.sources.folders import open_folder
from flax_diffusion.core.errors import DataError

CSV, JSONL = "metadata.csv", "metadata.jsonl"
HEAD = "file_name,text\n"


def row(name="a.png", text="x", **more):
    return json.dumps({"file_name": name, "text": text, **more}, ensure_ascii=False) + "\n"


ONE, TWO = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
ROWS = row("a.png", "one") + row("b.png", "two")
A, B = {"a.png": "one", "b.png": "two"}, {"a.png": "x"}

# What it is: its files, the pictures, and what comes of it: captions by picture, or how the refusal reads.
READ = {
    "csv": ({CSV: HEAD + "a.png,one\nb.png,two\n"}, A),
    "csv, no newline at the end": ({CSV: HEAD + "a.png,one\nb.png,two"}, A),
    "csv, byte-order mark": ({CSV: "\ufeff" + HEAD + "a.png,one\nb.png,two\n"}, A),
    "csv of Windows": ({CSV: "file_name,text\r\na.png,one\r\nb.png,two\r\n"}, A),
    "csv of an old Mac": ({CSV: "file_name,text\ra.png,one\rb.png,two\r"}, A),
    "csv, all in quotes": ({CSV: '"file_name","text"\n"a.png","one"\n"b.png","two"\n'}, A),
    "csv, a comma in quotes": ({CSV: HEAD + 'a.png,"a hat, red, on a dog"\n'}, {"a.png": "a hat, red, on a dog"}),
    "csv, a quote in quotes": ({CSV: HEAD + 'a.png,"the ""best"" hat"\n'}, {"a.png": 'the "best" hat'}),
    "csv, a quote without": ({CSV: HEAD + 'a.png,a 5" nail\n'}, {"a.png": 'a 5" nail'}),
    "csv, two lines in quotes": ({CSV: HEAD + 'a.png,"one\ntwo"\n'}, {"a.png": "one\ntwo"}),
    "csv, blank lines": ({CSV: "\n" + HEAD + "\na.png,one\n\n\nb.png,two\n\n"}, A),
    "csv, rows of nothing": ({CSV: HEAD + "a.png,one\n,\nb.png,two\n , \n"}, A),
    "csv, columns the other way round": ({CSV: "text,file_name\none,a.png\ntwo,b.png\n"}, A),
    "csv, more columns": ({CSV: "id,file_name,size,text\n1,a.png,,one\n2,b.png,9,two\n"}, A),
    "csv, an index of pandas": ({CSV: ",file_name,text\n0,a.png,one\n1,b.png,two\n"}, A),
    "csv, rows in another order": ({CSV: HEAD + "b.png,two\na.png,one\n"}, {"b.png": "two", "a.png": "one"}),
    "csv, an empty caption": ({CSV: HEAD + "a.png,\n"}, {"a.png": ""}),
    "csv, other writing": ({CSV: HEAD + "a.png,größer 北京 🙂\n"}, {"a.png": "größer 北京 🙂"}),
    "csv, column image": ({CSV: "image,text\na.png,one\nb.png,two\n"}, A),
    "csv, column image_file_name": ({CSV: "image_file_name,text\na.png,one\nb.png,two\n"}, A),
    "csv, several captions": ({CSV: HEAD + "a.png,one\na.png,two\na.png,one\n"}, {"a.png": ["one", "two"]}),
    "csv, a row twice": ({CSV: HEAD + "a.png,one\nb.png,two\na.png,one\n"}, A),
    "csv in folders": (
        {f"s/{CSV}": HEAD + "a.png,one\n", f"t/u/{CSV}": HEAD + "b.png,two\n"}, {"s/a.png": "one", "t/u/b.png": "two"}
    ),
    "csv beside a folder": ({CSV: HEAD + "s/a.png,one\n./t//b.png,two\n"}, {"s/a.png": "one", "t/b.png": "two"}),
    "jsonl": ({JSONL: ROWS}, A),
    "jsonl, byte-order mark": ({JSONL: "\ufeff" + ROWS}, A),
    "jsonl of Windows": ({JSONL: ROWS.replace("\n", "\r\n")}, A),
    "jsonl, no newline at the end": ({JSONL: ROWS.rstrip()}, A),
    "jsonl, blank lines": ({JSONL: "\n" + ROWS.replace("\n", "\n\n  \n")}, A),
    "jsonl, escapes": ({JSONL: '{"file_name": "a.png", "text": "gr\\u00f6\\u00dfer\\n"}'}, {"a.png": "größer\n"}),
    "jsonl, a separator of lines inside": ({JSONL: row(text="one\u2028two")}, {"a.png": "one\u2028two"}),
    "jsonl, several captions": ({JSONL: row(text=["one", "two"])}, {"a.png": ["one", "two"]}),
    "jsonl, one caption in a list": ({JSONL: row(text=["one"])}, {"a.png": ["one"]}),
    "jsonl, captions in two rows": ({JSONL: row(text="one") + row(text=["two", "one"])}, {"a.png": ["one", "two"]}),
    "jsonl, more values": ({JSONL: row(size=[1, {"a": None}])}, B),
    "jsonl, rows with other columns": ({JSONL: row(one=1) + row("b.png", two=2)}, B | {"b.png": "x"}),
    "jsonl, null beside a caption": ({JSONL: row(text=None) + row()}, B),
    "both, alike": ({JSONL: row("b.png", "two") + row("a.png", "one"), CSV: HEAD + "a.png,one\nb.png,two\n"}, A),
    "both, of different pictures": ({CSV: HEAD + "a.png,one\n", JSONL: row("b.png", "two")}, A),
    "of the folder above and its own, alike": (
        {JSONL: row("s/a.png"), f"s/{JSONL}": row("a.png")}, {"s/a.png": "x"}
    ),
    "accents as they are stored": ({JSONL: row(TWO)}, {TWO: "x"}),
    "a name with spaces and signs": ({JSONL: row("a b,#%.png")}, {"a b,#%.png": "x"}),
}  # fmt: skip
REFUSED = {
    "csv, a comma without quotes": (
        {CSV: HEAD + "a.png,a hat, red\n"}, ["a.png"],
        r"metadata\.csv, row 1 has 3 values for 2 columns: 'a\.png,a hat, red'; put a text with commas in",
    ),
    "csv, a comma in a later row": (
        {CSV: HEAD + "a.png,one\n\nb.png,two, three, four\n"}, ["a.png", "b.png"], r"row 2 has 4 values for 2 columns",
    ),
    "csv, a comma at the end": ({CSV: HEAD + "a.png,one,\n"}, ["a.png"], r"row 1 has 3 values for 2 columns"),
    "csv, too few values": ({CSV: HEAD + "a.png\n"}, ["a.png"], r"row 1 has 1 values for 2 columns"),
    "csv, a quote that is not closed": (
        {CSV: HEAD + 'a.png,"one\nb.png,two\n'}, ["a.png", "b.png"], r"cannot be read \(unexpected end of data\)",
    ),
    "csv, a quote that closes in another row": (
        {CSV: HEAD + 'a.png,"one\nb.png,"two"\n'}, ["a.png", "b.png"], r"cannot be read .*a quote inside quotes",
    ),
    "csv, semicolons": ({CSV: "file_name;text\na.png;x\n"}, ["a.png"], r"separates its columns by ';'; save it with"),
    "csv, tabs": ({CSV: "file_name\ttext\na.png\tx\n"}, ["a.png"], r"separates its columns by '\\t'; save it with"),
    "csv, one column twice": ({CSV: "file_name,text,text\na.png,x,y\n"}, ["a.png"], r"two columns text; rename or"),
    "csv, no header": ({CSV: "a.png,x\n"}, ["a.png"], r"has no column file_name; it has"),
    "csv, nothing": ({CSV: ""}, ["a.png"], r"has no column file_name; it has no rows"),
    "csv, a header alone": ({CSV: HEAD}, ["a.png"], r"has no column file_name; it has no rows"),
    "csv of UTF-16": ({CSV: (HEAD + "a.png,x\n").encode("utf-16")}, ["a.png"], r"must be CSV in UTF-8"),
    "csv of Latin-1": ({CSV: (HEAD + "a.png,größer\n").encode("latin-1")}, ["a.png"], r"must be CSV in UTF-8"),
    "csv, another caption column": (
        {CSV: "file_name,caption\na.png,x\n"}, ["a.png"],
        r"caption_column is text, but .*metadata\.csv has the columns file_name, caption; give --caption_column cap",
    ),
    "csv, a column with spaces": (
        {CSV: "file_name, text,id\na.png,x,1\n"}, ["a.png"], r"file_name, text, id; give --caption_column text",
    ),
    "letter case": (
        {JSONL: row("a.jpg")}, ["a.JPG"],
        r"names 1 files that do not exist: a\.jpg \(there is 'a\.JPG'\); names are relative to the metadata file, and",
    ),
    "a backslash": ({JSONL: row("s\\a.png")}, ["s/a.png"], r"not exist: s\\a\.png \(there is 's/a\.png'\); names are"),
    "a drive of Windows": ({JSONL: row("C:\\p\\a.png")}, ["a.png"], r"not exist: C:\\p\\a\.png \(there is 'a\.png'\)"),
    "relative to the folder above": (
        {f"s/{JSONL}": row("s/a.png")}, ["s/a.png"], r"s/metadata\.jsonl names .*: s/a\.png \(there is 'a\.png'\)",
    ),
    "accents stored in one piece": (
        {JSONL: row(ONE)}, [TWO],
        r"é\.png \(there is '.*\.png', whose accents are stored in another way: NFC and NFD\)",
    ),
    "accents stored in two": (
        {JSONL: row(TWO)}, [ONE],
        r"\.png \(there is 'é\.png', whose accents are stored in another way",
    ),
    "no extension": ({JSONL: row("a")}, ["a.png"], r"not exist: a \(there is 'a\.png'\)"),
    "another extension": ({JSONL: row("a.jpeg")}, ["a.png"], r"not exist: a\.jpeg \(there is 'a\.png'\)"),
    "a space at the end": ({JSONL: row("a.png ")}, ["a.png"], r"not exist: a\.png +\(there is 'a\.png'\)"),
    "in another folder": ({JSONL: row("images/a.png")}, ["s/a.png"], r"images/a\.png \(there is 's/a\.png'\)"),
    "a slip": ({JSONL: row("pictrue12.png")}, ["picture12.png"], r"pictrue12\.png \(there is 'picture12\.png'\)"),
    "many files that are gone": (
        {JSONL: "".join(row(f"{n}00.png") for n in range(1, 6))}, ["a.png"],
        r"names 5 files that do not exist: 100\.png, 200\.png, 300\.png, …; names",
    ),
    "a name that is null": ({JSONL: row(None)}, ["a.png"], r"row 1: file_name is None; it must be a path"),
    "a name that is empty": ({CSV: HEAD + ",x\n"}, ["a.png"], r"row 1: file_name is ''; it must be a path"),
    "a name that is a number": ({JSONL: row(7)}, ["a.png"], r"row 1: file_name is 7; it must be a path"),
    "a way out": ({JSONL: row("../a.png")}, ["a.png"], r"row 1: file_name \.\./a\.png: it leaves the folder"),
    "from the root": ({CSV: HEAD + "/etc/a.png,x\n"}, ["a.png"], r"row 1: file_name /etc/a\.png: it leaves"),
    "the folder itself": ({JSONL: row(".")}, ["a.png"], r"names 1 files that do not exist"),
    "jsonl, one name twice": (
        {JSONL: '{"file_name": "a.png", "text": "x", "text": "y"}\n'}, ["a.png"],
        r"line 1 is not JSON \(it gives 'text' twice\)",
    ),
    "jsonl, an array": ({JSONL: f"[{row().strip()}]"}, ["a.png"], r"line 1 is \[.*; write one object per line"),
    "jsonl over several lines": ({JSONL: json.dumps(json.loads(row()), indent=1)}, ["a.png"], r"line 1 is not JSON"),
    "jsonl with a comma after each": ({JSONL: row().strip() + ",\n"}, ["a.png"], r"line 1 is not JSON \(Extra data"),
    "jsonl of Python": ({JSONL: str({"file_name": "a.png", "text": "x"})}, ["a.png"], r"line 1 is not JSON"),
    "jsonl cut off": ({JSONL: ROWS[:-8]}, ["a.png", "b.png"], r"line 2 is not JSON"),
    "jsonl of Latin-1": ({JSONL: row(text="größer").encode("latin-1")}, ["a.png"], r"must be UTF-8"),
    "jsonl, half a character": ({JSONL: '{"file_name": "a.png", "text": "\\ud800"}'}, ["a.png"], r"not valid Unicode"),
    "jsonl, a number": ({JSONL: row(text=1.5)}, ["a.png"], r"row 1: the caption is 1\.5; it must be text"),
    "jsonl, NaN": ({JSONL: '{"file_name": "a.png", "text": NaN}'}, ["a.png"], r"the caption is nan; it must be text"),
    "jsonl, an object": ({JSONL: row(text={"en": "x"})}, ["a.png"], r"the caption is \{'en': 'x'\}; it must be text"),
    "jsonl, null": ({JSONL: row(text=None)}, ["a.png"], r"1 of 1 images in .* have no caption: a\.png; list them"),
    "jsonl, null in a list": ({JSONL: row(text=["x", None])}, ["a.png"], r"the caption is \['x', None\]; it must be"),
    "jsonl, an empty list": ({JSONL: row(text=[])}, ["a.png"], r"the caption is \[\]; it must be text"),
    "jsonl, deep": ({JSONL: row(more=json.loads("[" * 70 + "]" * 70))}, ["a.png"], r"nested more than 64 deep"),
    "a picture without a row": ({JSONL: row()}, ["a.png", "b.png"], r"1 of 2 images in .* have no caption: b\.png"),
    "both, not alike": (
        {JSONL: row(text="J"), CSV: HEAD + "a.png,C\n"}, ["a.png"],
        r"metadata\.csv and .*metadata\.jsonl give a\.png different captions, 'C' and 'J'; remove one of the rows",
    ),
    "of the folder above and its own, not alike": (
        {JSONL: row("s/a.png", "J"), f"s/{JSONL}": row("a.png", "K")}, ["s/a.png"], r"give s/a\.png different captions",
    ),
}  # fmt: skip


def write(folder: Path, files, pictures):
    for name in pictures:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1, 1)).save(path, "PNG")
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_sixty_at_least():
    assert len(READ) + len(REFUSED) >= 60


@pytest.mark.parametrize("kind", READ)
def test_read(tmp_path, kind):
    files, expected = READ[kind]
    write(tmp_path, files, expected)
    source = open_folder(tmp_path)
    records = [source[index] for index in range(len(source))]
    given = [(record.image.relative_to(tmp_path).as_posix(), record.caption) for record in records]
    assert given == [*expected.items()]


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path, kind):
    files, pictures, message = REFUSED[kind]
    write(tmp_path, files, pictures)
    with pytest.raises(DataError, match=message) as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)
