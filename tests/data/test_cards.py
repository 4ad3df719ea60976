"""Cards of datasets, README.md, in copies of datasets of the Hub, beside what `datasets` itself takes from them."""

from io import BytesIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flax_diffusion.core.data.sources.folders import open_folder
from flax_diffusion.core.errors import DataError

_BUFFER = BytesIO()
Image.new("RGB", (2, 2)).save(_BUFFER, "PNG")
PNG = _BUFFER.getvalue()

FILES = ("cats/train-0.parquet", "cats/test-0.parquet", "dogs/train-0.parquet", "dogs/deep/a.parquet", "more.parquet")
SPLITS = "[{split: train, path: cats/train-*}, {split: test, path: cats/test-*}]"
CARDS = {
    "splits": (f"- {{config_name: default, data_files: {SPLITS}}}", None),
    "of two, the default": (
        "- {config_name: default, data_files: dogs/*}\n- {config_name: b, data_files: cats/*}",
        None,
    ),
    "of two, marked": (
        "- {config_name: a, data_files: dogs/*}\n- {config_name: b, data_files: cats/*, default: true}",
        None,
    ),
    "of two, by name": (
        "- {config_name: default, data_files: dogs/*}\n- {config_name: b, data_files: cats/test*}",
        "b",
    ),
    "one of another name": ("- {config_name: pets, data_files: more.parquet}", None),
    "below": ("- {config_name: default, data_files: dogs/**}", None),
    "several": ("- {config_name: default, data_files: [more.parquet, 'cats/tr*']}", None),
    "several in a split": (
        "- {config_name: default, data_files: [{split: train, path: [more.parquet, dogs/tr*]}]}",
        None,
    ),
    "in a folder": ("- {config_name: default, data_dir: cats}", None),
}


def copy_of_a_dataset(root, configs):
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        rows = {"image": [{"bytes": PNG, "path": None}], "text": [name]}
        pq.write_table(pa.table(rows), root / name)
    (root / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{configs}\n---\n# Pets\n")
    return root


@pytest.mark.parametrize("case", CARDS)
def test_as_datasets_reads_it(tmp_path, case):
    configs, config = CARDS[case]
    root = copy_of_a_dataset(tmp_path / "pets", configs)
    loaded = datasets.load_dataset(str(root), config, split="train", cache_dir=str(tmp_path / "hub"))
    source = open_folder(root, config_name=config, cache_dir=tmp_path / "cache")
    assert sorted(source[index].caption for index in range(len(source))) == sorted(loaded["text"])


def test_pictures_and_their_text_files(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    (tmp_path / "README.md").write_text("---\nconfigs:\n- {config_name: x, data_files: 'a/*.png'}\n---\n")
    source = open_folder(tmp_path)
    assert [source[index].caption for index in range(len(source))] == ["a/1.png", "a/2.png"]


def test_files_in_a_folder(tmp_path):
    """`datasets` takes both into account, but does not open such a copy."""
    root = copy_of_a_dataset(tmp_path, "- {config_name: default, data_dir: dogs, data_files: 'train*'}")
    assert open_folder(root, cache_dir=tmp_path / "cache")[0].caption == "dogs/train-0.parquet"


@pytest.mark.parametrize(
    ("configs", "config", "says"),
    [
        ("- {config_name: a}\n- {config_name: b}", None, "has the configurations a, b; choose one with"),
        ("- {config_name: cats}", "cat", r"name cat: .*README\.md has the configurations cats; did you mean"),
        ("- {config_name: a, data_files: [{split: test, path: x}]}", None, "name a has no split train; it has test"),
        ("- {config_name: a, data_files: 'train**'}", None, r"a names train\*\*, which is not a valid glob pattern"),
        ("- {config_name: a, data_files: birds/*}", None, r"names birds/\*, but no file in the folder matches"),
        ("- {config_name: a, data_files: [{split: train}]}", None, "data_files must be paths, or a list of mappings"),
        ("- a", None, "`configs` must be a list of mappings, each with a config_name"),
        ("- {config_name: [", None, r"README\.md: its header cannot be read \(.*; repair it or remove the file"),
    ],
)  # fmt: skip
def test_a_card_that_does_not_help(tmp_path, configs, config, says):
    root = copy_of_a_dataset(tmp_path, configs)
    with pytest.raises(DataError, match=says) as caught:
        open_folder(root, config_name=config, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_other_texts_are_no_cards(tmp_path):
    root = copy_of_a_dataset(tmp_path, "- {config_name: a, data_files: more.parquet}")
    for text in ("# Pets\nconfigs: many\n", "---\nlicense: mit\n---\n", "---\nno end"):
        (root / "README.md").write_text(text)
        with pytest.raises(DataError, match=r"holds files of the split test .* beside files of no split"):
            open_folder(root)
