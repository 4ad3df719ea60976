"""Examples that Python gives: what may be one, how it is held, what is refused, and by which name."""

import itertools
import pickle

import datasets
import numpy as np
import pytest
from PIL import Image

from flax_diffusion.core.data.combined import CombinedSource
from flax_diffusion.core.data.images.decoding import decode
from flax_diffusion.core.data.sources.given import open_examples
from flax_diffusion.core.data.sources.labels import with_labels
from flax_diffusion.core.data.sources.source import ExtraImages, Part
from flax_diffusion.core.errors import ConfigError, DataError
from flax_diffusion.core.run.lineage import data_digest

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 5, 3), np.uint8)
CONDITIONING = ExtraImages(column="edges", option="conditioning_image_column", folder_option="conditioning_data_dir")


def examples(count=5):
    return [
        {"image": pixels, "text": f"picture {number}", "label": "ab"[number % 2], "edges": 255 - pixels}
        for number, pixels in enumerate(PIXELS[:count])
    ]


def decoded(source):
    return [np.asarray(decode(source[index])) for index in range(len(source))]


def made(form, folder):
    """A picture in a form."""
    Image.fromarray(PIXELS[0]).save(folder / "0.png")
    if form == "lazy":
        return Image.open(folder / "0.png")
    return {
        "uint8": PIXELS[0],
        "float32": (PIXELS[0] / 255).astype(np.float32),
        "float64": PIXELS[0] / 255,
        "Pillow": Image.fromarray(PIXELS[0]),
        "path": folder / "0.png",
        "name": str(folder / "0.png"),
        "bytes": (folder / "0.png").read_bytes(),
    }[form]


@pytest.mark.parametrize("held", [list, iter], ids=["sequence", "generator"])
@pytest.mark.parametrize("form", ["uint8", "float32", "float64", "Pillow", "lazy", "path", "name", "bytes"])
def test_a_picture_may_have_any_form(tmp_path, form, held):
    source = open_examples(held([{"image": made(form, tmp_path)}]), caption_column=None)
    np.testing.assert_array_equal(decoded(source), PIXELS[:1])


def test_grey_and_transparent_arrays():
    grey, clear = PIXELS[0, ..., :1], np.concatenate([PIXELS[0], np.zeros_like(PIXELS[0, ..., :1])], -1)
    given = [{"image": one} for one in (grey, grey[..., 0], clear)]
    first, second, third = decoded(open_examples(given, caption_column=None))
    np.testing.assert_array_equal(first, grey.repeat(3, -1))
    np.testing.assert_array_equal(second, first)
    assert (third == 255).all()


class Lazy:
    """A sequence that remembers what was read of it."""

    def __init__(self, count):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        return examples()[index % 5]


def test_a_sequence_is_read_when_it_is_used():
    lazy = Lazy(10**9)
    source = open_examples(lazy)
    assert len(source) == 10**9
    assert lazy.read == []
    assert source[7].caption == "picture 2"
    assert source[7].name == "examples[7]"
    assert set(lazy.read) == {7}
    assert len(open_examples(lazy, max_samples=3)) == 3


def test_a_generator_is_held():
    """What its pictures come from may change afterwards; options end one that does not end."""
    buffer = np.zeros((2, 2, 3), np.uint8)

    def endless():
        for number in itertools.count():
            buffer[:] = number
            yield {"image": buffer, "text": str(number)}

    source = open_examples(endless(), max_samples=3)
    assert [source[index].caption for index in range(3)] == ["0", "1", "2"]
    assert [picture[0, 0, 0] for picture in decoded(source)] == [0, 1, 2]
    assert source[0].image.dtype == np.uint8


def table(**options):
    rows = {"image": [Image.fromarray(one) for one in PIXELS], "text": [f"picture {number}" for number in range(5)]}
    features = {"image": datasets.Image(), "text": datasets.Value("string")}
    if options:
        rows, features = rows | {"label": [0, 1, 0, 1, 0]}, features | {"label": datasets.ClassLabel(names=["a", "b"])}
    return datasets.Dataset.from_dict(rows, datasets.Features(features))


