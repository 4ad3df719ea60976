"""Options of the command that judges pictures, and what they rule out before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, create_model

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.config.options import Interpolation
from flax_diffusion.core.drawing.options import OUTPUT, GenerateConfig
from flax_diffusion.core.drawing.pictures import INIT_IMAGE, OPTIONS
from flax_diffusion.core.errors import ConfigError, nearest_multiples, unknown
from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.metrics.judging import INCEPTION, METRICS, needs

_NUM_IMAGES = 50_000  # of published distances
_WEIGHTS_FILE = "pytorch-fid's pt_inception-2015-12-05-6726825d.pth"
_LEFT_OUT = (*OUTPUT, *OPTIONS, INIT_IMAGE, "strength", "prompts_file")
"""Options of `generate` that are not those of judging: where pictures go, and what is given for single ones."""


class EvaluateOptions(BaseModel):
    """Options of `evaluate` beside those that it shares with `generate`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(
        None, description="Model whose pictures are judged: a folder or Hub id, a run or a checkpoint, as of generate."
    )
    images: str | None = Field(None, description="Folder of pictures to judge instead of a model's.")
    reference: str | None = Field(
        None,
        description="Real pictures to compare with: a folder, `digits`, or an npz file of statistics or pictures, of "
        "--save_reference, guided-diffusion, pytorch-fid or clean-fid.",
    )
    metrics: list[str] = Field(["fid"], description="Metrics, separated by commas or spaces: " + ", ".join(METRICS))
    features: Literal["inception", "pixels"] = Field(
        "inception", description="What is compared: features of the Inception network, or the pixels of small pictures."
    )
    inception: str | None = Field(
        None,
        description=f"Weights of the Inception network, a local file: {_WEIGHTS_FILE}, or safetensors of its keys.",
    )
    num_images: int | None = Field(
        None, ge=2, description=f"Pictures to judge, in all. None: {_NUM_IMAGES} of a model, or all of a folder."
    )
    guidance_scale: list[Annotated[float, Field(ge=0)]] = Field(
        [], description="Scales of classifier-free guidance, each judged by itself. 1 is none. None: that of generate."
    )
    batch_size: int = Field(64, ge=1, description="Pictures that are drawn and judged at a time.")
    resolution: int | None = Field(
        None,
        ge=1,
        le=2**14,
        description="Side of the squares that pictures in folders are scaled and cut to, pixels. None: the size that "
        "the model draws, or that of the first of the --images.",
    )
    channels: int | None = Field(
        None, description="1 to judge pictures in folders as grey, 3 as RGB. None: as the model draws, or 3."
    )
    image_interpolation_mode: Interpolation = Field("bilinear", description="Filter that scales pictures in folders.")
    save_reference: str | None = Field(
        None, description="npz file for the statistics of the real pictures; alone with --reference, nothing is judged."
    )
    output: str | None = Field(None, description="JSON file for the values.")


def _shared() -> dict[str, Any]:
    own = (*EvaluateOptions.model_fields, *_LEFT_OUT)
    return {name: (field.annotation, field) for name, field in GenerateConfig.model_fields.items() if name not in own}


EvaluateConfig: type[EvaluateOptions] = create_model(
    "EvaluateConfig", __base__=EvaluateOptions, __doc__="Options of `evaluate`.", **_shared()
)
"""All options of `evaluate`: its own, and those of drawing, with the defaults that they have in `generate`."""


def shared(config: EvaluateOptions, name: str) -> Any:
    """Return the value of an option that drawing has too."""
    return getattr(config, name)


def options_of(values: dict[str, Any]) -> EvaluateOptions:
    """Return the checked options of a call from Python; a single metric, prompt or scale may stand for a list.

    Args:
        values: Values by option.

    Raises:
        ConfigError: For unknown names and wrong values.
    """
    lists = ("metrics", "prompt", "class_label", "lora", "embeddings")
    values = {name: [value] if name in lists and isinstance(value, str) else value for name, value in values.items()}
    if isinstance(values.get("guidance_scale"), int | float):
        values["guidance_scale"] = [values["guidance_scale"]]
    return checked(command_line.build(EvaluateConfig, values, "evaluate"))


def parse(argv: Sequence[str], prog: str) -> EvaluateOptions:
    """Parse a command line.

    Args:
        argv: The words.
        prog: Name of the command, for its help.

    Raises:
        ConfigError: For unknown names and wrong values.
    """
    parser = command_line.Parser(prog=prog, description="Judge pictures by how far they are from real ones.")
    command_line.add_fields(parser, EvaluateConfig)
    return checked(command_line.build(EvaluateConfig, parser.parse(argv), "command line"))


