"""The command that judges pictures, from end to end on tiny models, and the one line that a mistake is told."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from inception_reference import random_weights
from PIL import Image
from safetensors.torch import save_file
from tiny import ONE_BLOCK, RUN, TEXT_RUN, UNET, stable_diffusion

from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.errors import ConfigError, DataError, UserError, WeightsError
from flax_diffusion.core.metrics import distances
from flax_diffusion.core.metrics.statistics import Moments
from flax_diffusion.evaluate import evaluate, main
from flax_diffusion.generate import generate
from flax_diffusion.jax_backend.features import FeatureExtractor
from flax_diffusion.jax_backend.sharding import make_mesh
from flax_diffusion.models.inception import read_inception
from torch_backend.train import train

PIXELS = {"features": "pixels", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    options = RUN | {"unet": UNET | ONE_BLOCK, "max_train_steps": 2}
    return str(train("unconditional", **options, output_dir=str(tmp_path_factory.mktemp("digits") / "run")))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(train("text_to_image", **TEXT_RUN, output_dir=str(tmp_path_factory.mktemp("text") / "run")))


@pytest.fixture(scope="module")
def scans():
    source = open_source(dataset_name="digits", caption_column=None)
    return np.stack([source[index].image for index in range(len(source))])


def vectors(pictures):
    return pictures.reshape(len(pictures), -1) / np.float32(255)


def frechet(drawn, real):
    moments = [Moments.of(vectors(pictures)) for pictures in (drawn, real)]
    return distances.frechet_distance(*(part for one in moments for part in (one.mean, one.covariance)))


def test_it_judges_what_generate_draws(digits, scans, tmp_path):
    """And neither the batch nor the way in which the reference is given changes a value."""
    metrics = ["fid", "precision,recall"]
    whole = evaluate(
        model=digits, reference="digits", metrics=metrics, num_images=70, batch_size=70, seed=3,
        save_reference=str(tmp_path / "digits.npz"), **PIXELS,
    )  # fmt: skip
    drawn = generate(digits, num_images=70, num_inference_steps=2, seed=3, batch_size=70)
    (row,) = whole
    assert row["pictures"] == 70
    assert row["fid"] == pytest.approx(frechet(drawn, scans), rel=1e-6)
    expected = distances.precision_recall(vectors(drawn), vectors(scans))
    assert (row["precision"], row["recall"]) == (*expected,)
    kept = evaluate(
        model=digits, reference=str(tmp_path / "digits.npz"), metrics=metrics, num_images=70, batch_size=32, seed=3,
        **PIXELS,
    )  # fmt: skip
    assert kept[0]["fid"] == pytest.approx(row["fid"], rel=1e-3)  # a batch changes a pixel by 1 at most
    with np.load(tmp_path / "digits.npz") as arrays:
        assert arrays["features"].shape == (1797, 64)
        assert (arrays["resolution"].tolist(), int(arrays["channels"]), str(arrays["feature"])) == ([8, 8], 1, "pixels")


def test_several_scales_and_prompts(text, scans, tmp_path, capsys):
    prompts = ["a handwritten two", "a handwritten seven"]
    main([
        "--model", text, "--reference", "digits", "--features", "pixels", "--num_images", "6", "--prompt", *prompts,
        "--guidance_scale", "1.0", "4", "--num_inference_steps", "2", "--scheduler", "ddim",
        "--output", str(tmp_path / "new/values.json"),
    ])  # fmt: skip
    printed = capsys.readouterr()
    assert re.fullmatch(r"guidance_scale  pictures +fid\n +1 +6 +\S+\n +4 +6 +\S+\n", printed.out)
    assert "guidance 4" in printed.err
    found = json.loads((tmp_path / "new/values.json").read_text())
    assert (found["model"], found["reference"], found["features"]) == (text, "digits", "pixels")
    for row, scale in zip(found["results"], (1.0, 4.0), strict=True):
        drawn = generate(
            text, prompt=prompts, num_images=3, guidance_scale=scale, num_inference_steps=2, scheduler="ddim"
        )
        assert (row["guidance_scale"], row["pictures"]) == (scale, 6)
        assert row["fid"] == pytest.approx(frechet(drawn, scans), rel=1e-3)
    assert found["results"][0]["fid"] != found["results"][1]["fid"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 1,000 pictures of 4x4 pixels, in RGB."""
    root, rng = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    made = {}
    for name, mean in (("real", 120), ("drawn", 135)):
        (root / name).mkdir()
        made[name] = np.clip(rng.standard_normal((1000, 4, 4, 3)) * 30 + mean, 0, 255).astype(np.uint8)
        for number, pixels in enumerate(made[name]):
            Image.fromarray(pixels).save(root / name / f"{number:04d}.png")
    np.savez(root / "pictures.npz", arr_0=made["real"])
    real = vectors(made["real"]).astype(np.float64)
    np.savez(root / "others.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    return root, made


def test_pictures_that_are_there(folders):
    root, made = folders
    by_folder, by_archive = (
        evaluate(images=str(root / "drawn"), reference=str(root / name), metrics="kid,fid", features="pixels", seed=5)
        for name in ("real", "pictures.npz")
    )
    assert by_folder == by_archive
    (row,) = by_folder
    assert [*row] == ["pictures", "fid", "kid", "kid_std"]
    features = [vectors(made[name]) for name in ("drawn", "real")]
    assert row["fid"] == pytest.approx(frechet(made["drawn"], made["real"]), rel=1e-6)
    assert (row["kid"], row["kid_std"]) == pytest.approx((*distances.kernel_distance(*features, seed=5),), rel=1e-5)
    others = evaluate(images=str(root / "drawn"), reference=str(root / "others.npz"), features="pixels")
    assert others[0]["fid"] == pytest.approx(row["fid"], rel=1e-6)


def test_a_reference_alone(folders, capsys, tmp_path):
    root, made = folders
    file = tmp_path / "real.npz"
    main([
        "--reference", str(root / "real"), "--features", "pixels", "--resolution", "4", "--channels", "3",
        "--save_reference", str(file),
    ])  # fmt: skip
    printed = capsys.readouterr()
    assert (printed.out, printed.err.endswith("real.npz is written\n")) == ("", True)
    with np.load(file) as arrays:
        assert "features" not in arrays
        np.testing.assert_allclose(arrays["mu"], vectors(made["real"]).mean(0), rtol=1e-5)
    (row,) = evaluate(images=str(root / "drawn"), reference=str(file), features="pixels", num_images=300)
    assert row["fid"] == pytest.approx(frechet(made["drawn"][:300], made["real"]), rel=1e-6)
    with pytest.raises(
        ConfigError, match=r"holds no features, only their mean and covariance, and --metrics kid needs"
    ):
        evaluate(images=str(root / "drawn"), reference=str(file), features="pixels", metrics="kid")


@pytest.mark.acceptance
def test_inception(folders, tmp_path):
    """The command gives the network's features to each metric; and another network's statistics are refused."""
    root, made = folders
    files = []
    for seed in (0, 1):
        files.append(str(tmp_path / f"{seed}.safetensors"))
        save_file(random_weights(seed), files[-1])
    kept = str(tmp_path / "real.npz")
    few = {"images": str(root / "drawn"), "num_images": 12, "batch_size": 6, "inception": files[0]}
    real = tmp_path / "real"
    real.mkdir()
    for number in range(12):
        shutil.copy(root / f"real/{number:04d}.png", real)
    (row,) = evaluate(**few, reference=str(real), metrics=["is", "fid", "recall"], save_reference=kept)
    assert [*row] == ["pictures", "fid", "is", "is_std", "recall"]
    extractor = FeatureExtractor("inception", make_mesh(-1, 1), 6, read_inception(files[0]))
    (drawn, logits), (features, _) = extractor(made["drawn"][:12]), extractor(made["real"][:12])
    moments = [Moments.of(drawn), Moments.of(features)]
    expected = distances.frechet_distance(*(part for one in moments for part in (one.mean, one.covariance)))
    assert row["fid"] == pytest.approx(expected, rel=1e-5)
    assert (row["is"], row["is_std"]) == pytest.approx((*distances.inception_score(logits),), rel=1e-6)
    assert evaluate(**few, reference=kept, metrics="fid")[0]["fid"] == pytest.approx(expected, rel=1e-5)
    few["inception"] = files[1]
    refused("real.npz: was made with other weights", reference=kept, **few)
    refused("real.npz: is of the feature 'inception'", images=few["images"], reference=kept, features="pixels")


def refused(message, error=ConfigError, **options):
    with pytest.raises(error, match=message) as raised:
        evaluate(**options)
    assert "\n" not in str(raised.value)


def test_mistakes_in_options(tmp_path):
    both = {"model": "m", "reference": "digits"}
    refused("nothing to judge: give --model, or --images", reference="digits")
    refused("--model m and --images i exclude each other", images="i", **both)
    refused(
        r"--metrics 'fidd' is unknown; use one of fid, is, kid, precision, recall; did you mean 'fid'",
        metrics="fidd",
        **both,
    )
    refused("--metrics: names none", metrics=",", **both)
    refused("--features inception needs --inception FILE, pytorch-fid's .*, which is not downloaded", **both)
    refused("--inception f: --features pixels needs no network", inception="f", features="pixels", **both)
    refused("--metrics is needs the classes of the Inception network", metrics=["fid", "is"], features="pixels", **both)
    refused("--metrics fid compares with real pictures: give them by --reference", model="m", features="pixels")
    refused("--reference digits: --metrics is compares with nothing", metrics="is", inception="f", **both)
    refused(
        "--num_images 999: --metrics kid needs 1000 pictures",
        metrics="fid,kid",
        num_images=999,
        features="pixels",
        **both,
    )
    refused(
        "--num_images 50000: must be a multiple of the 3 prompts or classes, .*: 49998 or 50001",
        prompt=["a", "b", "c"],
        features="pixels",
        **both,
    )
    refused("--num_images: must be at least 2", num_images=1, features="pixels", **both)
    refused("--channels 2: must be 1", channels=2, features="pixels", **both)
    refused(
        "unknown option 'guidance_scales'; did you mean 'guidance_scale'",
        guidance_scales=[1],
        features="pixels",
        **both,
    )
    refused("--prompt is for drawing with --model", images="i", reference="digits", features="pixels", prompt="a")
    refused("--scheduler: must be .*, got 'ddimm'; did you mean 'ddim'", scheduler="ddimm", features="pixels", **both)
    refused(r"--guidance_scale.1: must be at least 0, got -1.0", guidance_scale=[1.0, -1.0], features="pixels", **both)
    refused("--save_reference s.npy: must end in .npz", save_reference="s.npy", features="pixels", **both)
    refused(
        "--save_reference without --model and --images needs --resolution",
        reference="digits",
        features="pixels",
        save_reference="s.npz",
    )
    refused(
        "--output o: nothing is judged",
        reference="digits",
        features="pixels",
        save_reference="s.npz",
        resolution=8,
        output="o",
    )
    refused(
        "--num_images 5: no pictures are judged",
        reference="digits",
        features="pixels",
        save_reference="s.npz",
        resolution=8,
        num_images=5,
    )
    refused(
        "--image_interpolation_mode is for pictures in folders",
        model="m",
        reference="r.npz",
        features="pixels",
        image_interpolation_mode="bicubic",
    )
    refused(
        "none.pth is no file",
        WeightsError,
        model="m",
        reference="digits",
        inception=str(tmp_path / "none.pth"),
        images=None,
    )


def test_mistakes_before_long_work(digits, text, folders, tmp_path, monkeypatch):
    """None of these draws or reads more than one picture."""
    from flax_diffusion.core.metrics import pictures
    from flax_diffusion.jax_backend.sampling import Sampler

    monkeypatch.setattr(Sampler, "batches", None)
    monkeypatch.setattr(pictures, "batches", None)
    root, _ = folders
    real, drawn = str(root / "real"), str(root / "drawn")
    model = {"model": digits, "features": "pixels", "num_images": 8}
    refused(
        "a StableDiffusionPipeline with 0 prompts: give at least one --prompt",
        model=text,
        reference="digits",
        features="pixels",
    )
    refused("a DDPMPipeline with 1 prompts: drop --prompt", reference="digits", prompt="a", **model)
    refused("--reference .*none: does not exist", DataError, reference=str(tmp_path / "none"), **model)
    refused(
        "--reference .*others.npz: has 48 features, the pictures have 64", reference=str(root / "others.npz"), **model
    )
    refused(
        "--reference .*pictures.npz: is of pictures of 4x4 pixels, those to judge have 8x8",
        reference=str(root / "pictures.npz"),
        **model,
    )
    refused("--resolution 16: the model draws 8x8 pixels", reference="digits", resolution=16, **model)
    refused("--channels 3: the model draws 1", reference="digits", channels=3, **model)
    refused(
        "--output .*file/o.json: cannot be written",
        reference="digits",
        output=str(made_file(tmp_path) / "o.json"),
        **model,
    )
    refused(r"--output .*: is a folder", reference="digits", output=str(tmp_path), **model)
    refused(
        r"--num_images 1001: --images .* holds 1000", images=drawn, reference=real, features="pixels", num_images=1001
    )
    refused(
        "--features pixels: pictures of 65x65 pixels have 12675 values, more than the 12288 whose covariance",
        images=drawn, reference=real, features="pixels", resolution=65,
    )  # fmt: skip
    few = tmp_path / "few"
    few.mkdir()
    Image.new("RGB", (4, 4)).save(few / "a.png")
    refused(
        "--reference .*few: --metrics fid needs 2 pictures, there are 1",
        images=drawn,
        reference=str(few),
        features="pixels",
    )
    refused(
        "--images .*few: --metrics fid needs 2 pictures, there are 1",
        images=str(few),
        reference=real,
        features="pixels",
    )
    refused(
        "holds statistics already; drop it",
        images=drawn,
        reference=str(root / "others.npz"),
        features="pixels",
        save_reference=str(tmp_path / "s.npz"),
    )


def made_file(folder):
    (folder / "file").write_text("")
    return folder / "file"


def test_the_inception_network_is_asked_for_first(digits, tmp_path):
    (tmp_path / "wrong.safetensors").write_bytes(b"")
    refused(
        "wrong.safetensors is not a whole safetensors file", WeightsError, model=digits, reference="digits",
        inception=str(tmp_path / "wrong.safetensors"),
    )  # fmt: skip


@pytest.mark.acceptance
def test_a_latent_model(tmp_path):
    """Pictures of a Stable Diffusion pipeline, at a size of its own."""
    model = stable_diffusion(tmp_path / "model")
    (row,) = evaluate(
        model=str(model), reference="digits", features="pixels", prompt="a photo of a dog", num_images=3, height=16,
        width=24, num_inference_steps=2,
    )  # fmt: skip
    assert row["pictures"] == 3
    assert np.isfinite(row["fid"])


def test_one_line_on_stderr(request):
    command = [sys.executable, "-m", "flax_diffusion.evaluate", "--model", "m", "--metric", "fid"]
    ran = subprocess.run(command, cwd=request.config.rootpath, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == UserError.exit_status
    assert ran.stderr == "error: command line: unknown option '--metric'; did you mean '--metrics'?\n"