def test_a_table_of_hugging_face():
    source = open_examples(table(label=True))
    np.testing.assert_array_equal(decoded(source), PIXELS)
    assert [source[index].caption for index in range(5)] == [f"picture {number}" for number in range(5)]
    labelled = with_labels(source, None)
    assert (labelled.labels.tolist(), labelled.classes) == ([0, 1, 0, 1, 0], ("a", "b"))
    renamed = table().rename_columns({"image": "photo", "text": "words"})
    other = open_examples(renamed, image_column="photo", caption_column="words", max_samples=2)
    assert (len(other), other[1].caption) == (2, "picture 1")
    with pytest.raises(DataError, match=r"--image_column is image, but dataset examples has the columns photo, words;"):
        open_examples(renamed)
    with pytest.raises(DataError, match="is a dictionary of the splits train, test: give one of them"):
        open_examples(datasets.DatasetDict(train=table(), test=table()))
    with pytest.raises(DataError, match="examples: there are none; give at least one"):
        open_examples(table().select([]))


@pytest.mark.parametrize("form", [lambda one: one.with_format("numpy"), lambda one: one.to_iterable_dataset()])
def test_tables_that_give_other_rows(form):
    """A format or a transform is the user's; a stream is read to its end."""
    np.testing.assert_array_equal(decoded(open_examples(form(table()))), PIXELS)
    transformed = table()
    transformed.set_transform(lambda rows: {"image": [255 - np.asarray(one) for one in rows["image"]]})
    np.testing.assert_array_equal(decoded(open_examples(transformed, caption_column=None)), 255 - PIXELS)


def test_a_file_that_a_table_names(tmp_path):
    Image.fromarray(PIXELS[0]).save(tmp_path / "0.png")
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "0.png")]}).cast_column("image", datasets.Image())
    np.testing.assert_array_equal(decoded(open_examples(rows, caption_column=None)), PIXELS[:1])


def test_classes_and_second_pictures():
    source = open_examples(examples(), extra=CONDITIONING)
    labelled = with_labels(source, None)
    assert (labelled.labels.tolist(), labelled.classes) == ([0, 1, 0, 1, 0], ("a", "b"))
    np.testing.assert_array_equal(np.asarray(decode(source[3].extra)), 255 - PIXELS[3])
    held = open_examples(iter(examples()), extra=CONDITIONING)
    np.testing.assert_array_equal(np.asarray(decode(held[3].extra)), 255 - PIXELS[3])
    numbers = [{"image": one, "kind": np.int64(number)} for number, one in enumerate(PIXELS)]
    assert with_labels(open_examples(numbers, caption_column=None), "kind").labels.tolist() == [0, 1, 2, 3, 4]


def changed(place, **parts):
    given = examples()
    given[place] = {name: value for name, value in (given[place] | parts).items() if value is not ...}
    return given


def broken():
    yield examples()[0]
    raise OSError("the camera is gone")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed(3, image=...), r"examples\[3\] has no 'image', only text, label, edges: add it, or name another part "
                                "by --image_column"),
        (changed(3, text=...), r"examples\[3\] has no 'text', only image, label, edges: .* by --caption_column"),
        (changed(3, text=None), r"examples\[3\] has no 'text', only image, label, edges"),
        (changed(3, text=7), r"examples\[3\]: its 'text' is 7; it must be a text or a list of texts"),
        (changed(3, text=[]), r"examples\[3\] has no caption; give it one or remove it"),
        (changed(3, edges=...), r"examples\[3\] has no 'edges', .* by --conditioning_image_column"),
        (changed(3, edges=7), r"examples\[3\]: its 'edges' is 7; it must be a Pillow image, an array, the path of a"),
        (changed(3, image=[[0]]), r"examples\[3\]: its 'image' is \[\[0\]\]; it must be a Pillow image"),
        (changed(3, image=np.int64([[0]])), r"examples\[3\]: its 'image' is an array of int64; it must be uint8, or "),
        (changed(3, image=PIXELS[0] > 9), "is an array of bool; it must be uint8, or floats in"),
        (changed(3, image=PIXELS[0, 0, 0]), r"has the shape \(3,\); it must be \(H, W\), \(H, W, 1\), \(H, W, 3\) or "),
        (changed(3, image=PIXELS[0].transpose(2, 0, 1)), r"has the shape \(3, 6, 5\); .*; move the channels to the"),
        (changed(3, image=np.zeros((0, 4, 3))), r"has the shape \(0, 4, 3\)"),
        (changed(3, image=PIXELS[3] / 2), r"has floats from [0-9.]+ to 12[0-9.]+; they must be in"),
        (changed(3, image=np.full((2, 2), np.nan)), "has floats from nan to nan; they must be in"),
        (changed(3, image=-np.ones((2, 2))), "has floats from -1 to -1; they must be in"),
        (changed(3, image=Image.fromarray(np.ones((2, 2), np.float32))), "has floating-point pixels, with no defined"),
        ([*examples(3), "a.png"], r"examples\[3\]: must be a mapping such as \{'image': picture\}, and is a str"),
    ],
)  # fmt: skip
def test_what_no_example_is(given, message):
    """The index is named, of a sequence when the example is read, of a generator at once."""
    source = open_examples(given, extra=CONDITIONING)
    assert source[0].caption == "picture 0"
    with pytest.raises(DataError, match=message) as caught:
        source[3]
    assert caught.value.example == "examples[3]"
    with pytest.raises(DataError, match=message):
        open_examples(iter(given), extra=CONDITIONING)


