"""The program of a run: its modules, its optimizer and its compiled step, which need only shapes and shardings.

Training gives it weights. A plan compiles it for chips that this machine does not have.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.spec.pipeline import PipelineSpec, Training
from flax_diffusion.jax_backend import adapters
from flax_diffusion.jax_backend.exchange import BlockGather, Exchange
from flax_diffusion.jax_backend.modules import COMPUTE_DTYPES, Modules, build_modules
from flax_diffusion.jax_backend.optimizers.offload import on_host
from flax_diffusion.jax_backend.optimizers.optimizer import Params, make_optimizer
from flax_diffusion.jax_backend.sharding import batch_sharding, partitions, replicated, state_shardings
from flax_diffusion.jax_backend.train_step import TrainState, create_state, train_step, validation_loss

SUM_DTYPES = {"fp32": None, "bf16": jnp.bfloat16}
"""Dtype in which gradients are summed over devices, by --reduce_dtype; None for that of the weights."""

COMPILER_OPTIONS = {
    # XLA enlarges batches under 8 per chip by cutting pictures into strips before each convolution. By its own
    # estimate a residual block of SD 1.5 at batch 4 then takes 2.9 times as long.
    "tpu": {
        "xla_tpu_run_space_to_batch": False,
        "xla_tpu_run_space_to_batch_on_new_platforms": False,
        # Else matrix products whose result is divided over devices are cut into one per device, each followed by an
        # exchange: at the sizes of Stable Diffusion a feed-forward layer takes 12% longer, and twice as long to
        # compile.
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    }
}
"""Compiler options of the step, by platform."""

OFFLOADING = {
    # To hide the time of copies, the scheduler fills the free memory with moments that wait. With that turned off, it
    # leaves all copies back to the host until the end of the step. This option makes it save memory instead.
    "tpu": {"xla_tpu_scheduler_percent_shared_memory_limit": 1}
}
"""Further compiler options of the step where the moments are in the host's memory, by platform."""


