"""The JAX backend: devices, sharded state, the compiled step, Orbax checkpoints, sampling and export."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flax_diffusion.core.backend import Batch, Described, check_optimizer, refuse
from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.checkpoints.folders import check_same_shapes
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.errors import CheckpointError
from flax_diffusion.core.families.family import Role
from flax_diffusion.core.io.files import absolute, written_folder
from flax_diffusion.core.io.torch_names import from_torch_layout
from flax_diffusion.core.run.schedule.steps import micro_batch_size
from flax_diffusion.core.spec.pipeline import PipelineSpec, Training
from flax_diffusion.core.spec.prompts import sampler_config
from flax_diffusion.core.tracking.peaks import peak_flops
from flax_diffusion.jax_backend import adapters, cores
from flax_diffusion.jax_backend.features import FeatureExtractor
from flax_diffusion.jax_backend.modules import first_weights, load_pretrained
from flax_diffusion.jax_backend.optimizers.optimizer import OPTIMIZERS, Params
from flax_diffusion.jax_backend.processes import all_processes, broadcast_from_first, to_host
from flax_diffusion.jax_backend.program import Program
from flax_diffusion.jax_backend.sampling import Sampler, to_uint8
from flax_diffusion.jax_backend.sharding import make_mesh, put, put_batch, put_replicated, state_shardings
from flax_diffusion.jax_backend.train_step import TrainState
from flax_diffusion.models.inception import read_inception
from flax_diffusion.schedulers import scheduler_from_config

log = logging.getLogger(__name__)

PYTORCH_ONLY = {
    "enable_xformers_memory_efficient_attention": "use --gradient_checkpointing to save memory",
    "allow_tf32": "set the environment variable JAX_DEFAULT_MATMUL_PRECISION=tensorfloat32",
    "channels_last": "drop it, XLA chooses the layouts",
    "torch_compile": "drop it, the step is always compiled",
}
"""Options that only `python -m torch_backend.train` has, and what to use here instead."""

SLICE_BYTES = 2**22
"""Smallest part of an array that is saved by one of the devices that hold copies of it; each part is a dispatch."""


class JaxBackend:
    """Implementation of `core.backend.Backend`, which documents the methods, with Flax modules on a mesh of devices.

    Args:
        config: The run's options.
        spec: The pipeline.
        devices: Devices of the mesh; None for all, or for as many cores of a CPU as can share a batch.
        dtype: Dtype of the trained weights and, without mixed precision, of all computation. float64 needs
            jax_enable_x64.

    Raises:
        ConfigError: For an option that this backend does not have, or that does not fit the devices.
    """

    command = "python -m flax_diffusion.train"

    def __init__(
        self, config: TrainConfig, spec: PipelineSpec, devices: Sequence[Any] | None = None, dtype: Any = jnp.float32
    ):
        self.check_options(config)
        if config.set_grads_to_none:
            log.info("--set_grads_to_none: nothing to do, JAX keeps no gradients between steps")
        self.config, self.spec = config, spec
        self.dtype = dtype
        sizes = config.data_parallelism, config.fsdp_parallelism
        self.mesh = make_mesh(*sizes, devices or cores.devices())
        self.process_index, self.process_count = jax.process_index(), jax.process_count()
        self.device_count = self.mesh.size
        self.program = Program(config, spec, self.mesh, dtype)
        if devices is None and cores.available() > 1:
            sharing = cores.sharing(micro_batch_size(config, self.device_count), self.program.weights)
            self.mesh = make_mesh(*sizes, jax.devices()[:sharing], sharing)
            self.program = Program(config, spec, self.mesh, dtype)
        self.modules = self.program.modules
        # Scheduler options are checked here, before any weight is read.
        if spec.scheduler:
            own, values = self.modules.objective, sampler_config(spec)
            self._sampler = Sampler(self.modules, None if own else scheduler_from_config(values), self.mesh)
        self._encode = jax.jit(self.modules.encode_images)
        self._condition = jax.jit(self.modules.condition)
        self._posterior = jax.jit(self.modules.posterior)
        self._decode = jax.jit(functools.partial(to_uint8, self.modules))
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self.average: str | None = None
        self._peak = peak_flops(self.mesh.devices.flat[0].device_kind)
        self._flops: dict[tuple[tuple[int, ...], ...], float | None] = {}  # of a step, by the shapes of its batch
        self.state: TrainState
        self.frozen: Params

    @staticmethod
    def check_options(config: TrainConfig) -> None:
        """Refuse options that only the PyTorch backend has."""
        refuse(config, PYTORCH_ONLY, "PyTorch")
        check_optimizer(config, OPTIMIZERS)

    def init_state(self) -> int:
        """Load or draw the weights directly onto their shards, and return the number of trained parameters."""
        loaded = {name: load_pretrained(part) for name, part in self.spec.components.items() if part.weights}
        params = {}
        for name in self.program.trained:
            part = self.spec.components[name]
            host = loaded[name] if name in loaded else first_weights(self.modules, name, self.config.seed)
            host = adapters.draw(part, host, self.config.seed) if part.training is Training.ADAPTERS else host
            params[name] = put(_cast(host, self.dtype), state_shardings(host, self.mesh))
        self.state = self.program.init_state(params)
        self.frozen = {
            name: self._place_frozen(name, host)
            for name, host in loaded.items()
            if self.spec.components[name].training is not Training.ALL
        }
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def describe(self) -> Described:
        """Return the kind of the devices, and the number of weights that do not train."""
        kind, sharing = self.mesh.devices.flat[0].device_kind, self.mesh.size // self.device_count
        frozen = sum(leaf.size for leaf in jax.tree.leaves(self.frozen))
        return Described(f"{kind} on {sharing} cores" if sharing > 1 else kind, frozen, compiles=True)

    def _place_frozen(self, name: str, host: Params) -> Params:
        """Place weights that do not train on the devices, in the precision of their computation."""
        return put(_cast(host, self.modules.by_name[name].dtype), state_shardings(host, self.mesh))

    def _all_params(self) -> Params:
        """Return the weights that samples are drawn with; those that were freed are read again."""
        frozen = dict(self.frozen)
        for name, component in self.spec.components.items():
            if name not in frozen and component.training is not Training.ALL:
                frozen[name] = self._place_frozen(name, load_pretrained(component))
        return adapters.merge(frozen, self._exported())

    def embed_prompts(self, prompts: list[str]) -> dict[str, np.ndarray]:
        """Encode prompts to float32 arrays (N, …)."""
        tokenize = self.spec.tokenize
        assert tokenize is not None
        encoders = {name: self.frozen[name] for name in self.spec.names_of(Role.TEXT_ENCODER)}
        made = self._condition(encoders, put_replicated(tokenize.stacked(prompts), self.mesh))
        wide = np.promote_types(self.dtype, np.float32)
        return {name: to_host(made[name]).astype(wide) for name in self.spec.family.prompt_arrays}

    def posteriors(self, pixels: np.ndarray) -> np.ndarray:
        """Encode images to means and log variances of their latents."""
        # A mesh may order devices, and so the images, in another way than by process.
        places = self.process_index * len(pixels) + np.arange(len(pixels), dtype=np.int32)
        placed = put_batch({"pixels": pixels.astype(self.dtype), "places": places}, self.mesh, leading=0)
        posterior = self._posterior({self.spec.vae_name: self.frozen[self.spec.vae_name]}, placed["pixels"])
        mean, logvar, places = to_host((posterior.mean, posterior.logvar, placed["places"]))
        made = np.stack([mean, logvar], axis=1)[np.argsort(places)]
        return made.astype(np.promote_types(self.dtype, np.float32))

    def release(self, name: str) -> None:
        """Free the weights of a frozen component; samples read them again."""
        del self.frozen[name]

    def put(self, batch: Batch) -> dict[str, jax.Array]:
        """Start the copy of this process's examples to its devices; their indices stay on the host."""
        wanted = {key: value for key, value in batch.items() if key != "example_index"}
        if self.dtype != jnp.float32:
            wanted = {
                key: value.astype(self.dtype) if value.dtype.kind == "f" else value for key, value in wanted.items()
            }
        return put_batch(wanted, self.mesh)

    def train_step(
        self, batch: dict[str, jax.Array], learning_rate: float, ema_decays: Mapping[str, float]
    ) -> dict[str, Any]:
        """Dispatch the compiled step."""
        real = np.promote_types(self.dtype, np.float32).type
        decays = {name: real(decay) for name, decay in ema_decays.items()}
        rates = put_replicated({"learning_rate": real(learning_rate), "ema_decays": decays}, self.mesh)
        with jax.transfer_guard("disallow"):
            self.state, metrics = self.program.step(self.state, self.frozen, batch, rates)
        if self._peak is None:
            return metrics
        shapes = tuple(array.shape for array in batch.values())
        if shapes not in self._flops:
            self._flops[shapes] = self.program.flops(self.state, self.frozen, batch, rates)
        flops = self._flops[shapes]
        return metrics if flops is None else metrics | {"peak_seconds": flops / self._peak}

    def validation_loss(self, average: str | None) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
        """Return the compiled loss, with the weights or a moving average of them."""
        params = self.state.params
        if average is not None:
            assert self.state.ema is not None
            params = self.program.as_params(self.state.ema[average])

        def loss(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            with jax.transfer_guard("disallow"):
                return {"loss": self.program.validation_loss(params, self.frozen, batch)}

        return loss

    def set_step(self, step: int) -> None:
        """Set the number of steps taken."""
        now = self.state.step
        self.state = self.state.replace(step=put(np.asarray(step, now.dtype), now.sharding))

    @contextmanager
    def profiled(self, folder: Path) -> Iterator[None]:
        """Record the steps that begin from here on, until all have ended."""
        jax.block_until_ready(self.state)
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            yield
            jax.block_until_ready(self.state)

    def read(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Wait for the metrics of a step."""
        memory = jax.local_devices()[0].memory_stats() or {}
        used = {"device_memory_gib": memory["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in memory else {}
        return {key: float(value) for key, value in jax.device_get(metrics).items()} | used

    def save(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Copy the state to the host, and write it in the background."""
        if self._checkpointer is None:
            self._checkpointer = ocp.AsyncCheckpointer(_checkpoint_handler())
        self._checkpointer.save(
            absolute(folder),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(self.state.stored()), metadata=ocp.args.JsonSave(metadata)
            ),
        )

    def state_bytes(self) -> int:
        """Return the bytes of weights, moments and averages over all devices."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))

    def wait(self) -> None:
        """Wait until the last save is complete."""
        if self._checkpointer is not None:
            self._checkpointer.wait_until_finished()

    def all_processes(self, condition: bool) -> bool:
        """Return whether a condition is true in all processes."""
        return all_processes(condition)

    def broadcast_from_first(self, value: int) -> int:
        """Return the first process's value in all processes."""
        return broadcast_from_first(value)

    def should_stop(self, requested: bool, step: int) -> bool:
        """Return whether the run must end; with several processes JAX itself listens for the signal."""
        return requested if self.process_count == 1 else multihost_utils.reached_preemption_sync_point(step)

    def check(self, folder: Path) -> None:
        """Compare a checkpoint of either backend and of any mesh with the state."""
        if portable.is_portable(folder):
            leaves = jax.tree_util.tree_flatten_with_path(self.state.stored())[0]
            own = ((_keys(path), np.broadcast_to(np.float32(0), leaf.shape)) for path, leaf in leaves)
            want = {name: array.shape for name, array in portable.from_tree(own).items()}
            check_same_shapes(portable.shapes(folder), want, folder)
        else:
            with ocp.Checkpointer(_checkpoint_handler()) as checkpointer:
                _check_same_tree(checkpointer, folder, self.state.stored())

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint of either backend onto the shards of this mesh."""
        self.check(folder)
        if portable.is_portable(folder):
            arrays, metadata = portable.read(folder)
            self._load(arrays, metadata["step"])
            return metadata
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), self.state.stored()
        )
        state = ocp.args.PyTreeRestore(target, ocp.checkpoint_utils.construct_restore_args(target))
        with ocp.Checkpointer(_checkpoint_handler()) as checkpointer:
            restored = checkpointer.restore(
                absolute(folder), args=ocp.args.Composite(state=state, metadata=ocp.args.JsonRestore())
            )
        self.state = self.state.restored(restored["state"])
        return restored["metadata"]

    def state_arrays(self) -> portable.Arrays:
        """Return the whole state as plain arrays on the host, by portable name."""
        leaves = jax.tree_util.tree_flatten_with_path(to_host(self.state.stored()))[0]
        return portable.from_tree((_keys(path), leaf) for path, leaf in leaves)

    def _load(self, arrays: portable.Arrays, step: int) -> None:
        """Load a state by portable name: the inverse of `state_arrays`."""

        def take(path: Any, leaf: jax.Array) -> jax.Array:
            named = portable.portable_name(_keys(path))
            value = np.asarray(step) if named is None else arrays[named[0]]
            if named is not None and named[1]:
                value = from_torch_layout(named[1], value, leaf.ndim)
            return put(np.array(value, leaf.dtype, order="C"), leaf.sharding)

        self.state = self.state.restored(jax.tree_util.tree_map_with_path(take, self.state.stored()))

    def sample(self, **options: Any) -> np.ndarray:
        """Draw images with the moving average, or with the weights themselves where there is none."""
        return np.concatenate([*self.draw(**options)])

    def draw(self, **options: Any) -> Iterator[np.ndarray]:
        """Draw images as `sample` does, a batch at a time."""
        return self._sampler.batches(self._all_params(), **options)

    def extractor(self, feature: str, inception: str | None, batch_size: int) -> FeatureExtractor:
        """Return what computes features of pictures, over all devices."""
        weights = None if inception is None else read_inception(inception)
        return FeatureExtractor(feature, self.mesh, batch_size, weights)

    def trained_arrays(self) -> portable.Arrays:
        """Return the trained weights, averaged if there is an average, by component and PyTorch name."""
        leaves = jax.tree_util.tree_flatten_with_path(to_host(self._exported()))[0]
        named = portable.from_tree((("params", *_keys(path)), leaf) for path, leaf in leaves)
        return {name.removeprefix("params/"): array for name, array in named.items()}

    def encode(self, pixels: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Encode images to scaled latents."""
        params = self._all_params()
        return to_host(self._encode(params, *put_replicated((pixels, noise), self.mesh)))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Decode scaled latents to pictures."""
        params = self._all_params()
        return to_host(self._decode(params, put_replicated(latents, self.mesh)))

    def export(self, folder: Path, *, only_trained: bool = False) -> None:
        """Write the components' float32 weights."""
        trained = self._exported()
        for name, component in self.spec.components.items():
            if only_trained and component.training is not Training.ALL:
                continue
            params = to_host(trained[name]) if name in trained else load_pretrained(component)
            if self.process_index == 0:
                with written_folder(folder / name) as local:
                    self.modules.by_name[name].save_files(local, params)

    def _exported(self) -> Params:
        averages = self.state.ema
        return self.state.params if averages is None else averages[self.average or self.config.averages[0]]


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))


def _cast(params: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)


def _checkpoint_handler() -> ocp.CompositeCheckpointHandler:
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(type_handler_registry=registry), metadata=ocp.JsonCheckpointHandler()
    )


def _check_same_tree(checkpointer: ocp.Checkpointer, folder: Path, target: Any) -> None:
    """Compare names and shapes before any array is read. (Values of another dtype are converted.)

    Raises:
        CheckpointError: If they differ; the message names the first differences.
    """
    try:
        items = checkpointer.metadata(absolute(folder)).item_metadata
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a complete checkpoint ({error}); resume from another") from error
    saved = items["state"] if items is not None and "state" in items else None
    if saved is None:
        raise CheckpointError(
            f"{folder}: not a complete checkpoint (its `state` is missing or has no _METADATA); resume from another"
        )
    check_same_shapes(_shapes(saved), _shapes(target), folder)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
