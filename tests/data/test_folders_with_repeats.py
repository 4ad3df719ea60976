"""Several folders of pictures, each of which says how often its pictures occur in an epoch."""

from collections import Counter
from pathlib import Path

import pytest
from tiny import RUN, pictures

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.data.combined import Folder, folders_of
from flax_diffusion.core.errors import ConfigError, DataError
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.train import train


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [pictures(tmp_path / name, count) for name, count in (("photos", 3), ("drawings", 2))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("photos", [("photos", None)]),
        ("photos:10", [("photos", 10)]),
        ("photos:10,drawings", [("photos", 10), ("drawings", None)]),
        ("deep/photos:1, drawings:2", [("deep/photos", 1), ("drawings", 2)]),
        ("gs://a/photos", [("gs://a/photos", None)]),
        ("gs://a/photos:3,gs://b/drawings", [("gs://a/photos", 3), ("gs://b/drawings", None)]),
        ("a:b", [("a:b", None)]),
        pytest.param(",".join(f"a{n}:2" for n in range(500)), [(f"a{n}", 2) for n in range(500)], id="many"),
    ],
)
def test_how_they_are_written(text, expected):
    assert folders_of(text) == [Folder(*one) for one in expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("photos:0", "photos:0: pictures occur a whole number of times in an epoch, such as photos:1"),
        ("photos:-2", "photos:-2: pictures occur a whole number of times"),
        ("photos:1.5", "photos:1.5: pictures occur a whole number of times"),
        ("photos:2,", "'photos:2,': must be a folder, or several such as photos:10,drawings:2; one has no name"),
        (":2", "':2': must be a folder"),
        ("photos:2,photos", "photos lies in photos, so that its pictures would occur for both"),
        ("photos,photos/deep:3", "photos/deep lies in photos, so that its pictures would occur for both"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        folders_of(text)


def test_names_that_look_like_several(folders, tmp_path):
    """A folder that is there is itself, unless its name can also be read as folders that are there."""
    for name in ("cats,dogs", "10:30", "photos:2", "odd,,name"):
        (tmp_path / name).mkdir()
    for name in ("cats,dogs", "10:30", "odd,,name"):
        assert folders_of(name) == [Folder(name, None)]
    with pytest.raises(ConfigError, match=r"^photos:2: is the name of a folder, and a list of others .*: rename"):
        folders_of("photos:2")


def opened(task="text_to_image", **changes):
    base = {"pretrained_model_name_or_path": "base"} if task != "unconditional" else {}
    task = task_of(command_line.merge(task, {}, base | changes, ""))
    source = task.open_source()
    assert len(source) == task.count_examples(source)
    return [source[index] for index in range(len(source))]


@pytest.mark.parametrize("given", ["photos:3,drawings", ["photos:3", "drawings:1"]])
def test_pictures_occur_as_often_as_is_said(folders, given):
    """As text or as a list, each with the captions of its folder."""
    records = opened(train_data_dir=given)
    assert Counter(Path(record.name).parent.name for record in records) == {"photos": 9, "drawings": 2}
    assert {record.caption for record in records} == {f"a photo of a dog number {number}" for number in range(3)}
    assert max(Counter(record.name for record in records).values()) == 3
    assert len(opened("unconditional", train_data_dir="photos:2")) == 6


def test_a_new_word(folders):
    """Folders that do not say how often have --repeats."""
    word = {"placeholder_token": "<toy>", "initializer_token": "dog"}
    count = len(opened("textual_inversion", train_data_dir="photos,drawings:2", repeats=5, **word))
    assert count == 3 * 5 + 2 * 2
    with pytest.raises(ConfigError, match="--repeats 5: all folders of --train_data_dir have their own; drop one of"):
        opened("textual_inversion", train_data_dir="photos:1,drawings:2", repeats=5, **word)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("text_to_image", {"max_train_samples": 3}, "^--max_train_samples 3 does not say of which of several folders"),
        ("controlnet", {"conditioning_data_dir": "photos"}, "^--conditioning_data_dir photos has one picture for each"),
        ("text_to_image", {"train_data_dir": "photos:1,none"}, "^--train_data_dir: none does not exist"),
        ("text_to_image", {"train_data_dir": "photos:0"}, "^--train_data_dir: photos:0: pictures occur a whole number"),
        ("text_to_image", {"train_data_dir": ["a,b", "c"]}, "a,b: a folder in a list has no comma in its name"),
    ],
)
def test_what_does_not_go_together(folders, task, changes, message):
    with pytest.raises((ConfigError, DataError), match=message):
        opened(task, **{"train_data_dir": "photos:2,drawings"} | changes)


def test_a_run_on_several(folders, tmp_path):
    """It may write into none of them, and is written down as it was given."""
    options = RUN | {"dataset_name": None, "train_data_dir": "photos:2,drawings", "max_train_samples": None}
    options |= {"max_train_steps": 1}
    with pytest.raises(ConfigError, match="--output_dir drawings/run: lies in --train_data_dir drawings, so that"):
        train("unconditional", **options, output_dir="drawings/run")
    out = train("unconditional", **options, output_dir="run")
    assert command_line.read_yaml(out / "config.yaml")["train_data_dir"] == "photos:2,drawings"
