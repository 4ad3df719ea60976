"""Local folders of images: with a metadata file, with .txt captions beside them, or bare."""

import csv
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flax_diffusion.core.data.sources import Record, Source, first_few, require_column
from flax_diffusion.core.errors import DataError, shown
from flax_diffusion.core.files import walk
from flax_diffusion.core.untrusted import open_text, parse_json, path_below, path_inside, read_text

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
MAX_METADATA_BYTES = 2**31
MAX_CAPTION_BYTES = 2**20

Caption = str | list[str] | None


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
            caption: Caption = _read_text(path.with_suffix(".txt"))
        else:
            caption = None if self.captions is None else self.captions[index]
        return Record(path, caption, str(path))


def open_folder(
    root: Path,
    *,
    image_column: str = "image",
    caption_column: str | None = "text",
    max_samples: int | None = None,
    cache_dir: Path | None = None,
    split: str = "train",
) -> Source:
    """Open a folder of images or of Parquet files, or one Parquet file.

    Subfolders are looked into (not links to folders), hidden files are not. Where no image, Parquet or metadata file
    lies in the folder itself and it has a subfolder of the split's name, that one is opened. Captions come from
    metadata.jsonl or metadata.csv, in any subfolder, whose column `file_name` (or `<image_column>_file_name`, or
    `image_column`) is relative to the metadata's own folder, in the order of its rows; else from the .txt file of each
    image, whole, in the order of the file names.

    Args:
        root: the folder or file.
        image_column: in Parquet, and in metadata that has no `file_name`.
        caption_column: None for no captions: then every image is taken and metadata is not read.
        max_samples: the first so many; None for all.
        cache_dir: for unpacked Parquet.
        split: subfolder to prefer.

    Returns:
        The source.

    Raises:
        DataError: folder, images, files, columns or captions are missing, or a path leaves the folder.

    Reference: Hugging Face's imagefolder, for the names in metadata.
    """
    from flax_diffusion.core.data.parquet import open_parquet

    if not root.exists():
        raise DataError(f"{root} does not exist; give a folder of images or of Parquet files")
    if root.is_file():
        if root.suffix.lower() != ".parquet":
            raise DataError(f"{root} is a file; only a .parquet file may stand for a folder")
        return open_parquet([root], image_column, caption_column, max_samples, cache_dir)
    if (root / split).is_dir() and not any(_is_data(path.name) for path in root.iterdir()):
        root = root / split

    files = list(walk(root))
    images = _images(files)
    tables = [name for name in files if name.lower().endswith(".parquet")]
    metadata = [name for name in files if os.path.basename(name) in METADATA_FILES]
    if tables and images:
        raise DataError(
            f"{root} holds both images and Parquet files ({first_few(tables)}); "
            "keep them in folders of their own, and metadata in metadata.jsonl or metadata.csv"
        )
    if tables:
        return open_parquet([root / name for name in tables], image_column, caption_column, max_samples, cache_dir)
    if not images and not metadata:
        raise DataError(f"{root} holds no images; looked for {' '.join(IMAGE_EXTENSIONS)} and .parquet")
    if caption_column is None:
        return FolderSource(root, images[:max_samples], None)
    if metadata:
        return _with_metadata(root, metadata, images, image_column, caption_column, max_samples)
    present = set(files)
    _require_captions(root, images, {name for name in images if _text_file(name) in present})
    return FolderSource(root, images[:max_samples], None, text_files=True)


def _is_data(name: str) -> bool:
    return name in METADATA_FILES or (
        not name.startswith(".") and name.lower().endswith((*IMAGE_EXTENSIONS, ".parquet"))
    )


def image_files(root: Path) -> list[str]:
    """Give the images below a folder, relative to it, in order."""
    return _images(walk(root))


def _images(files: Iterable[str]) -> list[str]:
    return [name for name in files if name.lower().endswith(IMAGE_EXTENSIONS)]


def _text_file(name: str) -> str:
    return os.path.splitext(name)[0] + ".txt"


def _read_text(path: Path) -> str:
    try:
        return " ".join(read_text(path, MAX_CAPTION_BYTES).split())
    except (OSError, ValueError) as error:
        raise DataError(f"caption file {path} cannot be read ({error}); it must be UTF-8 text") from error


def _require_captions(root: Path, images: list[str], captioned: set[str]) -> None:
    missing = [name for name in images if name not in captioned]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(images)} images in {root} have no caption: {first_few(missing)}; "
            "list them in metadata.jsonl or metadata.csv, give each a .txt file, or train without captions"
        )


def _with_metadata(
    root: Path, metadata: list[str], images: list[str], image_column: str, caption_column: str, max_samples: int | None
) -> FolderSource:
    files: list[str] = []
    captions: list[Caption] = []
    for name in metadata:
        where = str(root / name)
        rows = _read_csv(root / name) if name.endswith(".csv") else _read_jsonl(root / name)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        spellings = ("file_name", f"{image_column}_file_name", image_column)
        file_column = next((column for column in spellings if column in columns), None)
        if file_column is None:
            raise DataError(f"{where} has no column file_name; it has {', '.join(columns) or 'no rows'}")
        require_column(caption_column, columns, option="caption_column", where=where)
        for number, row in enumerate(rows, 1):
            files.append(_inside(os.path.dirname(name), row.get(file_column), f"{where}, row {number}"))
            captions.append(_checked_caption(row.get(caption_column), f"{where}, row {number}"))
    known = set(images)
    absent = [name for name in files if name not in known and not _is_below(root, name)]
    if absent:
        raise DataError(
            f"metadata in {root} names {len(absent)} files that are not there: {first_few(absent)}; "
            "restore them or remove their rows"
        )
    captioned = {name for name, caption in zip(files, captions, strict=True) if caption is not None}
    _require_captions(root, sorted(known | set(files)), captioned)
    return FolderSource(root, files[:max_samples], captions[:max_samples])


def _inside(folder: str, name: Any, where: str) -> str:
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: file_name is {shown(name)}; it must be a path relative to the metadata file")
    try:
        return path_inside(os.path.join(folder, name))
    except ValueError as error:
        raise DataError(f"{where}: file_name {name}: {error}; use a path below it") from error


def _is_below(root: Path, name: str) -> bool:
    try:
        return path_below(root, name).is_file()
    except (OSError, ValueError):  # also for a name that no file can have
        return False


def _checked_caption(caption: Any, where: str) -> Caption:
    several = isinstance(caption, list) and caption and all(isinstance(one, str) for one in caption)
    if caption is None:
        return None
    if not (isinstance(caption, str) or several):
        raise DataError(f"{where}: the caption is {shown(caption)}; it must be text or a list of texts")
    try:
        "".join(caption).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the caption is {shown(caption)}, which is no Unicode text; repair it") from error
    return caption


def _read_csv(path: Path) -> list[dict[str, Any]]:
    try:
        with open_text(path, MAX_METADATA_BYTES, newline="") as file:
            return list(csv.DictReader(file, restkey="(no header)"))
    except (csv.Error, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); it must be CSV in UTF-8") from error


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    def rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number} is not JSON ({error}); write one object a line") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} is {line.strip()[:40]}; write one object a line")
            yield row

    try:
        with open_text(path, MAX_METADATA_BYTES) as file:
            return list(rows(file))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); it must be UTF-8") from error
