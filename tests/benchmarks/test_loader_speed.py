"""How fast the loader is. Run: python -m pytest -m acceptance -s tests/benchmarks/test_loader_speed.py

Machines differ, so each figure is a ratio of two loaders that take turns in one run.
"""

import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_speed import write_pictures
from tiny import OBJECTIVE

from flax_diffusion.core.data import batches
from flax_diffusion.core.data.captions import Tokenize, TokenizePrompt, train_tokenizer
from flax_diffusion.core.data.images.transforms import ImageTransform
from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.data.sources.folders import FolderSource
from flax_diffusion.core.data.store import Row, Store, Writer
from flax_diffusion.core.objectives.noising import NoiseSpec
from flax_diffusion.core.randomness.streams import Stream, example_rng

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def torchvision(request):
    """Folders that Python has to look in for torchvision: none where it is installed, else one in pytest's cache."""
    if importlib.util.find_spec("torchvision") is not None:
        return []
    version = f"0.{int(torch.__version__.split('.')[1]) + 15}.*"  # the one that goes with this PyTorch
    folder = request.config.cache.mkdir(f"torchvision-{version[:-2]}")
    if not (folder / "torchvision").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
        done = subprocess.run([*command, f"torchvision=={version}"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"torchvision {version} is not installed, nor can it be: {done.stderr.strip()[-200:]}")
    return [str(folder)]


@pytest.mark.parametrize(
    ("size", "batches", "least"), [((512, 512), 30, 1.5), ((1600, 1200), 8, None)], ids=["512", "1600"]
)
def test_pictures_a_second(request, torchvision, tmp_path, size, batches, least):
    """Against PyTorch's loader, both with two workers, at 512 pixels; of larger photographs decoding is the most."""
    script = Path(__file__).with_name("loader_speed.py")
    path = os.pathsep.join([str(request.config.rootpath), *torchvision, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, *map(str, (*size, batches, 5)), tmp_path],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    rates = json.loads(done.stdout)
    ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["ours"], rates["theirs"], strict=True))
    print(
        f"\nJPEGs of {size[0]}x{size[1]}, pictures a second with two workers: {statistics.median(rates['ours']):.0f}, "
        f"PyTorch with torchvision {statistics.median(rates['theirs']):.0f}, {ratio:.2f} times"
    )
    assert least is None or ratio >= least


LATENTS, EMBEDDINGS = (4, 128, 128), (77, 2048)
"""Shapes of SDXL at 1,024 pixels."""


def thousand(tmp_path):
    """A thousand names of 48 JPEGs of 1,024 pixels, captions of 40 kinds, and what is kept of both in a cache."""
    data = tmp_path / "data"
    data.mkdir()
    write_pictures(data, (1024, 1024))
    files = sorted(data.iterdir())
    names = [f"{number:04}.jpg" for number in range(1000)]
    for number, name in enumerate(names):
        (data / name).symlink_to(files[number % len(files)])
    captions = [f"a photo of a dog number {number % 40}" for number in range(1000)]
    source = FolderSource(data, names, captions)
    rng = np.random.default_rng(0)
    writer = Writer(tmp_path / "posteriors")
    latents = rng.standard_normal((1, 1, 2, *LATENTS), np.float32)
    for number in range(len(names)):
        rows = {"posteriors": latents + np.float32(number), "sizes": np.full((1, 2), 1024, np.int32)}
        writer.add([Row(source[number].name)], rows)
    writer.flush()
    prompts = Writer(tmp_path / "embeddings")
    for caption in sorted(set(captions)):
        prompts.add([Row(caption)], {"text_embeddings": rng.standard_normal((1, *EMBEDDINGS), np.float32)})
    prompts.flush()
    kept = Store(tmp_path / "posteriors").tables({source[number].name: source[number].name for number in range(1000)})
    embeddings = Store(tmp_path / "embeddings").tables({caption: caption for caption in captions})
    return source, batches.Precomputed(embeddings=embeddings, **kept)


def test_cached_examples(tmp_path):
    """In threads, as a run reads them, against decoded ones of two workers; and both with the noise that they need."""
    source, made = thousand(tmp_path)
    words = TokenizePrompt({"input_ids": Tokenize.from_clip(train_tokenizer(["a photo of a dog"], 520, 77))})
    transform = ImageTransform(resolution=1024, center_crop=True)
    loaders = {}
    for noisy in (False, True):
        noise = NoiseSpec(shape=LATENTS if noisy else (1, 1, 1), objective=OBJECTIVE, latent_noise=noisy)
        for cached in (False, True):
            once = made if cached else batches.Precomputed()
            make = batches.ExampleFn(transform=transform, noise=noise, made=once, tokenize=words, told_sizes=True)
            workers = 0 if cached else 2
            loaders[noisy, cached] = Loader(source, make.unscaled, seed=0, batch_size=8, num_workers=workers)
    streams = {which: iter(loader) for which, loader in loaders.items()}
    rates = {which: [] for which in loaders}
    for _ in range(3):
        for which, stream in streams.items():
            list(itertools.islice(stream, 8))  # which were made ahead, while another loader ran
            count = 40 if which[1] else 8
            start = time.perf_counter()
            for _ in range(count):
                next(stream)
            rates[which].append(8 * count / (time.perf_counter() - start))
    for loader in loaders.values():
        loader.close()
    start = time.process_time()
    for index in range(100):
        for stream in (Stream.NOISE, Stream.LATENT):
            example_rng(0, stream, 0, index).standard_normal(LATENTS, dtype=np.float32)
    drawing = (time.process_time() - start) / 100
    bare, noisy = (
        statistics.median(b / a for a, b in zip(rates[one, False], rates[one, True], strict=True))
        for one in (False, True)
    )
    found = {which: statistics.median(each) for which, each in rates.items()}
    print(
        f"\n1,000 pictures of 1,024 pixels, two workers or threads: {found[False, False]:.0f} a second "
        f"decoded and {found[False, True]:.0f} cached, {bare:.0f} times; with the noise of latents and posterior, "
        f"of which {drawing * 1e3:.1f} ms a picture are drawn, {found[True, False]:.0f} and {found[True, True]:.0f}, "
        f"{noisy:.1f} times"
    )
    assert bare >= 20
    assert noisy >= 5  # 131,072 normal numbers a picture take longer than all else
