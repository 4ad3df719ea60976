"""The JAX backend: devices, sharded state, the compiled step, Orbax checkpoints, sampling and export."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from flax_diffusion.core.backend import Batch
from flax_diffusion.core.config import TrainConfig
from flax_diffusion.core.errors import CheckpointError
from flax_diffusion.core.pipeline import PipelineSpec
from flax_diffusion.modules import COMPUTE_DTYPES, build_modules, load_pretrained
from flax_diffusion.optimizer import Params, make_optimizer
from flax_diffusion.sampling import Sampler
from flax_diffusion.schedulers import scheduler_from_config
from flax_diffusion.sharding import make_mesh, put, put_batch, replicated, state_shardings
from flax_diffusion.train_step import TrainState, create_state, train_step


class JaxBackend:
    """Implements `core.backend.Backend` with Flax modules on a mesh of all devices."""

    def __init__(self, config: TrainConfig, spec: PipelineSpec, devices: Sequence[Any] | None = None):
        self.config, self.spec = config, spec
        self.mesh = make_mesh(config.data_parallelism, config.fsdp_parallelism, devices)
        self.process_index, self.process_count = jax.process_index(), jax.process_count()
        self.device_count = self.mesh.size
        self.modules = build_modules(spec, config.mixed_precision, gradient_checkpointing=config.gradient_checkpointing)
        self.optimizer = make_optimizer(config)
        # Scheduler options are checked here, before any weight is read.
        self._sampler = Sampler(self.modules, scheduler_from_config(spec.scheduler), self.mesh)
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self.state: TrainState
        self.frozen: Params
        self._step: Any

    def init_state(self) -> int:
        """Loads or draws the weights straight onto their shards."""
        trained = {name: part for name, part in self.spec.components.items() if part.train}
        loaded = {name: load_pretrained(part) for name, part in self.spec.components.items() if part.weights}
        drawn = {name: self.modules.by_name[name] for name in trained if name not in loaded}

        def draw(key: jax.Array) -> Params:
            return {
                name: module.init_weights(jax.random.fold_in(key, position))
                for position, (name, module) in enumerate(sorted(drawn.items()))
            }

        create = functools.partial(
            create_state,
            optimizer=self.optimizer,
            use_ema=self.config.use_ema,
            fp16=self.config.mixed_precision == "fp16",
        )
        key = jax.device_put(jax.random.key(self.config.seed), replicated(self.mesh))
        place = functools.partial(state_shardings, mesh=self.mesh)
        abstract = jax.eval_shape(draw, key)
        params = jax.jit(draw, out_shardings=place({"params": abstract})["params"])(key)
        params |= {name: put(loaded[name], place(loaded[name])) for name in trained if name in loaded}
        shardings = place(jax.eval_shape(create, params))
        # The weights are donated: state and weights never stand side by side.
        self.state = jax.jit(create, donate_argnums=0, out_shardings=shardings)(params)
        step = functools.partial(
            train_step,
            modules=self.modules,
            optimizer=self.optimizer,
            max_grad_norm=self.config.max_grad_norm,
            seed=self.config.seed,
            unroll=self.mesh.devices.flat[0].platform == "cpu",
        )
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(self.mesh)))

        dtype = COMPUTE_DTYPES[self.config.mixed_precision]
        self.frozen = {}
        for name, params_of in loaded.items():
            if name not in trained:
                keep = self.modules.by_name[name].dtype == jnp.float32
                self.frozen[name] = put(_cast(params_of, jnp.float32 if keep else dtype), place(params_of))
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def put(self, batch: Batch) -> dict[str, jax.Array]:
        """Starts the copy of this process's examples to its devices; names of examples stay on the host."""
        return put_batch({key: value for key, value in batch.items() if key != "example_index"}, self.mesh)

    def train_step(self, batch: dict[str, jax.Array], learning_rate: float, ema_decay: float) -> dict[str, jax.Array]:
        """Dispatches the compiled step."""
        real = np.float64 if jax.config.read("jax_enable_x64") else np.float32
        rates = jax.device_put(
            {"learning_rate": real(learning_rate), "ema_decay": real(ema_decay)}, replicated(self.mesh)
        )
        with jax.transfer_guard("disallow"):
            self.state, metrics = self._step(self.state, self.frozen, batch, rates)
        return metrics

    def read(self, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """Waits for a step's numbers."""
        return {key: float(value) for key, value in jax.device_get(metrics).items()}

    def save(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Copies the state to the host and writes it in the background, under a temporary name until complete."""
        if self._checkpointer is None:
            self._checkpointer = ocp.AsyncCheckpointer(_checkpoint_handler())
        if folder.exists():  # written by a run that resumed from before it
            shutil.rmtree(folder)
        self._checkpointer.save(
            folder.resolve(),
            args=ocp.args.Composite(state=ocp.args.StandardSave(self.state), metadata=ocp.args.JsonSave(metadata)),
        )

    def wait(self) -> None:
        """Waits until the last save is complete."""
        if self._checkpointer is not None:
            self._checkpointer.wait_until_finished()

    def restore(self, folder: Path) -> dict[str, Any]:
        """Loads a checkpoint onto the shards of this mesh, whatever mesh wrote it."""
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), self.state
        )
        with ocp.Checkpointer(_checkpoint_handler()) as checkpointer:
            _check_same_tree(checkpointer, folder, target)
            restored = checkpointer.restore(
                folder.resolve(),
                args=ocp.args.Composite(state=ocp.args.StandardRestore(target), metadata=ocp.args.JsonRestore()),
            )
        self.state = restored["state"]
        return restored["metadata"]

    def sample(
        self, *, prompts: list[str], num_images: int, num_inference_steps: int, guidance_scale: float, seed: int
    ) -> np.ndarray:
        """Draws images with the moving average, or with the weights themselves where there is none."""
        return self._sampler(
            self.frozen | self._exported(),
            prompts=prompts,
            num_images=num_images,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
        )

    def export(self, folder: Path) -> None:
        """Writes every component's float32 weights."""
        trained = self._exported()
        for name, component in self.spec.components.items():
            params = jax.device_get(trained[name]) if name in trained else load_pretrained(component)
            if self.process_index == 0:
                self.modules.by_name[name].save_pretrained(folder / name, params)

    def _exported(self) -> Params:
        return self.state.params if self.state.ema is None else self.state.ema


def _cast(params: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)


def _checkpoint_handler() -> ocp.CompositeCheckpointHandler:
    return ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), metadata=ocp.JsonCheckpointHandler())


def _check_same_tree(checkpointer: ocp.Checkpointer, folder: Path, target: Any) -> None:
    """Compares names, shapes and types before anything is read.

    Raises:
        CheckpointError: Naming the first differences.
    """
    try:
        items = checkpointer.metadata(folder.resolve()).item_metadata
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a complete checkpoint ({error}); resume from another") from error
    saved = items["state"] if items is not None else None
    if saved is None:
        raise CheckpointError(f"{folder}: not a checkpoint of this backend: it holds no `state`; resume from another")
    have, want = _shapes(saved), _shapes(target)
    differences = [
        f"{name} is {have[name]} there and {want[name]} here"
        for name in want
        if name in have and have[name] != want[name]
    ]
    differences += [f"{name} is missing there" for name in want if name not in have]
    differences += [f"{name} is not in this run" for name in have if name not in want]
    differences.sort(key=lambda text: not text.startswith("params/"))  # moments only repeat what the weights say
    if differences:
        more = f", and {len(differences) - 3} more differences" if len(differences) > 3 else ""
        raise CheckpointError(
            f"{folder.name} is of another model or optimizer: {'; '.join(differences[:3])}{more}; resume with the "
            "config it was made with"
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