def metrics_of(config: EvaluateOptions) -> list[str]:
    """Return the names of the metrics, in the order of the table.

    Raises:
        ConfigError: For a name that no metric has.
    """
    names = [name.strip() for words in config.metrics for name in words.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            raise unknown("--metrics", name, METRICS)
    if not names:
        raise ConfigError(f"--metrics: names none; name some of {', '.join(METRICS)}")
    return [name for name in METRICS if name in names]


def drawing(config: EvaluateOptions, guidance_scale: float | None = None, shares: int = 1) -> GenerateConfig:
    """Return the options of drawing the pictures to judge.

    Args:
        config: The options, which name a model.
        guidance_scale: One of the scales; None for that of `generate`.
        shares: Number of the prompts or classes, which have equal shares of the pictures.

    Raises:
        ConfigError: For values that drawing does not take.
    """
    values = {name: shared(config, name) for name in _shared()}
    given = {"model": config.model, "guidance_scale": guidance_scale, "batch_size": config.batch_size}
    given["num_images"] = count_of(config) // shares
    return cast(GenerateConfig, command_line.build(GenerateConfig, values | given, "evaluate"))


def count_of(config: EvaluateOptions) -> int:
    """Return the number of pictures that a model draws."""
    return config.num_images or _NUM_IMAGES


def checked(config: EvaluateOptions) -> EvaluateOptions:
    """Return options that fit each other.

    Args:
        config: The options.

    Raises:
        ConfigError: If something is missing, or asked for that nothing is done with.
    """
    names = metrics_of(config)
    if config.model is not None and config.images is not None:
        raise ConfigError(f"--model {config.model} and --images {config.images} exclude each other: drop one")
    if config.model is None and config.images is None and config.save_reference is None:
        raise ConfigError("nothing to judge: give --model, or --images for pictures that are there")
    if config.features == INCEPTION and config.inception is None:
        raise ConfigError(
            f"--features inception needs --inception FILE, {_WEIGHTS_FILE}, which is not downloaded; or compare small "
            "pictures by --features pixels"
        )
    if config.features != INCEPTION and config.inception is not None:
        raise ConfigError(f"--inception {config.inception}: --features {config.features} needs no network; drop one")
    classes = needs(names, "needs_logits")
    if classes and config.features != INCEPTION:
        raise ConfigError(
            f"--metrics {classes[0]} needs the classes of the Inception network, which --features {config.features} "
            "has not: drop one"
        )
    if config.channels not in (None, 1, 3):
        raise ConfigError(f"--channels {config.channels}: must be 1 (grey) or 3 (RGB)")
    _check_unused(config)
    _check_reference(config, names)
    _check_counts(config, names)
    return config


def _check_unused(config: EvaluateOptions) -> None:
    """Refuse options that were given and that nothing would be done with."""
    given = config.model_fields_set
    if config.model is None:
        for name in (*_shared(), "guidance_scale"):
            if name in given and name != "seed":
                raise ConfigError(f"--{name} is for drawing with --model, which is not given: drop one")
        if config.images is None and config.num_images is not None:
            raise ConfigError(f"--num_images {config.num_images}: no pictures are judged; drop it")
    in_file = config.reference is not None and config.reference.endswith(".npz")
    for name in ("resolution", "channels", "image_interpolation_mode"):
        if name in given and config.images is None and in_file:
            raise ConfigError(f"--{name} is for pictures in folders, and there are none: drop it")


def _check_reference(config: EvaluateOptions, names: list[str]) -> None:
    compared = needs(names, "needs_reference")
    if config.reference is None:
        if compared:
            raise ConfigError(f"--metrics {compared[0]} compares with real pictures: give them by --reference")
        if config.save_reference is not None:
            raise ConfigError(f"--save_reference {config.save_reference} needs the real pictures, by --reference")
        return
    if not compared:
        raise ConfigError(
            f"--reference {config.reference}: --metrics {', '.join(names)} compares with nothing: drop it"
        )
    if config.save_reference is not None and as_path(config.save_reference).suffix != ".npz":
        raise ConfigError(f"--save_reference {config.save_reference}: must end in .npz")
    if config.model is None and config.images is None:
        if config.resolution is None and as_path(config.reference).suffix != ".npz":
            raise ConfigError("--save_reference without --model and --images needs --resolution, the pictures' size")
        if config.output is not None:
            raise ConfigError(f"--output {config.output}: nothing is judged without --model or --images; drop it")


def _check_counts(config: EvaluateOptions, names: list[str]) -> None:
    count = count_of(config)
    check_shares(count, len(shared(config, "prompt")))
    if config.num_images is not None or config.model is not None:
        check_least(names, count, f"--num_images {count}")


def check_shares(count: int, shares: int) -> None:
    """Refuse a number of pictures of which prompts or classes cannot have equal shares.

    Args:
        count: Number of pictures.
        shares: Number of prompts or classes; 0 for none.

    Raises:
        ConfigError: If it is no multiple.
    """
    if shares and count % shares:
        raise ConfigError(
            f"--num_images {count}: must be a multiple of the {shares} prompts or classes, which have equal shares: "
            f"{nearest_multiples(count, shares)}"
        )


def check_least(names: list[str], count: int, what: str) -> None:
    """Refuse too few pictures for a metric.

    Args:
        names: Names of the metrics.
        count: Number of pictures.
        what: What the pictures are, for the message.

    Raises:
        ConfigError: If a metric needs more.
    """
    for name in names:
        if count < METRICS[name].least:
            raise ConfigError(
                f"{what}: --metrics {name} needs {METRICS[name].least} pictures, there are {count}: give more, or drop "
                f"{name}"
            )
