"""Model folders, local or on the Hugging Face Hub, and their safetensors files, read without a framework."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flax_diffusion.core.errors import WeightsError, naming
from flax_diffusion.core.io.files import as_path, is_local, local_copy, replacing
from flax_diffusion.core.io.hub_options import DEFAULT_HUB, HubOptions
from flax_diffusion.core.io.untrusted import parse_json, read_text

PICKLED = (".bin", ".ckpt", ".pt", ".pth")
"""File name extensions of pickled weights."""
MAX_HEADER_BYTES = 2**25  # of a safetensors file; about a hundred bytes per tensor are usual
_UNREADABLE_TENSOR = (SafetensorError, ValueError, TypeError, AttributeError, OverflowError)


class StoredTensor:
    """A tensor in an open safetensors file, whose values are read only by `array`."""

    def __init__(self, file: Any, name: str, path: Path):
        self._file, self._name, self._path = file, name, path
        self.shape: tuple[int, ...] = tuple(file.get_slice(name).get_shape())

    def array(self) -> np.ndarray:
        """Return the values; bfloat16 ones as ml_dtypes' type of that name.

        Raises:
            WeightsError: If NumPy has no such type.
        """
        try:
            return self._file.get_tensor(self._name)
        except _UNREADABLE_TENSOR as error:
            raise WeightsError(f"{self._path}: {self._name} cannot be read ({error}): save it as float32") from error


def resolve(
    path_or_hub_id: str | Path,
    subfolder: str | None = None,
    revision: str | None = None,
    allow_patterns: Sequence[str] = (),
    hub: HubOptions = DEFAULT_HUB,
) -> Path:
    """Return a local folder with the named files of a model, downloaded if need be.

    Args:
        path_or_hub_id: An existing folder, on this machine or like gs://bucket/model, or `owner/name` on the Hub.
        subfolder: Folder inside it.
        revision: Branch, tag or commit on the Hub.
        allow_patterns: File names or globs in the (sub)folder to download; everything if empty.
        hub: How files come from the Hub.

    Returns:
        The (sub)folder itself, in the Hub's cache, or a copy that is deleted when the process ends.

    Raises:
        WeightsError: If there is neither a folder nor a repository of that name that can be read.
    """
    folder = as_path(path_or_hub_id)
    if is_local(folder) and folder.is_file():
        raise WeightsError(_not_a_folder(folder))
    if is_local(folder) and not folder.is_dir():
        folder = _download(str(path_or_hub_id), subfolder, revision, allow_patterns, hub)
    folder = folder / subfolder if subfolder else folder
    if not folder.is_dir():
        missing = f"has no folder {subfolder!r}, as a pipeline has" if subfolder else "does not exist"
        raise WeightsError(f"{path_or_hub_id} {missing}: check the name")
    return local_copy(folder, tuple(allow_patterns) or ("*",))


def _not_a_folder(file: Path) -> str:
    if file.suffix not in (".safetensors", ".ckpt", ".pt", ".bin"):
        return f"{file} is a file: name the folder that it is in"
    return (
        f"{file} is one file of weights, without configs and tokenizer: make a folder of a single-file checkpoint by "
        f"`python -m flax_diffusion.convert --model FOLDER --checkpoint {file} --output_dir NEW`, where FOLDER is any "
        "pipeline of its architecture"
    )


def file_names(source: str | Path, subfolder: str | None = None, revision: str | None = None) -> list[str]:
    """Return the names of the files in a (sub)folder without downloading them.

    Args:
        source: An existing folder, or `owner/name` on the Hub.
        subfolder: Folder inside it.
        revision: Branch, tag or commit on the Hub.

    Returns:
        The names; if the Hub cannot be reached, those of the files in its cache.
    """
    folder = as_path(source)
    if is_local(folder) and not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import DryRunError

        start = f"{subfolder}/" if subfolder else ""
        try:
            there = snapshot_download(str(source), revision=revision, allow_patterns=[f"{start}*"], dry_run=True)
            return [file.filename.removeprefix(start) for file in there]
        except DryRunError:  # offline
            folder = _download(str(source), subfolder, revision, ["*.json"])
    folder = folder / subfolder if subfolder else folder
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _download(
    name: str, subfolder: str | None, revision: str | None, allow_patterns: Sequence[str], hub: HubOptions = DEFAULT_HUB
) -> Path:
    """Download what is new in a Hub repository and return its snapshot in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise WeightsError(f"there is no folder {name}: check the path")
    patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in allow_patterns or ["*"]]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **hub.given()))
    except LocalEntryNotFoundError as error:
        raise WeightsError(
            f"{name} is neither a folder nor in the Hub's cache, and the Hub cannot be reached: "
            "give a folder, or download it while online"
        ) from error
    except NoRevision as error:
        raise WeightsError(f"{name} has no revision {revision!r} on the Hub: check its branches") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise WeightsError(
            f"{name} is neither a folder nor a repository on the Hub that you may read: check the name, "
            "or log in with `hf auth login`"
        ) from error


