"""Images of given classes: `train class_conditional`.

Reference: Peebles and Xie, https://arxiv.org/abs/2212.09748; Ma et al., https://arxiv.org/abs/2401.08740, with flow
matching; Ho and Salimans, https://arxiv.org/abs/2207.12598, for the null class.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
from numpy.typing import DTypeLike
from pydantic import Field, model_validator

from flax_diffusion.core.config.defaults import with_defaults
from flax_diffusion.core.config.options import CONFIG_FILE, Reads
from flax_diffusion.core.data.batches import ExampleFn, LabelDropout, Precomputed
from flax_diffusion.core.data.shards.latents import LatentSource, open_latents
from flax_diffusion.core.data.sources.labels import LabelledSource, with_labels
from flax_diffusion.core.data.sources.source import Source, first_few
from flax_diffusion.core.errors import ConfigError, WeightsError, naming, unknown
from flax_diffusion.core.families import folders
from flax_diffusion.core.families.family import FAMILIES, ClassTable, ModelClass, Role, family_of
from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.objectives.objective import Objective
from flax_diffusion.core.spec import writing
from flax_diffusion.core.spec.pipeline import Component, PipelineSpec, Training
from flax_diffusion.core.spec.prompts import class_number, is_guided
from flax_diffusion.core.tasks.common.dataset import DATA_OPTIONS, open_dataset, stand_in
from flax_diffusion.core.tasks.common.diffusion import DiffusionTask
from flax_diffusion.core.tasks.common.evaluation import EvaluationConfig, evaluation_options
from flax_diffusion.core.tasks.common.shards import ShardConfig
from flax_diffusion.core.tasks.common.variance import VarianceConfig, with_variance
from flax_diffusion.core.tasks.parts import check_pipeline, from_scratch, frozen_vae, pretrained
from flax_diffusion.core.tasks.task import TASKS, Preview

if TYPE_CHECKING:
    from flax_diffusion.core.data.shards.streaming import StreamedSource

IMAGENET_CLASSES = 1000
_PREVIEWED = 10
"""Most classes that are drawn during training where no option names some."""


@with_defaults(adam_weight_decay=0.0, validation_epochs=None, eval_batch_size=4, output_dir="class-conditional-model")
class ClassConditionalConfig(VarianceConfig, ShardConfig, EvaluationConfig):
    """Images of given classes: `train class_conditional`. Trains a UNet2DModel or a DiTTransformer2DModel."""

    transformer: Annotated[dict[str, Any] | str | None, Reads.MODEL] = Field(
        None,
        description="From scratch: Diffusers config of the transformer, as a mapping, or the folder or .json file with "
        "it, or the name of a size, such as DiT-B/2.",
    )
    label_column: str | None = Field(
        None,
        description="Column that holds the classes, as numbers from 0 or names. None: `label`, or in a folder without "
        "such a column the names of its folders.",
    )
    class_dropout_prob: float = Field(
        0.1, ge=0, lt=1, description="Share of the classes that are replaced by the null class, which guidance needs."
    )
    new_class_embedding: bool = Field(
        False, description="Draw the table of a pretrained model's classes anew, for those of the data."
    )
    validation_class_labels: list[str] = Field(
        [], description="Classes to draw during training, by name or number. None: the first ten."
    )
    validation_guidance_scale: float = Field(4.0, ge=0, description="Guidance scale of these samples.")

    evaluate_guidance_scale: list[Annotated[float, Field(ge=0)]] = Field(
        [1.0], min_length=1, description="Scales of guidance, each judged by itself; 1 is none."
    )

    @model_validator(mode="after")
    def _check_model(self) -> ClassConditionalConfig:
        given = [name for name in ("unet", "transformer") if getattr(self, name) is not None]
        if self.pretrained_model_name_or_path and given:
            raise ValueError(f"--{given[0]} is for training from scratch: drop it or --pretrained_model_name_or_path")
        if not self.pretrained_model_name_or_path and len(given) != 1:
            raise ValueError(
                "nothing to train: give --pretrained_model_name_or_path, or --transformer or --unet to start from "
                "scratch"
                if not given
                else "--unet and --transformer are two models: drop one"
            )
        if self.new_class_embedding and not self.pretrained_model_name_or_path:
            raise ValueError(
                "--new_class_embedding goes with --pretrained_model_name_or_path: add it, or drop the former"
            )
        if not self.class_dropout_prob and self.validation_guidance_scale > 1:
            raise ValueError(
                f"--validation_guidance_scale {self.validation_guidance_scale} leads away from the null class, which "
                "--class_dropout_prob 0 never trains: give 1, or a --class_dropout_prob such as 0.1"
            )
        return self


class ClassConditionalTask(DiffusionTask[ClassConditionalConfig]):
    """Trains a denoiser that is told the class of each picture, in pixel or latent space."""

    name = "class_conditional"
    config_class = ClassConditionalConfig
    data_options = DATA_OPTIONS

    @classmethod
    def stand_ins(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return options that name data, for a plan, which reads none."""
        return stand_in(given)

    def described_source(self) -> Source:
        """Return one picture in place of the data, for a plan, of as many classes as the model has."""
        known, asked = self._classes_of_model(), self.config.validation_class_labels
        count = len(known) if known else self._number_of_classes() or IMAGENET_CLASSES
        names = [*dict.fromkeys([*asked, *map(str, range(count))])][:count]
        return LabelledSource(super().described_source(), np.zeros(1, np.int32), known or tuple(names))

    def __init__(self, config: ClassConditionalConfig):
        super().__init__(config)
        self.latents_dir, self.latents_dtype = config.latents_dir, config.latents_dtype
        self.caches_latents = config.cache_latents or config.latents_dir is not None

    def open_source(self) -> LabelledSource | LatentSource:
        """Open the latents, or the dataset."""
        config = self.config
        if config.latents_dir is None:
            return self.open_pictures()
        for name in ("train_data_dir", "dataset_name", "stream_shards"):
            if getattr(config, name):
                raise ConfigError(
                    f"--{name} {getattr(config, name)}: training reads --latents_dir {config.latents_dir} in place of "
                    "pictures: drop one of them"
                )
        with naming("--latents_dir"):
            return open_latents(as_path(config.latents_dir), self._classes_of_model(), config.max_train_samples)

    def open_pictures(self) -> LabelledSource:
        """Open the dataset."""
        if not (self.config.train_data_dir or self.config.dataset_name):
            raise ConfigError(
                "precompute class_conditional: latents are made of pictures: give --train_data_dir or --dataset_name"
            )
        source = open_dataset(self.config, stream_shards=self.config.stream_shards, examples=self.examples)
        option = "--train_data_dir" if self.config.train_data_dir else "--dataset_name"
        with naming(option) if self.examples is None else nullcontext():  # examples are named as such
            return with_labels(source, self.config.label_column, self._classes_of_model())

    def open_validation(self, source: Source) -> LabelledSource | None:
        """Open the dataset for validation, if there is one, whose classes are among those of the data."""
        config = self.config
        if config.validation_data_dir is None:
            return None
        assert isinstance(source, LabelledSource)
        found = open_dataset(config, validation=True)
        with naming("--validation_data_dir"):
            labelled = with_labels(found, config.label_column, source.classes)
        known, numbers = source.classes, tuple(str(number) for number in range(len(labelled.classes)))
        if labelled.classes != known and (labelled.classes != numbers or len(numbers) > len(known)):
            strange = [name for name in labelled.classes if name not in known] or list(labelled.classes[len(known) :])
            raise ConfigError(
                f"--validation_data_dir {config.validation_data_dir}: has the class {strange[0]}, which the training "
                f"data lack, whose classes are {first_few(list(known))}: take it away"
            )
        return labelled

    def stream_of(self, source: Source) -> StreamedSource | None:
        """Return the shards that a run streams, among its examples; None where it streams none."""
        if self.config.stream_shards is None:
            return None
        assert isinstance(source, LabelledSource)
        return cast("StreamedSource", source.source)

    def make_spec(self, source: Source) -> PipelineSpec:
        """Read the configs of the pipeline to train, for the classes of the data."""
        assert isinstance(source, LabelledSource | LatentSource)
        spec = self.checked(self.read_pipeline(source.classes))
        is_guided(spec, spec.classes[:1], self.config.validation_guidance_scale)
        for label in self.config.validation_class_labels:
            with naming("--validation_class_labels"):
                class_number(spec, label)
        return spec

    def reopen_spec(self, run: Path) -> PipelineSpec:
        """Return the pipeline that a run trains."""
        try:
            return self.read_pipeline(writing.read_classes(run))
        except WeightsError as error:
            raise WeightsError(f"{run / CONFIG_FILE} names what is not there any more: {error}") from error

    def read_pipeline(self, classes: Sequence[str]) -> PipelineSpec:
        """Read the configs of the pipeline.

        Args:
            classes: Names of the classes of the data.
        """
        config = self.config
        name, denoiser, kind, index = self._denoiser
        table = family_of(kind).class_table
        assert table is not None
        if config.pretrained_model_name_or_path:
            denoiser, classes = self._for_classes(denoiser, table, folders.classes(index, denoiser), classes)
        else:
            denoiser = self._new(name, denoiser, table, len(classes))
        components = {name: denoiser}
        parts = family_of(kind).pipelines[kind].parts
        vae = next((part for part, model in parts.items() if model.role is Role.AUTOENCODER), None)
        if config.vae is not None and vae is not None:
            components[vae] = frozen_vae(config.vae)
        elif vae is not None and folders.has_part(index, vae):
            components[vae] = pretrained(config, vae, parts[vae], train=False)
        return replace(self.pipeline(kind, components), classes=tuple(classes))

    @functools.cached_property
    def _denoiser(self) -> tuple[str, Component, str, dict[str, Any]]:
        """The denoiser's component name and config, the class of its pipeline, and a pretrained one's index."""
        config = self.config
        known = [family for family in FAMILIES.values() if family.class_table]
        if config.pretrained_model_name_or_path:
            index = check_pipeline(config, known)
            if not index:
                raise WeightsError(
                    f"--pretrained_model_name_or_path {config.pretrained_model_name_or_path}: has no model_index.json; "
                    "name a folder that holds a pipeline"
                )
            kind = index["_class_name"]
            name, model = _denoiser_of(kind)
            return name, pretrained(config, name, model, train=True), self._kind(name, kind), index
        name = "transformer" if config.unet is None else "unet"
        kind = self._kind(name)
        model, given = family_of(kind).pipelines[kind].parts[name], getattr(config, name)
        if isinstance(given, str) and given.partition("-")[0] in {size.partition("-")[0] for size in model.sizes}:
            if given not in model.sizes:
                raise unknown(f"--{name}", given, model.sizes)
            given = model.sizes[given] | {
                "in_channels": 3 if config.vae is None else frozen_vae(config.vae)["latent_channels"]
            }
        return name, from_scratch(given, f"--{name}", model), kind, {}

    def _kind(self, name: str, found: str | None = None) -> str:
        """Return the class of pipelines with a denoiser, and with an autoencoder where there is one to be.

        Args:
            name: The denoiser's component name.
            found: Class of the pretrained pipeline; None for a new one.
        """
        latent = self.config.vae is not None
        if found is not None and not latent:
            return found
        families = [family_of(found)] if found else [family for family in FAMILIES.values() if family.class_table]
        kinds = [kind for family in families for kind, own in family.new_pipelines.items() if name in own.parts]
        fitting = [kind for kind in kinds if latent == _has_vae(kind)]
        return (fitting or kinds)[0]

    def _new(self, name: str, denoiser: Component, table: ClassTable, classes: int) -> Component:
        """Return a new denoiser for a number of classes."""
        number = table.number(classes, null=self.config.class_dropout_prob > 0)
        given = denoiser[table.key]
        if given not in (None, number) and table.key in denoiser.config:
            raise ConfigError(
                f"--{name} with {table.key} {given}, and data of {classes} classes: must be {number}, or left out"
                + (", to have a row for the null class of --class_dropout_prob" if number != classes else "")
            )
        return replace(denoiser, config=denoiser.config | {table.key: number})

    def _for_classes(
        self, denoiser: Component, table: ClassTable, known: Sequence[str], found: Sequence[str]
    ) -> tuple[Component, Sequence[str]]:
        """Return a pretrained denoiser for the classes of the data, and the names of its classes.

        Args:
            denoiser: The denoiser.
            table: Its table of classes.
            known: Names of the classes that it knows.
            found: Names of the classes of the data.

        Raises:
            ConfigError: If it knows others, or lacks the null class.
        """
        drops = self.config.class_dropout_prob > 0
        rows = table.rows(denoiser)
        if self.config.new_class_embedding:
            config = denoiser.config | {table.key: table.number(len(found), null=drops)}
            new = Component(kind=denoiser.kind, config=config, training=Training.ALL, copied_from=denoiser)
            return new, found
        if rows is None:
            raise ConfigError(
                f"the model has no table of classes: its {table.key} is None: add --new_class_embedding, which draws "
                "one"
            )
        numbered = all(name == str(number) for number, name in enumerate(found))
        if len(found) != len(known) and not (numbered and len(found) < len(known)):
            raise ConfigError(
                f"the data have {len(found)} classes and the model knows {len(known)}: add --new_class_embedding, "
                "which draws its table of classes anew, or use the data of the model's classes"
            )
        if drops and rows == len(known):
            raise ConfigError(
                f"--class_dropout_prob {self.config.class_dropout_prob}: the model has {rows} rows for {rows} classes "
                "and none for the null class: give 0, or add --new_class_embedding"
            )
        return denoiser, known if numbered else found

    def _classes_of_model(self) -> tuple[str, ...]:
        """Return the names of the classes that the model knows; none where it is made for those of the data."""
        if not self.config.pretrained_model_name_or_path or self.config.new_class_embedding:
            return ()
        _, denoiser, _, index = self._denoiser
        return folders.classes(index, denoiser)

    def _number_of_classes(self) -> int | None:
        """Return the number of classes that the config of a new model says; None where it says none."""
        _, denoiser, kind, _ = self._denoiser
        table = family_of(kind).class_table
        if table is None or table.key not in denoiser.config:
            return None
        return denoiser[table.key] - table.number(0, null=self.config.class_dropout_prob > 0)

    def objective(self, spec: PipelineSpec, dtype: DTypeLike = np.float32) -> Objective:
        """Return what the denoiser learns, its variance too where the options ask for that."""
        return with_variance(super().objective(spec, dtype), spec, self.config.variance_loss_weight, dtype)

    def make_example_fn(
        self, spec: PipelineSpec, made: Precomputed | None = None, dtype: DTypeLike = np.float32
    ) -> ExampleFn:
        """Return what makes an example, with its class; a share of the classes is left out."""
        labels = LabelDropout(self.config.class_dropout_prob, spec.null_class)
        return replace(super().make_example_fn(spec, made, dtype), labels=labels)

    def make_preview(self, spec: PipelineSpec, source: Source) -> Preview | None:
        """Draw pictures of some classes, a row for each."""
        config = self.config
        labels = config.validation_class_labels or [str(number) for number in range(len(spec.classes))][:_PREVIEWED]
        names = [spec.classes[class_number(spec, label)] for label in labels]
        return self._samples(labels, config.validation_guidance_scale, config.eval_batch_size, names=names)

    def evaluation(self) -> dict[str, Any] | None:
        """Return what the run evaluates, by option of `evaluate`: pictures of all classes."""
        return evaluation_options(self.config, class_label=["all"])


def _denoiser_of(kind: str) -> tuple[str, ModelClass]:
    """Return the component name and the class of the denoiser of a class of pipelines."""
    parts = family_of(kind).pipelines[kind].parts
    return next((name, model) for name, model in parts.items() if model.role is Role.DENOISER)


def _has_vae(kind: str) -> bool:
    return any(model.role is Role.AUTOENCODER for model in family_of(kind).pipelines[kind].parts.values())


TASKS.register(ClassConditionalTask.name, ClassConditionalTask)
