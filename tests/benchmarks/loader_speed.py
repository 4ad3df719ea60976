"""Pictures a second of this package's loader and of PyTorch's with torchvision's transforms, side by side.

A script, so that PyTorch's workers are forked from a process that holds nothing else. It prints one line of JSON:
`ours` and `theirs`, pictures a second in each round.

Run by test_loader_speed.py: loader_speed.py WIDTH HEIGHT BATCHES ROUNDS FOLDER
"""

import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from flax_diffusion.core.data.batches import ExampleFn
from flax_diffusion.core.data.images.decoding import decode
from flax_diffusion.core.data.images.transforms import ImageTransform
from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.data.sources.folders import open_folder
from flax_diffusion.core.objectives import noise_schedule
from flax_diffusion.core.objectives.ddpm import ddpm
from flax_diffusion.core.objectives.noising import NoiseSpec
from flax_diffusion.core.randomness.streams import example_rng

RESOLUTION, BATCH, WORKERS, PICTURES = 512, 16, 2, 48
FIRST = 8
"""Batches at the start of each round that are not counted: they were made ahead, while the other loader ran."""
OBJECTIVE = ddpm(noise_schedule.alphas_cumprod(noise_schedule.betas()), "epsilon")


def write_pictures(folder, size):
    """JPEGs of quality 90, of parts of scikit-learn's two photographs."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    width, height = 400 * size[0] // max(size), 400 * size[1] // max(size)
    for number in range(PICTURES):
        photograph = photographs[number % len(photographs)]
        left, top = (int(rng.integers(rest)) for rest in (photograph.width - width, photograph.height - height))
        part = photograph.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.LANCZOS)
        part.save(folder / f"{number:02}.jpg", quality=90)


def import_transforms():
    """torchvision's transforms. They need none of its compiled operators, which its wheel for CUDA has not on a CPU."""
    library = torch.library.Library("torchvision", "DEF")
    for name in () if torch.version.cuda else ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import transforms

    return library, transforms


class Pictures(torch.utils.data.Dataset):
    """Picture files with the transforms of Diffusers' text-to-image tutorial."""

    def __init__(self, files, transforms):
        self.files = files
        self.transform = transforms.Compose(
            [
                transforms.Resize(RESOLUTION, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.RandomCrop(RESOLUTION),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return {"pixel_values": self.transform(Image.open(self.files[index]).convert("RGB"))}


def check_pixels(source, make, transforms):
    """Both compute the same pixels of the same part of a picture."""
    functional, flips = transforms.functional, set()
    for index in range(len(source)):
        record = source[index]
        place = make.transform.place(decode(record).size, lambda stream, index=index: example_rng(0, stream, 0, index))
        image = functional.resize(
            Image.open(record.image).convert("RGB"), RESOLUTION, transforms.InterpolationMode.BILINEAR
        )
        image = functional.crop(image, *place.corner, RESOLUTION, RESOLUTION)
        image = functional.hflip(image) if place.flipped else image
        expected = functional.normalize(functional.to_tensor(image), [0.5], [0.5])
        np.testing.assert_array_equal(make(source, 0, 0, index)["pixel_values"], expected.numpy())
        flips.add(place.flipped)
    assert flips == {False, True}


def main(width, height, batches, rounds, folder):
    torch.set_num_threads(1)
    _library, transforms = import_transforms()
    write_pictures(Path(folder), (width, height))
    source = open_folder(Path(folder), caption_column=None)
    noise = NoiseSpec(shape=(4, RESOLUTION // 8, RESOLUTION // 8), objective=OBJECTIVE)
    make = ExampleFn(transform=ImageTransform(resolution=RESOLUTION, random_flip=True), noise=noise)
    check_pixels(source, make, transforms)
    steps = rounds * (batches + FIRST) + FIRST
    files = [source[index].image for index in range(len(source))] * (steps * BATCH // len(source) + 1)
    theirs = torch.utils.data.DataLoader(
        Pictures(files, transforms), batch_size=BATCH, shuffle=True, num_workers=WORKERS, drop_last=True
    )
    rates = {"ours": [], "theirs": []}
    with Loader(source, make.unscaled, seed=0, batch_size=BATCH, num_workers=WORKERS) as ours:
        streams = {"ours": iter(ours), "theirs": iter(theirs)}
        for stream in streams.values():
            next(stream)
        for _ in range(rounds):
            for side, stream in streams.items():
                list(itertools.islice(stream, FIRST))
                start = time.perf_counter()
                for _ in range(batches):
                    next(stream)
                rates[side].append(BATCH * batches / (time.perf_counter() - start))
    print(json.dumps(rates))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), sys.argv[5])
