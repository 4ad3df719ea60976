"""Options of data in shards: latents that were computed before, and pictures that do not fit the disk."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flax_diffusion.core.config.options import Reads
from flax_diffusion.core.tasks.common.dataset import DatasetConfig
from flax_diffusion.core.tasks.common.diffusion import DiffusionConfig


class ShardConfig(DiffusionConfig, DatasetConfig):
    """Options of tasks whose data may be in shards."""

    latents_dir: Annotated[str | None, Reads.DATA_FOLDER] = Field(
        None,
        description="Folder of latents, here or gs://, that precompute fills from the pictures, in ArrayRecord shards, "
        "and train reads in their place.",
    )
    latents_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Dtype in which precompute stores them. bfloat16 takes half of the space."
    )
    stream_shards: int | None = Field(
        None,
        ge=1,
        description="Read so many tar or Parquet shards at a time, mixed with each other. None: mix all examples.",
    )

    @property
    def other_data(self) -> str | None:
        """The folder of latents."""
        return self.latents_dir

    @model_validator(mode="after")
    def _check_latents(self) -> ShardConfig:
        if self.latents_dir is None:
            if self.latents_dtype != "float32":
                raise ValueError(f"--latents_dtype {self.latents_dtype} is of latents in shards: add --latents_dir")
            return self
        for name in ("cache_latents", "bucket_resolutions", "validation_data_dir"):
            if getattr(self, name):
                raise ValueError(f"--{name} computes what is in --latents_dir, or is not in it: drop one of them")
        if not (self.center_crop or self.resize_mode == "stretch"):
            raise ValueError(
                "--latents_dir holds each picture once, and crops at random would differ from epoch to epoch: add "
                "--center_crop, or --resize_mode stretch"
            )
        return self

    @model_validator(mode="after")
    def _check_stream(self) -> ShardConfig:
        if self.stream_shards is None:
            return self
        given = [name for name in ("cache_latents", "bucket_resolutions") if getattr(self, name)]
        if given:
            raise ValueError(
                f"--{given[0]} reads all pictures before the first step, and --stream_shards a few at a time: drop one"
                + (", or compute latents by precompute with --latents_dir" if given[0] == "cache_latents" else "")
            )
        if self.validation_split:
            raise ValueError(
                f"--validation_split {self.validation_split} takes single pictures out of the data, and "
                "--stream_shards reads whole shards: give --validation_data_dir"
            )
        if self.dataloader_num_workers:
            raise ValueError(
                f"--dataloader_num_workers {self.dataloader_num_workers}: threads read the shards of --stream_shards: "
                "give 0"
            )
        return self