def test_a_class_that_is_missing():
    with pytest.raises(DataError, match=r"examples\[2\] has no 'label', only image, text, edges: .* by --label_column"):
        with_labels(open_examples(changed(2, label=...)), None)


def test_a_file_that_is_not_there(tmp_path):
    source = open_examples([{"image": tmp_path / "none.png"}], caption_column=None)
    with pytest.raises(DataError, match=r"examples\[0\] has disappeared since"):
        decode(source[0])
    with pytest.raises(DataError, match=r"examples\[0\] cannot be read"):
        source.described(0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "examples: there are none; give at least one"),
        (iter([]), "examples: there are none; give at least one"),
        ("a.png", r"examples 'a.png': must be a sequence or a generator of mappings .*, and is a str"),
        ({"image": PIXELS}, r"must be a sequence or a generator of mappings such as \{'image': picture\}.* is a dict"),
        (7, "examples 7: must be a sequence or a generator of mappings"),
        (broken(), r"examples\[1\] cannot be read \(OSError: the camera is gone\)"),
    ],
)
def test_what_holds_no_examples(given, message):
    with pytest.raises(DataError, match=message):
        open_examples(given)


def test_a_sequence_that_fails():
    class Failing(Lazy):
        def __getitem__(self, index):
            raise RuntimeError("no disk")

    with pytest.raises(DataError, match=r"examples\[1\] cannot be read \(RuntimeError: no disk\)"):
        open_examples(Failing(3))[1]


def test_a_folder_of_second_pictures(tmp_path):
    folder = ExtraImages(column="edges", folder=tmp_path, option="mask_column", folder_option="mask_data_dir")
    with pytest.raises(DataError, match=r"--mask_data_dir .*: goes with a folder of pictures, and examples has rows"):
        open_examples(examples(), extra=folder)


def test_examples_for_other_processes():
    source = open_examples(examples(), num_workers=1)
    np.testing.assert_array_equal(decoded(pickle.loads(pickle.dumps(source))), PIXELS)  # noqa: S301

    class Local(Lazy):
        pass

    assert len(open_examples(Local(3))) == 3
    with pytest.raises(
        ConfigError, match=r"--dataloader_num_workers 2: the examples cannot be copied to other process"
    ):
        open_examples(Local(3), num_workers=2)


def test_the_fingerprint():
    """It is of the pictures, whatever form they are given in, also through what wraps them."""
    digests = {
        data_digest(open_examples(given, caption_column=None))
        for given in (examples(), iter(examples()), [{"image": Image.fromarray(one)} for one in PIXELS])
    }
    assert len(digests) == 1
    other = changed(4, image=PIXELS[0])
    for wrap in (
        lambda source: source,
        lambda source: Part(source, np.array([1, 4])),
        lambda source: CombinedSource([source], ["a prompt"], [2]),
        lambda source: with_labels(source, None),
    ):
        same, differs = (data_digest(wrap(open_examples(given))) for given in (examples(), other))
        assert same == data_digest(wrap(open_examples(examples())))
        assert same != differs
    edges = [
        data_digest(open_examples(given, extra=CONDITIONING)) for given in (examples(), changed(2, edges=PIXELS[0]))
    ]
    assert edges[0] != edges[1]
