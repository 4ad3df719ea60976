"""Local folders of images: with a metadata file, with .txt captions beside them, or bare."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flax_diffusion.core.data.sources.cards import files_of
from flax_diffusion.core.data.sources.labels import of_folders, of_rows
from flax_diffusion.core.data.sources.metadata import METADATA_FILES, Caption, read_extras, read_labels, read_metadata
from flax_diffusion.core.data.sources.source import (
    DEFAULT_IMAGE_COLUMN,
    DEFAULT_LABEL_COLUMN,
    IMAGE_EXTENSIONS,
    ExtraImages,
    Labels,
    Record,
    Source,
    first_few,
)
from flax_diffusion.core.data.sources.splits import is_beside_splits, of_split
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.io.files import absolute, lies_in, walk
from flax_diffusion.core.io.untrusted import read_text

UNREAD_EXTENSIONS = (
    ".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".psd", ".xcf", ".ai", ".eps", ".pdf", ".tga", ".ico", ".icns",
    ".dds", ".exr", ".hdr", ".pfm", ".qoi", ".pcx", ".sgi", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw",
    ".orf", ".rw2", ".raf",
)  # fmt: skip
"""Extensions of pictures that cannot be read here; such files are left out with a warning."""
MAX_CAPTION_BYTES = 2**20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderSource:
    """Image files in a folder."""

    root: Path
    files: list[str] = field(repr=False)  # relative to `root`, in order
    captions: list[Caption] | None = field(repr=False)  # one for each file
    text_files: bool = False  # whether each caption is in the .txt file of the same name
    extras: list[Path] | None = field(default=None, repr=False)  # second picture of each file
    metadata: tuple[str, ...] = field(default=(), repr=False)  # metadata files, relative to `root`
    image_column: str = DEFAULT_IMAGE_COLUMN  # column of the file's name in these

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        path = self.root / self.files[index]
        if self.text_files:
            caption: Caption = _read_text(path.with_suffix(".txt"), str(path))
        else:
            caption = None if self.captions is None else self.captions[index]
        second = None if self.extras is None else self.extras[index]
        extra = None if second is None else Record(second, None, str(second))
        return Record(path, caption, str(path), extra=extra)

    def labels(self, column: str | None) -> Labels:
        """Return the classes of the pictures, of metadata that have the column, else the names of their folders.

        Args:
            column: The column; None for `label`, where there is one.

        Raises:
            DataError: If the column, or the class of a picture, is missing.
        """
        if column is not None and not self.metadata:
            raise DataError(
                f"--label_column {column}: {self.root} has no metadata.jsonl or metadata.csv; leave it out, and put "
                "the pictures of each class into a folder"
            )
        found = read_labels(self.root, self.metadata, self.image_column, column)
        if found is None:
            return of_folders(self.root, self.files, image_files)
        return of_rows(found, self.files, self.root, column or DEFAULT_LABEL_COLUMN)


def open_folder(
    root: Path,
    *,
    image_column: str = DEFAULT_IMAGE_COLUMN,
    caption_column: str | None = "text",
    max_samples: int | None = None,
    cache_dir: Path | None = None,
    config_name: str | None = None,
    split: str = "train",
    extra: ExtraImages | None = None,
    stream_shards: int | None = None,
) -> Source:
    """Open a folder of images, of Parquet files or of tar shards, or one such file.

    Tar shards may be named by a pattern such as `shards/train-{0000..0127}.tar`.

    Subfolders are searched, but links to folders are not followed, and hidden files are left out. If the README.md
    lists the files of each split, those of `split` are taken (see `cards.files_of`). Otherwise, if folders or names of
    Parquet files tell splits apart, the files of `split` are taken (see `splits.of_split`).

    Captions come from metadata.jsonl or metadata.csv, in any subfolder, in the order of its rows. Its column
    `file_name` (or `<image_column>_file_name`, or `image_column`) is relative to the metadata's own folder. If there is
    no metadata, the caption of each image is the content of its .txt file, in the order of the file names.

    Args:
        root: The folder, the file or the pattern.
        image_column: Column of the picture in Parquet and in metadata, where `image` means `file_name`; in tar shards
            what the names of pictures end in.
        caption_column: Column of the caption. None for no captions: then every image is taken and metadata is not read.
        max_samples: Number of examples to take, from the first; None for all.
        cache_dir: Folder for unpacked Parquet and indices of tar shards; None for the user's cache folder.
        config_name: Configuration in the README.md; None for its default one.
        split: Split to take if there are several.
        extra: Place of the second picture of each example; None for one picture each. Second pictures that lie in the
            folder are no examples of their own.
        stream_shards: Number of shards that are read at a time, so that not all are on this machine; None for all.

    Returns:
        The source.

    Raises:
        DataError: If the folder, images, files, columns or captions are missing, or a path leaves the folder.

    Reference:
        Hugging Face's imagefolder, for the names in metadata.
    """
    from flax_diffusion.core.data.sources import parquet, tar

    open_kind: dict[str, Callable[..., Source]] = {".parquet": parquet.open_parquet, ".tar": tar.open_tars}
    if stream_shards is not None:
        from flax_diffusion.core.data.shards import streaming

        open_kind = streaming.openers(stream_shards)
    named = [root] if root.is_file() else [] if root.exists() else tar.named_by(root)
    if not named and not root.exists():
        raise DataError(f"{root} does not exist; give a folder of images, of Parquet files or of tar shards")
    if named:
        if root.suffix.lower() not in open_kind:
            raise DataError(f"{root} is a file; give a folder, or a .parquet or .tar file")
        if config_name is not None:
            raise DataError(f"--dataset_config_name {config_name}: {root} is one file; leave it out")
        return open_kind[root.suffix.lower()](named, image_column, caption_column, max_samples, cache_dir, extra)

    links: list[str] = []
    files = _files(root, links)
    listed = files_of(root, files, config_name, split)
    wanted, split_to_choose = (files, split) if listed is None else (listed, None)
    images = _images(wanted)
    found = {kind: [name for name in wanted if name.lower().endswith(kind)] for kind in open_kind}
    tables = [name for names in found.values() for name in names]
    if tables and images:
        kinds = "Parquet files" if found[".parquet"] else "tar shards"
        raise DataError(
            f"{root} holds both images and {kinds} ({first_few(tables)}); "
            "keep them in folders of their own, and metadata in metadata.jsonl or metadata.csv"
        )
    if all(found.values()):
        raise DataError(f"{root} holds both Parquet files and tar shards ({first_few(found['.tar'])}); give one folder")
    _warn_of_left_out(root, wanted, links)
    if tables:
        tables = of_split(root, tables, split_to_choose)
        paths = [root / name for name in tables]
        open_paths = open_kind[".parquet" if found[".parquet"] else ".tar"]
        return open_paths(paths, image_column, caption_column, max_samples, cache_dir, extra)
    if stream_shards is not None:
        raise DataError(f"--stream_shards {stream_shards}: {root} holds no tar or Parquet shards; drop it")
    metadata = [name for name in wanted if os.path.basename(name) in METADATA_FILES]
    if not images and not metadata:
        raise DataError(
            f"{root} holds no images; looked for {' '.join(IMAGE_EXTENSIONS)}, .parquet and .tar{_found(files, links)}"
        )
    if not metadata and image_column != DEFAULT_IMAGE_COLUMN:
        raise DataError(f"--image_column {image_column}: {root} holds pictures and no columns; leave it out")
    reads_rows = caption_column is not None or (extra is not None and extra.folder is None)
    if metadata and reads_rows and not any(is_beside_splits(name, split_to_choose) for name in metadata):
        # Otherwise the rows decide which images are used.
        images, metadata = (of_split(root, names, split_to_choose) for names in (images, metadata))
        split_to_choose = None
    if extra is None:
        return _open_pictures(root, files, images, metadata, image_column, caption_column, max_samples, split_to_choose)
    extras = _extras(root, images, metadata, image_column, extra)
    images = _firsts(root, images, extras, extra)
    source = _open_pictures(root, files, images, metadata, image_column, caption_column, max_samples, split_to_choose)
    return _with_extras(source, extras, extra)


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
    if caption_column is None:
        pictures = of_split(root, images, split)[:max_samples]
        return FolderSource(root, pictures, None, metadata=tuple(metadata), image_column=image_column)
    if metadata:
        captions = read_metadata(root, metadata, images, image_column, caption_column)
        captioned = {name for name, caption in captions.items() if caption is not None}
        _require_captions(root, sorted({*images, *captions}), captioned)
        return FolderSource(root, list(captions)[:max_samples], list(captions.values())[:max_samples])
    images, present = of_split(root, images, split), set(files)
    _require_captions(root, images, {name for name in images if _text_file(name) in present})
    return FolderSource(root, images[:max_samples], None, text_files=True)


def _extras(
    root: Path, images: list[str], metadata: list[str], image_column: str, extra: ExtraImages
) -> dict[str, Path]:
    """Return the second pictures, by the name of the first where metadata tell it, else by name without extension."""
    if extra.folder is None:
        if not metadata:
            raise DataError(
                f"--{extra.option} {extra.column}: {root} has no metadata.jsonl or metadata.csv with a column "
                f"{extra.column}_file_name; add it, or give the folder of these pictures by --{extra.folder_option}"
            )
        named = read_extras(root, metadata, images, image_column, extra)
        return {name: root / second for name, second in named.items()}
    if not extra.folder.is_dir():
        raise DataError(f"--{extra.folder_option} {extra.folder}: does not exist; give a folder of pictures")
    found: dict[str, Path] = {}
    for name in _images(_files(extra.folder, [])):
        other = found.setdefault(os.path.splitext(name)[0], extra.folder / name)
        if other != extra.folder / name:
            raise DataError(f"--{extra.folder_option}: {other} and {name} belong to one picture; remove one of them")
    return found


def _firsts(root: Path, images: list[str], extras: dict[str, Path], extra: ExtraImages) -> list[str]:
    """Return the pictures that are examples: those that are no second picture."""
    if extra.folder is None:
        seconds = set(extras.values())
        return [name for name in images if name in extras or root / name not in seconds]
    if not lies_in(str(extra.folder), str(root)):
        return images
    below = f"{os.path.relpath(absolute(extra.folder), absolute(root))}/"
    return [name for name in images if not name.startswith(below)]


def _with_extras(source: FolderSource, extras: dict[str, Path], extra: ExtraImages) -> FolderSource:
    """Return pictures with the second one of each."""
    keys = source.files if extra.folder is None else [os.path.splitext(name)[0] for name in source.files]
    missing = [name for name, key in zip(source.files, keys, strict=True) if key not in extras]
    if missing:
        by_folder = extra.folder is not None
        place = f"--{extra.folder_option} {extra.folder}" if by_folder else f"--{extra.option} {extra.column}"
        raise DataError(
            f"{place}: {len(missing)} of {len(source.files)} pictures in {source.root} have none there: "
            f"{first_few(missing)}; add those of the same name, or remove the pictures"
        )
    return replace(source, extras=[extras[key] for key in keys])


def image_files(root: Path) -> list[str]:
    """Return the images that are taken from a folder without captions, relative to it, in order."""
    return of_split(root, _images(_files(root, [])), "train")


def _files(root: Path, links: list[str]) -> list[str]:
    try:
        return list(walk(root, links))
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be read ({error.strerror}); make it readable") from error


def _images(files: Iterable[str]) -> list[str]:
    return [name for name in files if name.lower().endswith(IMAGE_EXTENSIONS)]


def _warn_of_left_out(root: Path, files: Sequence[str], links: list[str]) -> None:
    unread = [name for name in files if name.lower().endswith(UNREAD_EXTENSIONS)]
    if unread:
        log.warning(
            "%s: %d pictures in unsupported formats are left out: %s; convert them to PNG or JPEG",
            root, len(unread), first_few(unread),
        )  # fmt: skip
    if links:
        log.warning("%s: links to folders are left out: %s; give their targets", root, first_few(links))


def _found(files: Sequence[str], links: Sequence[str]) -> str:
    """Return a phrase for what a folder without images holds."""
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
