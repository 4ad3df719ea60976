"""Statistics of real pictures on disk: ours, those of others, and files that do not fit."""

import numpy as np
import pytest
from PIL import Image

from flax_diffusion.core.data.images.transforms import ImageTransform
from flax_diffusion.core.errors import ConfigError, DataError
from flax_diffusion.core.metrics import pictures
from flax_diffusion.core.metrics.reference import Kind, Reference, check_comparable, open_archive, save_reference
from flax_diffusion.core.metrics.statistics import Moments

KIND = Kind(feature="inception", size=(8, 6), channels=3, weights="abcd")


@pytest.fixture
def features():
    return np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)


def test_what_is_written_is_read(tmp_path, features):
    made = Reference.of(Moments.of(features), KIND, features[::2])
    save_reference(tmp_path / "new/made.npz", made)
    archive = open_archive(tmp_path / "new/made.npz")
    found = archive.statistics
    assert archive.pictures_shape is None
    assert (found.count, found.kind) == (40, KIND)
    for name in ("mean", "covariance", "features"):
        np.testing.assert_array_equal(getattr(found, name), getattr(made, name))
    with np.load(tmp_path / "new/made.npz") as arrays:  # as pytorch-fid and clean-fid read it
        np.testing.assert_allclose(arrays["sigma"], np.cov(features.astype(float), rowvar=False), rtol=1e-12)


def test_files_of_others(tmp_path, features):
    mean, covariance = features.mean(0), np.cov(features, rowvar=False)
    np.savez(tmp_path / "fid.npz", mu=mean, sigma=covariance)
    found = open_archive(tmp_path / "fid.npz")
    assert (found.statistics.kind, found.statistics.count, found.statistics.features) == (None, None, None)
    drawn = np.random.default_rng(0).integers(0, 256, (7, 8, 6, 3), np.uint8)
    np.savez_compressed(
        tmp_path / "guided.npz", mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance, arr_0=drawn
    )  # fmt: skip
    np.savez(tmp_path / "pictures.npz", arr_0=drawn, arr_1=np.arange(7))
    for name in ("guided", "pictures"):
        found = open_archive(tmp_path / f"{name}.npz")
        assert found.pictures_shape == (7, 8, 6, 3)
        assert (found.statistics is None) == (name == "pictures")
        parts = [*found.batches(3)]
        assert [len(part) for part in parts] == [3, 3, 1]
        np.testing.assert_array_equal(np.concatenate(parts), drawn)


class Runs:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.ones(2)}, "holds mean; must hold mu and sigma, or pictures as arr_0"),
        ({}, "holds nothing; must hold"),
        ({"mu": np.ones(2), "sigma": np.ones((2, 3))}, r"mu has shape \(2,\) and sigma \(2, 3\)"),
        ({"mu": np.ones(2), "sigma": np.full((2, 2), np.nan)}, "values that are not finite"),
        ({"mu": np.array([Runs()], object), "sigma": np.ones((1, 1))}, "is no npz file of statistics"),
        ({"mu": np.array(["a"]), "sigma": np.ones((1, 1))}, "is no npz file of statistics"),
        ({"mu": np.ones(1), "sigma": np.ones((1, 1)), "feature": "pixels"}, "is no npz file of statistics"),
        ({"arr_0": np.ones((3, 8, 8, 3))}, r"arr_0 is float64 \(3, 8, 8, 3\), must be uint8 pictures"),
    ],
)
def test_wrong_files(tmp_path, arrays, message):
    np.savez(tmp_path / "file.npz", **arrays, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        open_archive(tmp_path / "file.npz")


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r"--reference .*none.npz: does not exist; give an npz file or a folder"):
        open_archive(tmp_path / "none.npz")
    for name, content in (("text.npz", b"text"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="is no npz file of statistics or pictures"):
            open_archive(tmp_path / name)
    np.save(tmp_path / "array", np.ones(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(DataError, match="is no npz file"):
        open_archive(tmp_path / "array.npz")
    np.savez(tmp_path / "whole.npz", mu=np.ones(9), sigma=np.eye(9))
    data = (tmp_path / "whole.npz").read_bytes()
    for end in range(0, len(data), 97):
        (tmp_path / "cut.npz").write_bytes(data[:end])
        with pytest.raises(DataError, match="is no npz file"):
            open_archive(tmp_path / "cut.npz")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            {"feature": "pixels"},
            r"--reference x: is of the feature 'inception', the pictures are judged by pixels: give",
        ),
        ({"size": (8, 8)}, "is of pictures of 6x8 pixels, those to judge have 8x8: make one of that size"),
        ({"channels": 1}, "is of RGB pictures, those to judge are grey"),
        ({"weights": "other"}, r"was made with other weights \(abcd\) than --inception has \(other\)"),
    ],
)
def test_statistics_of_something_else(kind, message):
    reference = Reference(mean=np.ones(5), covariance=np.eye(5), kind=KIND)
    judged = Kind(**(vars(KIND) | kind))
    check_comparable(reference, KIND, 5, "x")
    with pytest.raises(ConfigError, match=message):
        check_comparable(reference, judged, 5, "x")
    others = Reference(mean=np.ones(5), covariance=np.eye(5))  # which does not say what it is of
    check_comparable(others, judged, 5, "x")
    with pytest.raises(ConfigError, match=r"has 5 features, the pictures have 2048 \(inception\)"):
        check_comparable(others, KIND, 2048, "x")


def test_pictures_of_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(20, 30), (12, 9), (8, 8), (40, 8), (9, 9)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{number}.png")
    source = pictures.open_pictures(str(tmp_path), "--images")
    assert pictures.size_of_first(source) == (30, 20)
    found = [*pictures.batches(source, (8, 8), 3, "bilinear", 2)]
    assert [batch.shape for batch in found] == [(2, 8, 8, 3), (2, 8, 8, 3), (1, 8, 8, 3)]
    transform = ImageTransform(resolution=8, center_crop=True)
    for number, picture in enumerate(np.concatenate(found)):
        with Image.open(tmp_path / f"{number}.png") as image:
            pixels, _ = transform(image, None)
        np.testing.assert_allclose(picture.transpose(2, 0, 1) / 127.5 - 1, pixels, atol=1e-6)
    grey = np.concatenate([*pictures.batches(source, (8, 8), 1, "bilinear", 2, count=4)])
    assert grey.shape == (4, 8, 8, 1)
    with pytest.raises(DataError, match=r"1.png has 12x9 pixels, the first picture 20x30: give --resolution"):
        list(pictures.batches(source, (30, 20), 3, "bilinear", 2, resize=False))
    with pytest.raises(DataError, match=r"--images .*/none: does not exist; give a folder of pictures"):
        pictures.open_pictures(str(tmp_path / "none"), "--images")
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(DataError, match=r"--images: .*text.txt is a file; give a folder"):
        pictures.open_pictures(str(tmp_path / "text.txt"), "--images")
