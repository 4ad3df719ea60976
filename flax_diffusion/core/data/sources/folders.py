"""Local folders of images: with a metadata file, with .txt captions beside them, or bare."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flax_diffusion.core.data.sources.cards import files_of
from flax_diffusion.core.data.sources.metadata import METADATA_FILES, Caption, read_metadata
from flax_diffusion.core.data.sources.source import DEFAULT_IMAGE_COLUMN, Record, Source, first_few
from flax_diffusion.core.data.sources.splits import is_beside_splits, of_split
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.io.files import walk
from flax_diffusion.core.io.untrusted import read_text

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm",
    ".jfif", ".jpe", ".apng", ".avifs", ".dib", ".j2c", ".j2k", ".jpc", ".jpf", ".jpx", ".pbm", ".pnm",
    ".mpo",
)  # fmt: skip
"""Of the formats that `images.decode` reads, by all names that Pillow knows; the last is JPEG, with more behind."""
UNREAD_EXTENSIONS = (
    ".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".psd", ".xcf", ".ai", ".eps", ".pdf", ".tga", ".ico", ".icns",
    ".dds", ".exr", ".hdr", ".pfm", ".qoi", ".pcx", ".sgi", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw",
    ".orf", ".rw2", ".raf",
)  # fmt: skip
"""Of pictures that are left out, which is said."""
MAX_CAPTION_BYTES = 2**20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderSource:
    """Image files in a folder."""

    root: Path
    files: list[str] = field(repr=False)  # relative to root, in order
    captions: list[Caption] | None = field(repr=False)  # of the same length
    text_files: bool = False  # the caption is in the .txt of the same name

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        path = self.root / self.files[index]
        if self.text_files:
            caption: Caption = _read_text(path.with_suffix(".txt"), str(path))
        else:
            caption = None if self.captions is None else self.captions[index]
        return Record(path, caption, str(path))


def open_folder(
    root: Path,
    *,
    image_column: str = DEFAULT_IMAGE_COLUMN,
    caption_column: str | None = "text",
    max_samples: int | None = None,
    cache_dir: Path | None = None,
    config_name: str | None = None,
    split: str = "train",
) -> Source:
    """Open a folder of images or of Parquet files, or one Parquet file.

    Subfolders are looked into (not links to folders), hidden files are not. If the README.md says which files belong to
    a split, those are taken, see `cards.files_of`; else, where folders or names of Parquet files tell splits apart,
    those of one split, see `splits.of_split`. Captions come from metadata.jsonl or
    metadata.csv, in any subfolder, whose column `file_name` (or `<image_column>_file_name`, or `image_column`) is
    relative to the metadata's own folder, in the order of its rows; else from the .txt file of each image, whole, in
    the order of the file names.

    Args:
        root: The folder or file.
        image_column: In Parquet, and in metadata; `image` means `file_name` there.
        caption_column: None for no captions: then every image is taken and metadata is not read.
        max_samples: The first so many; None for all.
        cache_dir: For unpacked Parquet.
        config_name: Configuration in the README.md; None for its default one.
        split: To take, where there are several.

    Returns:
        The source.

    Raises:
        DataError: Folder, images, files, columns or captions are missing, or a path leaves the folder.

    Reference: Hugging Face's imagefolder, for the names in metadata.
    """
    from flax_diffusion.core.data.sources.parquet import open_parquet

    if not root.exists():
        raise DataError(f"{root} does not exist; give a folder of images or of Parquet files")
    if root.is_file():
        if root.suffix.lower() != ".parquet":
            raise DataError(f"{root} is a file; only a .parquet file may stand for a folder")
        if config_name is not None:
            raise DataError(f"--dataset_config_name {config_name}: {root} is one file; leave it out")
        return open_parquet([root], image_column, caption_column, max_samples, cache_dir)

    links: list[str] = []
    files = _files(root, links)
    named = files_of(root, files, config_name, split)
    wanted, split_told = (files, split) if named is None else (named, None)
    images = _images(wanted)
    tables = [name for name in wanted if name.lower().endswith(".parquet")]
    if tables and images:
        raise DataError(
            f"{root} holds both images and Parquet files ({first_few(tables)}); "
            "keep them in folders of their own, and metadata in metadata.jsonl or metadata.csv"
        )
    _say_what_is_left_out(root, wanted, links)
    if tables:
        tables = of_split(root, tables, split_told)
        return open_parquet([root / name for name in tables], image_column, caption_column, max_samples, cache_dir)
    metadata = [name for name in wanted if os.path.basename(name) in METADATA_FILES]
    if not images and not metadata:
        raise DataError(
            f"{root} holds no images; looked for {' '.join(IMAGE_EXTENSIONS)} and .parquet{_found(files, links)}"
        )
    return _open_pictures(root, files, images, metadata, image_column, caption_column, max_samples, split_told)


def _open_pictures(
    root: Path,
    files: list[str],
    images: list[str],
    metadata: list[str],
    image_column: str,
    caption_column: str | None,
    max_samples: int | None,
    split: str | None,
) -> FolderSource:
    if not metadata and image_column != DEFAULT_IMAGE_COLUMN:
        raise DataError(f"--image_column {image_column}: {root} holds pictures and no columns; leave it out")
    if caption_column is None:
        return FolderSource(root, of_split(root, images, split)[:max_samples], None)
    if metadata:
        if not any(is_beside_splits(name, split) for name in metadata):  # else its rows say what is trained on
            images, metadata = of_split(root, images, split), of_split(root, metadata, split)
        captions = read_metadata(root, metadata, images, image_column, caption_column)
        captioned = {name for name, caption in captions.items() if caption is not None}
        _require_captions(root, sorted({*images, *captions}), captioned)
        return FolderSource(root, list(captions)[:max_samples], list(captions.values())[:max_samples])
    images, present = of_split(root, images, split), set(files)
    _require_captions(root, images, {name for name in images if _text_file(name) in present})
    return FolderSource(root, images[:max_samples], None, text_files=True)


def image_files(root: Path) -> list[str]:
    """Give the images that are taken from a folder without captions, relative to it, in order."""
    return of_split(root, _images(_files(root, [])), "train")


def _files(root: Path, links: list[str]) -> list[str]:
    try:
        return list(walk(root, links))
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be read ({error.strerror}); make it readable") from error


def _images(files: Iterable[str]) -> list[str]:
    return [name for name in files if name.lower().endswith(IMAGE_EXTENSIONS)]


def _say_what_is_left_out(root: Path, files: Sequence[str], links: list[str]) -> None:
    unread = [name for name in files if name.lower().endswith(UNREAD_EXTENSIONS)]
    if unread:
        log.warning(
            "%s: %d pictures of kinds that are not read here are left out: %s; convert them to PNG or JPEG",
            root, len(unread), first_few(unread),
        )  # fmt: skip
    if links:
        log.warning("%s: links to folders are left out: %s; give their targets", root, first_few(links))


def _found(files: Sequence[str], links: Sequence[str]) -> str:
    """What lies in a folder without images, for a message."""
    kinds = [kind for kind, _ in Counter(os.path.splitext(name)[1].lower() for name in files).most_common(3) if kind]
    found = f"; it holds {' '.join(kinds)}" if kinds else ""
    return f"{found}; links to folders are not followed: {first_few(list(links))}" if links else found


def _text_file(name: str) -> str:
    return os.path.splitext(name)[0] + ".txt"


def _read_text(path: Path, example: str) -> str:
    try:
        return " ".join(read_text(path, MAX_CAPTION_BYTES).split())
    except (OSError, ValueError) as error:
        raise DataError(
            f"caption file {path} cannot be read ({error}); it must be UTF-8 text of at most 1 MiB", example
        ) from error


def _require_captions(root: Path, images: list[str], captioned: set[str]) -> None:
    missing = [name for name in images if name not in captioned]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(images)} images in {root} have no caption: {first_few(missing)}; "
            "list them in metadata.jsonl or metadata.csv, give each a .txt file, or train without captions"
        )
