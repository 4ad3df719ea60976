"""Base of the pipelines: their parts, and folders that hold them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from flax_diffusion._version import __version__
from flax_diffusion.core.errors import ConfigError, WeightsError, nearest
from flax_diffusion.core.families.folders import has_part
from flax_diffusion.core.io import model_files, publishing
from flax_diffusion.core.io.files import write_json
from flax_diffusion.core.io.hub_options import REPLACED
from flax_diffusion.models.modeling import Config
from flax_diffusion.models.pretrained import KEYWORDS, take_loading_keywords
from flax_diffusion.pipelines import images as pictures
from flax_diffusion.pipelines.parts import class_in_index, load_part, save_part

_INDEX = "model_index.json"
_UNET_OPTIONS = ("use_memory_efficient_attention", "split_head_dim")


class FlaxDiffusionPipeline:
    """Models, scheduler and tokenizers that draw pictures together; parameters are kept apart from it.

    A subclass takes its parts as arguments of `__init__`, which are also their names in folders.

    Attributes:
        torch_class: Name of the PyTorch class whose folders the pipeline reads and writes.
        optional: Parts that a folder may lack.
        dtype: Dtype of the computation.
    """

    torch_class: ClassVar[str]
    optional: ClassVar[frozenset[str]] = frozenset({"safety_checker", "feature_extractor"})
    vae: Any

    def __init__(self, dtype: Any = jnp.float32):
        self.dtype = dtype
        self._progress: dict[str, Any] = {}

    @classmethod
    def part_names(cls) -> list[str]:
        """Return the names of the parts, in the order of the arguments."""
        return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "dtype")]

    @property
    def components(self) -> dict[str, Any]:
        """Parts by name, with which another pipeline can be made; None for one that is not there."""
        return {name: getattr(self, name) for name in self.part_names()}

    @property
    def config(self) -> Config:
        """Content of model_index.json."""
        index = {"_class_name": self.torch_class, "_diffusers_version": __version__}
        return Config(index | {name: class_in_index(part) for name, part in self.components.items()})

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a latent's side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: Any = None,
        revision: str | None = None,
        variant: str | None = None,
        **options: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Load a pipeline from a folder or from the Hugging Face Hub; PyTorch's files are read as well as Flax's.

        Args:
            pretrained_model_name_or_path: Folder, or `owner/name` on the Hub.
            dtype: Dtype of the computation of UNet, ControlNet and autoencoder; None for float32. Text encoders
                compute in float32. Parameters keep the dtype of the file.
            revision: Branch, tag or commit on the Hub.
            variant: Variant of the files, such as "fp16".
            options: Parts in place of the folder's, such as `scheduler=…` or `safety_checker=None`, and where files
                come from, as in the models' `from_pretrained`. `split_head_dim` and `use_memory_efficient_attention`
                are taken and change nothing, as in the UNet.

        Returns:
            The pipeline, and its parameters and the scheduler's state by part.

        Raises:
            ConfigError: If an option is not known.
            WeightsError: If the folder is of another pipeline, or lacks a part.
        """
        keywords = dict(options)
        hub, _ = take_loading_keywords(cls.__name__, options)
        folder = model_files.resolve(pretrained_model_name_or_path, None, revision, [_INDEX], hub)
        index = model_files.read_json(folder / _INDEX)
        kind = cls._of_index(index, pretrained_model_name_or_path)
        for name in _UNET_OPTIONS:
            options.pop(name, None)
        given = {name: options.pop(name) for name in kind.part_names() if name in options}
        for name in options:
            known = [*kind.part_names(), *KEYWORDS, "dtype", "revision", "variant"]
            raise ConfigError(
                f"{cls.__name__}.from_pretrained knows no {name!r}: correct or remove it{nearest(name, known)}"
            )
        where = {name: keywords[name] for name in KEYWORDS if name in keywords and name not in REPLACED}
        parts: dict[str, Any] = {"dtype": dtype or jnp.float32}
        params: dict[str, Any] = {}
        for name in kind.part_names():
            if name in given:
                parts[name] = given[name]
            elif has_part(index, name):
                source = {"subfolder": name, "revision": revision, "variant": variant, **where}
                parts[name], own = load_part(
                    index[name][1], pretrained_model_name_or_path, dtype or jnp.float32, source
                )
                params |= {} if own is None else {name: own}
            elif name in cls.optional:
                parts[name] = None
            else:
                raise WeightsError(f"{pretrained_model_name_or_path} has no {name}: pass {name}=… to from_pretrained")
        return kind(**parts), params

    @classmethod
    def _of_index(cls, index: Mapping[str, Any], source: Any) -> type[FlaxDiffusionPipeline]:
        """Return the class of a folder's index; for a subclass, itself, if it has its parts."""
        name = str(index.get("_class_name")).removeprefix("Flax")
        if cls is not FlaxDiffusionPipeline:
            missing = [part for part in cls.part_names() if part not in index and part not in cls.optional]
            if name != cls.torch_class and any(part in ("unet", "text_encoder_2") for part in missing):
                raise WeightsError(f"{source} is a {name}, not a {cls.torch_class}: use the class that it names")
            return cls
        kinds = {kind.torch_class: kind for kind in _subclasses(FlaxDiffusionPipeline)}
        if name not in kinds:
            raise WeightsError(f"{source} is a {name}: use one of {', '.join(kinds)}{nearest(name, kinds)}")
        return kinds[name]

    def save_pretrained(
        self,
        save_directory: str | Path,
        params: Mapping[str, Any],
        push_to_hub: bool = False,
        *,
        repo_id: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
    ) -> None:
        """Write a folder that Diffusers' PyTorch classes load, and `from_pretrained` too.

        Args:
            save_directory: Folder to write to; made if it does not exist.
            params: Parameters by part, without an axis of devices.
            push_to_hub: Also upload the folder to the Hub.
            repo_id: Repository on the Hub; None for the folder's name.
            token: Token of the Hub; None for the one of the log-in.
            private: Make a new repository private; None for the owner's default.
            create_pr: Open a pull request in place of a commit.
            commit_message: Message of the commit on the Hub.

        Raises:
            WeightsError: If parameters are missing or do not fit, or the Hub refuses.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in self.components.items():
            if part is not None:
                save_part(part, folder / name, params.get(name))
        write_json(folder / _INDEX, dict(self.config))
        if push_to_hub:
            options = {"token": token, "private": private, "create_pr": create_pr, "commit_message": commit_message}
            publishing.push_folder(folder, repo_id or folder.resolve().name, **options)

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """Return pictures in [0, 1], (N, H, W, C) or (H, W, C), as Pillow pictures."""
        return pictures.numpy_to_pil(images)

    def progress_bar(self, iterable: Iterable[Any]) -> Any:
        """Return a progress bar around an iterable, as `set_progress_bar_config` set it."""
        return tqdm(iterable, **self._progress)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Set arguments of tqdm for `progress_bar`."""
        self._progress = kwargs

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={type(part).__name__}" for name, part in self.components.items())
        return f"{type(self).__name__}({parts})"


def _subclasses(cls: type[Any]) -> list[type[Any]]:
    """Return all pipelines that can be made."""
    found = [kind for child in cls.__subclasses__() for kind in [child, *_subclasses(child)]]
    return [kind for kind in found if "torch_class" in vars(kind)]
