"""What a denoiser learns: how an example's time is drawn, and how its input and its target are mixed.

With Gaussian noise every objective here is linear in the clean sample x and the noise ε. So an example carries four
numbers, and a train step knows no objective:

    input  = input_clean · x + input_noise · (ε + perturbation)
    target = target_clean · x + target_noise · ε
    loss   = loss_weights · mean (prediction − target)²

Where a model learns its variance, the loss has the term of `variational_bound` beside the mean.

A new objective is one module of this package that registers an `Objective` in `OBJECTIVES`, or a class of the user's.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from inspect import isabstract
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike
from pydantic import BaseModel

from flax_diffusion.core.errors import ConfigError, nearest, unknown
from flax_diffusion.core.registry import Registry


class Mixture(NamedTuple):
    """What an objective draws for one example; every field is a scalar array ().

    Attributes:
        timesteps: The time that the model is told: int32 of a discrete objective, float32 of a continuous one.
        input_clean: Of x in the model's input.
        input_noise: Of ε in the model's input.
        target_clean: Of x in what the model is to say.
        target_noise: Of ε in what the model is to say.
        loss_weights: Of the example's mean squared error, float32.
    """

    timesteps: np.ndarray
    input_clean: np.ndarray
    input_noise: np.ndarray
    target_clean: np.ndarray
    target_noise: np.ndarray
    loss_weights: np.ndarray

    @classmethod
    def of(cls, *numbers: float, dtype: DTypeLike = np.float32) -> Mixture:
        """Return the mixture of numbers.

        Args:
            numbers: Its fields in their order; the weight may be left out, for 1.
            dtype: Dtype of all of them.
        """
        weighted = numbers if len(numbers) == len(cls._fields) else (*numbers, 1)
        return cls(*(np.asarray(number, dtype) for number in weighted))

    def clean(self, given: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """Return the x that an input and a prediction of its target imply, of any shape."""
        share = self.input_clean * self.target_noise - self.input_noise * self.target_clean
        return (self.target_noise * given - self.input_noise * predicted) / share


class NoOptions(BaseModel):
    """Options of an objective that has none."""


class Objective(ABC):
    """Draws the mixtures of examples. Picklable, since loader processes draw too.

    A new one has a `name`, the `schedulers` that draw from its models, and `draw`:

        class Sphere(Objective):  # the model predicts the velocity on the arc from picture to noise
            name, schedulers = "sphere", ("FlowMatchEulerDiscreteScheduler",)

            def draw(self, rng):
                a = rng.random() * np.pi / 2
                numbers = (2000 * a / np.pi, np.cos(a), np.sin(a), -np.sin(a), np.cos(a))
                return Mixture.of(*numbers, dtype=self.dtype)

    `--objective my_module:Sphere` trains with it, on both backends. What else is here may be overridden.

    An objective whose loss is not linear in x and ε has a method `loss`, and, as no sampler here then draws from its
    models, a method `sample`; see there. Both are written in JAX, and PyTorch refuses the objective.

    Args:
        dtype: Dtype of the numbers.
    """

    name: ClassVar[str]
    """The value of --objective."""
    options: ClassVar[type[BaseModel]] = NoOptions
    """The options that go with this objective alone; those of a run have it as a base class."""
    schedulers: ClassVar[tuple[str, ...]]
    """PyTorch's classes of schedulers whose models are trained so; the first is the one that a new model gets."""

    loss: ClassVar[Callable[..., Any] | None] = None
    """None, or a method `loss(self, model, batch, key)` in JAX, which returns the losses of B examples, (B,).

    `model(x, t)` returns the prediction (B, C, h, w) of the weights that train, for x (B, C, h, w) and times (B,), in
    float32 at least. It knows the condition of the batch. It can be differentiated, and taken by `jax.jvp`.
    `batch` holds clean and noise, both (B, C, h, w), and what `draw` returned, by the names of its fields, each (B,).
    `draw` may return another named tuple than `Mixture`, with any scalars, of which one is called loss_weights: the
    losses are multiplied by these, and their mean trains. `key` is a PRNG key of the step, the same on every device.
    """
    sample: ClassVar[Callable[..., Any] | None] = None
    """None, or a method `sample(self, model, noise)` in JAX, which returns samples x, (B, C, h, w).

    `model` is that of `loss`, with guidance where it is asked for. `noise` (N, B, C, h, w) is independent standard
    normal noise, of which N is --num_inference_steps. The class names a scheduler of its own in `schedulers`, that no
    other sampler draws from; `generate` and `evaluate` are told the objective by --objective.
    """

    def __init__(self, dtype: DTypeLike = np.float32):
        self.dtype: Any = dtype

    @classmethod
    def scheduler(cls, options: Any) -> dict[str, Any]:
        """Return the scheduler config of a new model.

        Args:
            options: Of the run, which have those of the objective.
        """
        return {"_class_name": cls.schedulers[0]}

    @classmethod
    def changed(cls, scheduler: Mapping[str, Any], options: Any) -> dict[str, Any]:
        """Return a scheduler config with what the options set over it."""
        return dict(scheduler)

    @classmethod
    def prediction(cls, scheduler: Mapping[str, Any]) -> str:
        """Return what the model predicts, by the name that Diffusers has for it.

        Raises:
            ConfigError: If the scheduler config says what is not known.
        """
        return cls.name

    @classmethod
    def from_scheduler(
        cls, scheduler: Mapping[str, Any], options: Any, dtype: DTypeLike = np.float32, *, conditional: bool = False
    ) -> Self:
        """Make the objective of a run.

        Args:
            scheduler: Config of the model's scheduler.
            options: Of the run, which have those of the objective.
            dtype: In which the numbers are computed and kept.
            conditional: Whether pictures follow a condition, such as a prompt.

        Raises:
            ConfigError: For values that do not go together.
        """
        return cls(dtype)

    @classmethod
    def noise_levels(cls, timesteps: np.ndarray, scheduler: Mapping[str, Any]) -> np.ndarray:
        """Return the noise levels of a sampler's steps, by which users give intervals.

        Args:
            timesteps: What the model is told at each step, (steps,).
            scheduler: Config of the scheduler.

        Returns:
            Shares of the training timesteps, float64 (steps,): 0 for no noise, 1 for nothing else.
        """
        return np.asarray(timesteps, np.float64) / scheduler.get("num_train_timesteps", 1000)

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Mixture:
        """Draw one example's mixture.

        Args:
            rng: Gives the example's time, and nothing else is drawn from it.
        """