def weights_file(path: Path, option: str, names: Sequence[str]) -> Path:
    """Return a safetensors file on this machine, given by its path or by its folder.

    Args:
        path: The file or the folder, on this machine or like gs://bucket/folder. A path that does not exist is looked
            up on the Hub, as `owner/name`, `owner/name/folder` or `owner/name/file.safetensors`.
        option: The option that names the file, for messages.
        names: Names that the file may have in its folder, the likeliest first. If there is none of them, but one file
            of weights alone, it is that.

    Returns:
        The file itself or a copy of it; the JSON files of its folder lie beside it.

    Raises:
        WeightsError: If there is no such file, or it is pickled.
    """
    if path.suffix in PICKLED:
        raise WeightsError(f"{option} {path} is pickled, and loading it can run code: convert it to safetensors first")
    folder, repository, subfolder = path, None, None
    if path.is_dir():
        there = file_names(path)
    elif path.is_file():
        folder, there, names = path.parent, [path.name], (path.name,)
    else:
        repository, subfolder, file = _on_the_hub(path, option)
        names = (file,) if file else names
        with naming(option):
            folder = resolve(repository, subfolder, None, (*names, "*.json"))
        there = file_names(repository, subfolder)
    weights = sorted(name for name in there if name.endswith((".safetensors", *PICKLED)))
    file = next((name for name in (*names, *(weights if len(weights) == 1 else ())) if name in there), None)
    if file is None or file.endswith(PICKLED):
        held = f"; it holds {', '.join(weights[:5])}" if weights else ""
        raise WeightsError(f"{option} {path} holds no {' or '.join(names)}{held}: name the file itself")
    if repository is not None and file not in names:
        folder = resolve(repository, subfolder, None, (file, "*.json"))
    return local_copy(folder, (file, "*.json")) / file


def _on_the_hub(path: Path, option: str) -> tuple[str, str | None, str | None]:
    """Split a path that is not on this machine into the Hub repository, the folder and the file that it may mean."""
    *inside, file = (*path.parts, None) if path.suffix != ".safetensors" else path.parts
    if not is_local(path) or len(inside) < 2 or inside[0].startswith((".", "/", "~")):
        raise WeightsError(f"{option} {path} does not exist: check the path")
    return "/".join(inside[:2]), "/".join(inside[2:]) or None, file


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model folder.

    Raises:
        WeightsError: If the file does not exist or does not hold a JSON object.
    """
    try:
        value = parse_json(read_text(path))
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist: name a folder that holds a model") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is not valid JSON ({error}): fetch the file again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds a {type(value).__name__}, not a JSON object: fetch the file again")
    return value


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Open a safetensors file; each tensor's values are read only when they are used.

    Raises:
        WeightsError: If the file is not a whole safetensors file.
    """
    try:
        file = _open(path)
        return {name: StoredTensor(file, name, path) for name in file.keys()}  # noqa: SIM118  (the file is no mapping)
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}): fetch or save it again") from error


def _open(path: Path) -> Any:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"its header is {size} bytes long, over {MAX_HEADER_BYTES}")
    return safe_open(path, framework="numpy")


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in a safetensors file's header."""
    with _open(path) as file:
        return file.metadata() or {}


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all, with metadata in its header."""
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    with replacing(path) as partial:
        # Transformers refuses files without a format.
        save_file(contiguous, partial, metadata={"format": "pt", **(metadata or {})})
