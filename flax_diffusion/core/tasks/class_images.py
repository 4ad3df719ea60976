"""Class pictures for prior preservation: the model draws those that a folder lacks, before it trains.

Reference: Ruiz et al., https://arxiv.org/abs/2208.12242, section 3.2.
"""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from flax_diffusion.core.backend import Backend, shared_folder
from flax_diffusion.core.data.check import check_source
from flax_diffusion.core.data.sources.folders import FolderSource, image_files
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.io.files import as_path, is_local, lies_in
from flax_diffusion.core.io.tracking import save_picture, to_pillow

if TYPE_CHECKING:
    from flax_diffusion.core.tasks.dreambooth import Concept, DreamBoothConfig

log = logging.getLogger(__name__)


def missing(concept: Concept, wanted: int) -> int:
    """Count the pictures that a concept's class folder lacks, and make the folder if it does not exist.

    Args:
        concept: The concept.
        wanted: Number of pictures that the folder must hold.

    Raises:
        DataError: If the folder cannot be made, or lacks pictures and cannot be written.
    """
    folder = as_path(str(concept.class_data_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--class_data_dir {folder}: cannot be made ({error.strerror}); name another") from error
    have = len(image_files(folder))
    if have < wanted and is_local(folder) and not os.access(folder, os.W_OK):
        raise DataError(
            f"--class_data_dir {folder}: holds {have} of {wanted} pictures and cannot be written; make it writable, or "
            f"give --num_class_images {have}"
        )
    return max(0, wanted - have)


def check(config: DreamBoothConfig) -> None:
    """Make sure, before the start, that class folders can be filled and that their pictures can be used.

    Args:
        config: The run's options.

    Raises:
        DataError: As in `missing` and `check_source`, or if the folders of two things overlap.
    """
    _check_apart(config)
    for concept in config.all_concepts:
        missing(concept, config.num_class_images)
        folder = as_path(str(concept.class_data_dir))
        pictures = FolderSource(folder, image_files(folder)[: config.num_class_images], None)
        if len(pictures):
            check_source(pictures, skip_bad_images=config.skip_bad_images)


def _check_apart(config: DreamBoothConfig) -> None:
    concepts = config.all_concepts
    for one in concepts:
        classes = str(one.class_data_dir)
        for other in concepts:
            things = other.instance_data_dir
            if lies_in(classes, things) or lies_in(things, classes):
                raise DataError(
                    f"--class_data_dir {classes} and --instance_data_dir {things}: one lies in the other, so that "
                    "pictures of the class would be trained as the new thing; name folders apart from each other"
                )
            theirs = str(other.class_data_dir)
            shared = lies_in(theirs, classes) and one.class_prompt == other.class_prompt  # of two things of one class
            if lies_in(classes, theirs) and not shared:
                raise DataError(
                    f"--class_data_dir {classes} of '{one.class_prompt}' lies in {theirs} of "
                    f"'{other.class_prompt}', which would mix the two; name a folder for each class"
                )


def draw_missing(config: DreamBoothConfig, backend: Backend) -> None:
    """Draw the missing pictures of every class folder, up to `num_class_images`; earlier pictures stay.

    Args:
        config: The run's options.
        backend: The backend, with the weights that the run starts from.
    """
    batch_size = config.sample_batch_size * backend.device_count
    for concept in config.all_concepts:
        folder = as_path(str(concept.class_data_dir))
        shared_folder(folder, backend, "class_data_dir")
        short = missing(concept, config.num_class_images)
        have = config.num_class_images - short
        if not short:
            continue
        main = backend.process_index == 0
        if main:
            log.info("drawing %d pictures of '%s' into %s", short, concept.class_prompt, folder)
        with tqdm(total=short, unit="picture", disable=not main) as bar:
            while have < config.num_class_images:
                # Every batch is whole, so that one program is compiled. The seed depends on the number of pictures, so
                # that a run that was interrupted draws no picture twice.
                images = backend.sample(
                    prompts=[str(concept.class_prompt)],
                    num_images=batch_size,
                    num_inference_steps=config.class_num_inference_steps,
                    guidance_scale=config.class_guidance_scale,
                    seed=(config.seed + have) % 2**32,
                    batch_size=batch_size,
                )[: config.num_class_images - have]
                if main:
                    for image in images:
                        save_picture(to_pillow(image), _unused_name(folder))
                have += len(images)
                bar.update(len(images))
        backend.all_processes(True)  # no process reads the folder before it is full


def _unused_name(folder: Path) -> Path:
    names = (folder / f"class-{number:05d}.png" for number in itertools.count())
    return next(path for path in names if not path.exists())