OBJECTIVES: Registry[type[Objective]] = Registry("objective", ["flax_diffusion.core.objectives"], "flax_diffusion.core")
"""All objectives by name."""


def find(name: str) -> type[Objective]:
    """Return an objective by name.

    Args:
        name: Name of one in `OBJECTIVES`, or `module:Class` for a class of the user's own, which is then one of these.

    Raises:
        ConfigError: If there is none, if its module cannot be imported, or if another one has its name.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        if name not in OBJECTIVES:
            raise unknown("--objective", name, OBJECTIVES)
        return OBJECTIVES[name]
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(
            f"--objective {name}: {module} cannot be imported ({type(error).__name__}: {error}); it must lie in the "
            "folder that the command is given in, or in PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ConfigError(f"--objective {name}: {module} has no class {attribute} of `Objective`'s; name one")
    lacking = [one for one in ("name", "schedulers") if not hasattr(found, one)]
    if lacking or isabstract(found):
        raise ConfigError(f"--objective {name}: {attribute} has no {' and no '.join(lacking) or 'draw'}; add it")
    if OBJECTIVES.get(found.name, found) is not found:
        raise ConfigError(f"--objective {name}: there is another objective of the name {found.name}; rename it")
    _check_own(name, found)
    return OBJECTIVES.register(found.name, found)


def _check_own(name: str, found: type[Objective]) -> None:
    """Raise ConfigError for a class of the user's whose loss and samples do not go together.

    Args:
        name: What the user calls it.
        found: The class.
    """
    if (found.loss is None) != (found.sample is None):
        has, lacks = ("loss", "sample") if found.sample is None else ("sample", "loss")
        raise ConfigError(f"--objective {name}: {found.__name__} has a method {has} and no {lacks}; add it")
    if found.loss is None:
        return
    for other in OBJECTIVES.values():
        if taken := sorted({*found.schedulers} & {*other.schedulers}) if other is not found else []:
            raise ConfigError(
                f"--objective {name}: {found.__name__} draws by its own sample, and models of {taken[0]} are those of "
                f"{other.name}: put a name of its own in schedulers, such as {found.__name__}Scheduler"
            )


def objective_of(scheduler: Mapping[str, Any]) -> type[Objective]:
    """Return the objective that the models of a scheduler config are trained by.

    Raises:
        ConfigError: For a config without a class, or with one that is not known.
    """
    name = scheduler.get("_class_name")
    if name is None:
        raise ConfigError("the scheduler config has no _class_name; add one, such as DDPMScheduler")
    found = str(name).removeprefix("Flax")
    known = [name for objective in OBJECTIVES.values() for name in objective.schedulers]
    if found not in known:
        raise ConfigError(
            f"scheduler {found}: is not among those whose models train here, which are {', '.join(known)}"
            f"{nearest(found, known)}; of an objective of your own, give --objective module:Class"
        )
    return next(objective for objective in OBJECTIVES.values() if found in objective.schedulers)


def check_options(chosen: type[Objective], options: BaseModel) -> None:
    """Refuse options of other objectives.

    Raises:
        ConfigError: Naming the first that is not at its default.
    """
    own = chosen.options.model_fields.keys()
    fields = type(options).model_fields
    for other in OBJECTIVES.values():
        for name in other.options.model_fields:
            if name not in own and name in fields and getattr(options, name) != fields[name].default:
                raise ConfigError(
                    f"--{name} goes with --objective {other.name}, and this model is trained by {chosen.name}: drop "
                    "one of them"
                )
