"""Runs on some of the eight virtual devices, of which other tests see the first only."""

import jax
import numpy as np
from tiny import RUN

from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.run.schedule.steps import make_schedule
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig
from flax_diffusion.jax_backend.backend import JaxBackend

STEPS = 20
EIGHT = jax.devices()


def made(**options):
    values = RUN | {"global_batch_size": 16, "use_ema": True, "max_train_steps": STEPS} | options
    config = UnconditionalConfig(**values)
    return config, task_of(config).make_spec([])


def losses(devices, **options):
    """The losses of a run on as many devices, or for None on those that the backend chooses, and the backend."""
    config, spec = made(**options)
    backend = JaxBackend(config, spec, devices and EIGHT[:devices])
    backend.init_state()
    source = open_source(dataset_name="digits", caption_column=None)
    schedule = make_schedule(config, len(source), backend.device_count)
    loader = Loader(
        source, task_of(config).make_example_fn(spec), seed=0, batch_size=schedule.batch_size,
        accumulation=schedule.accumulation, num_steps=config.max_train_steps,
    )  # fmt: skip
    with loader:
        decays = dict.fromkeys(config.averages, 0.9)
        metrics = [backend.train_step(backend.put(batch), 1e-3, decays) for batch in loader]
    assert backend.program.step._cache_size() == 1, "the step compiled more than once"
    return np.array([backend.read(m)["loss"] for m in metrics]), backend


def lowered(config, spec, program):
    example = task_of(config).make_example_fn(spec)(open_source(dataset_name="digits"), 0, 0, 0)
    return program.step.lower(program.state, program.frozen, program.batch(example, 1, 16), program.rates)