class Program:
    """Modules, optimizer, state and step of a run on a mesh.

    Args:
        config: The run's options.
        spec: The pipeline.
        mesh: The devices, which may belong to a topology that is only described.
        dtype: Dtype of the trained weights and, without mixed precision, of all computation.
    """

    def __init__(self, config: TrainConfig, spec: PipelineSpec, mesh: Mesh, dtype: Any = jnp.float32):
        self.spec, self.mesh, self.dtype = spec, mesh, dtype
        compute = dtype if config.mixed_precision == "no" else COMPUTE_DTYPES[config.mixed_precision]
        self.modules = build_modules(
            spec, compute, gradient_checkpointing=config.gradient_checkpointing, mesh=mesh, options=config
        )
        self.exchange = Exchange(mesh, SUM_DTYPES[config.reduce_dtype])
        self.optimizer = make_optimizer(config)
        self.create_state = functools.partial(
            create_state, optimizer=self.optimizer, averages=config.averages, fp16=config.mixed_precision == "fp16"
        )
        self._unroll = mesh.devices.flat[0].platform == "cpu"
        in_step: dict[str, Any] = {
            "modules": self._gathering_layers() if config.fsdp_gather == "block" else self.modules,
            "exchange": self.exchange,
            "unroll": self._unroll,
        }
        self._validation_loss = functools.partial(validation_loss, **in_step)
        self._step = functools.partial(
            train_step,
            **in_step,
            optimizer=self.optimizer,
            max_grad_norm=config.max_grad_norm,
            rate_factors={name: part.rate_factor for name, part in spec.components.items()},
            seed=config.seed,
            skip_nonfinite=config.skip_nonfinite > 0,
        )
        self._offload, self._averages = config.offload_optimizer, config.averages

    def _gathering_layers(self) -> Modules:
        """Return the modules whose layers gather their weights when they are called."""
        specs: dict[str, Any] = {
            name: flatten_dict(partitions({name: model.params_shape()}, self.mesh)[name])
            for name, model in self.modules.by_name.items()
        }
        return replace(self.modules, block_gather=BlockGather(self.exchange, specs))

    @functools.cached_property
    def state(self) -> TrainState:
        """Shapes, dtypes and shardings of the train state."""
        params = {name: self._shapes(self._trained(name), self.dtype) for name in self.trained}
        state = self.placed(jax.eval_shape(self.create_state, params))
        return state.replace(opt_state=on_host(state.opt_state)) if self._offload else state

    @property
    def weights(self) -> int:
        """Number of the weights of all components."""
        return sum(
            leaf.size for model in self.modules.by_name.values() for leaf in jax.tree.leaves(model.params_shape())
        )

    @property
    def trained(self) -> list[str]:
        """Names of the components that train, wholly or by adapters."""
        return [name for name, part in self.spec.components.items() if part.is_trained]

    @property
    def frozen(self) -> Params:
        """Shapes, dtypes and shardings of the weights that do not train, in the precision of their computation."""
        own = {
            name: self.modules.by_name[name]
            for name, part in self.spec.components.items()
            if part.training is not Training.ALL
        }
        return self.placed({name: self._shapes(model.params_shape(), model.dtype) for name, model in own.items()})

    def batch(self, example: Mapping[str, np.ndarray], accumulation: int, batch_size: int) -> dict[str, Any]:
        """Return shapes, dtypes and shardings of a step's batch; the indices of examples are no part of it.

        Args:
            example: An example like those of the batch.
            accumulation: Micro-batches per optimizer step.
            batch_size: Images per micro-batch, over all devices.
        """
        sharding = batch_sharding(self.mesh)
        return {
            key: jax.ShapeDtypeStruct((accumulation, batch_size, *value.shape), value.dtype, sharding=sharding)
            for key, value in example.items()
            if key != "example_index"
        }

    @property
    def rates(self) -> dict[str, Any]:
        """Shapes, dtypes and shardings of a step's learning rate and EMA decays."""
        real = jnp.promote_types(self.dtype, jnp.float32)
        scalar = jax.ShapeDtypeStruct((), real, sharding=replicated(self.mesh))
        return {"learning_rate": scalar, "ema_decays": dict.fromkeys(self._averages, scalar)}

    @functools.cached_property
    def step(self) -> Any:
        """The jitted step, a function of (state, frozen, batch, rates), to which the state is donated."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return jax.jit(
            self._step,
            donate_argnums=0,
            out_shardings=(shardings, replicated(self.mesh)),
            compiler_options=self._compiler_options(self.mesh.devices.flat[0].platform),
        )

    def flops(self, *arguments: Any) -> float | None:
        """Return the FLOPs of a step on each device; None where XLA does not tell them.

        Where a step was taken, this compiles nothing.

        What is computed again to save memory counts. Of a loop over micro-batches XLA counts the body once, and this
        is that count times the micro-batches: the update, counted as often, is under a thousandth of it.

        Args:
            arguments: As of `step`, with their shapes and shardings alone of interest.
        """
        lowered, (_, _, batch, _) = self.step.lower(*arguments), arguments
        platform = self.mesh.devices.flat[0].platform
        # The compiler knows the kernels of a TPU, and on other platforms the program before it knows all products.
        counted = lowered.compile() if platform == "tpu" else lowered
        passes = 1 if self._unroll else batch["loss_weights"].shape[0]
        costs = counted.cost_analysis()
        return costs["flops"] * passes if costs and "flops" in costs else None

    @functools.cached_property
    def validation_loss(self) -> Any:
        """The jitted loss without dropout, a function of (params, frozen, batch)."""
        options = COMPILER_OPTIONS.get(self.mesh.devices.flat[0].platform, {})
        return jax.jit(self._validation_loss, out_shardings=replicated(self.mesh), compiler_options=options)

    @functools.cached_property
    def as_params(self) -> Any:
        """The jitted function that returns a moving average divided as the weights are."""
        return jax.jit(lambda average: average, out_shardings=jax.tree.map(lambda one: one.sharding, self.state.params))

    def _compiler_options(self, platform: str) -> dict[str, Any]:
        return COMPILER_OPTIONS.get(platform, {}) | (OFFLOADING.get(platform, {}) if self._offload else {})

    def init_state(self, params: Params) -> TrainState:
        """Make the state before the first step, on its shards.

        Args:
            params: The trained weights. They are donated, so that they and the state are never both in memory.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return jax.jit(self.create_state, donate_argnums=0, out_shardings=shardings)(params)

    def placed(self, tree: Any) -> Any:
        """Return a tree of shapes with shardings, each chosen by the path in the tree."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            state_shardings(tree, self.mesh),
        )

    def _trained(self, name: str) -> Params:
        """Return the trained part of a component, as arrays or shapes."""
        component, shapes = self.spec.components[name], self.modules.by_name[name].params_shape()
        if component.training is not Training.ADAPTERS:
            return shapes
        return adapters.draw(
            component, jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes), 0
        )

    @staticmethod
    def _shapes(tree: Any, dtype: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)
