"""The train step: one pure function of (state, frozen weights, batch, rates), for every task.

Shapes: A micro-batches per step, B images per micro-batch over all devices, C channels, H and W in pixels, h and w of
what is denoised (pixels or latents), L tokens, D text features. Images are (B, C, H, W) here, as in the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from flax_diffusion.core.config.options import SINGLE_AVERAGE
from flax_diffusion.jax_backend.adapters import merge
from flax_diffusion.jax_backend.exchange import Exchange, dtype_of
from flax_diffusion.jax_backend.losses import Batch, Scalars, mean_losses
from flax_diffusion.jax_backend.modules import Modules
from flax_diffusion.jax_backend.optimizers.optimizer import (
    LossScale,
    Params,
    clip_by_global_norm,
    update_ema,
    where_finite,
)
from flax_diffusion.jax_backend.sharding import partitions, update_partitions

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key


class TrainState(struct.PyTreeNode):
    """State of a run, which a checkpoint holds.

    Attributes:
        step: Optimizer steps taken, int32 ().
        params: Trained weights by component name, float32.
        opt_state: State of the optimizer.
        ema: Moving averages of the weights, by name; None for none.
        loss_scale: Loss scale of fp16; None without it.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: dict[str, Params] | None
    loss_scale: LossScale | None

    def stored(self) -> Any:
        """Return the state in the form of checkpoints, in which a single average has no name."""
        return (
            self if self.ema is None or SINGLE_AVERAGE not in self.ema else self.replace(ema=self.ema[SINGLE_AVERAGE])
        )

    def restored(self, stored: Any) -> TrainState:
        """Return the state of a checkpoint, in the form of this one.

        Args:
            stored: A state in the form of `stored`.
        """
        single = self.ema is not None and SINGLE_AVERAGE in self.ema
        return stored.replace(ema={SINGLE_AVERAGE: stored.ema}) if single else stored


def create_state(
    params: Params, optimizer: optax.GradientTransformation, *, averages: Sequence[str], fp16: bool
) -> TrainState:
    """Make the state before the first step; the moving averages start as the weights.

    Args:
        params: The trained weights.
        optimizer: The optimizer.
        averages: Names of the moving averages to keep.
        fp16: Whether to keep a loss scale.
    """
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        ema={name: jax.tree.map(jnp.copy, params) for name in averages} or None,
        loss_scale=LossScale.create() if fp16 else None,
    )


def sum_over_micro_batches(function: Callable[..., Any], inputs: tuple[Any, ...], *, unroll: bool) -> Any:
    """Sum a function over the micro-batches.

    Args:
        function: Function of one micro-batch, which returns a tree of arrays.
        inputs: Arguments of the function, each with a leading axis of micro-batches.
        unroll: Whether to write the micro-batches out one after the other. A loop is smaller and as fast on an
            accelerator, but on a CPU XLA compiles its body (and that of an unrolled `lax.scan`) to code that is 15
            times slower.

    Returns:
        The sum, a tree of arrays.
    """

    def take(index: int) -> Any:
        return function(*jax.tree.map(lambda leaf: leaf[index], inputs))

    count = jax.tree.leaves(inputs)[0].shape[0]
    if unroll:
        return functools.reduce(
            lambda total, index: jax.tree.map(jnp.add, total, take(index)), range(1, count), take(0)
        )

    def body(total: Any, one: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*one)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(take, 0))
    return jax.lax.scan(body, zeros, inputs)[0]


def loss_and_gradients(
    params: Params,
    frozen: Params,
    batch: Batch,
    scalars: tuple[jax.Array, jax.Array | None],
    *,
    modules: Modules,
    exchange: Exchange,
    seed: int,
    unroll: bool,
) -> tuple[Scalars, Params]:
    """Sum the losses over the micro-batches, and the gradients of the scaled loss also over the devices.

    Each device computes them for its own images. It gathers the weights before, once, in the precision that their
    modules compute in, or leaves it to the modules' layers.

    Args:
        params: The trained weights.
        frozen: Weights that do not train.
        batch: As in `train_step`.
        scalars: Optimizer steps taken, int32 (), and the loss scale, float32 () or None for 1.
        modules: The pipeline's modules.
        exchange: The devices.
        seed: Seed of dropout.
        unroll: As in `sum_over_micro_batches`.

    Returns:
        The losses by name, and the gradients in the dtypes of the weights, divided as the moments are.
    """
    mesh = exchange.mesh
    divided, divided_frozen = partitions(params, mesh), partitions(frozen, mesh)
    update = update_partitions(params, mesh)

    def on_device(params: Params, frozen: Params, batch: Batch, scalars: Any) -> tuple[Scalars, Params]:
        step, scale = scalars[0], 1.0 if scalars[1] is None else scalars[1]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), batch["loss_weights"].shape[0])
        copies = _whole(modules, exchange, params, divided)
        others = _whole(modules, exchange, frozen, divided_frozen)

        def scaled_loss(copies: Params, micro: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Scalars]:
            losses = mean_losses(modules, merge(others, copies), micro, key)
            return losses["loss"] * (scale / mesh.size), losses

        def micro_step(micro: Batch, key: Key[Array, ""]) -> tuple[Scalars, Params]:
            (_, losses), grads = jax.value_and_grad(scaled_loss, has_aux=True)(copies, micro, key)
            return losses, _summed(modules, exchange, grads, update, params)

        losses, grads = sum_over_micro_batches(micro_step, (batch, keys), unroll=unroll or len(keys) == 1)
        return jax.tree.map(exchange.mean, losses), grads

    images = PartitionSpec(None, mesh.axis_names)
    returned = _map_by_path(lambda path, own, after: own if modules.layers_gather(path) else after, divided, update)
    run = exchange.shard_map(on_device, (divided, divided_frozen, images, PartitionSpec()), (PartitionSpec(), returned))
    losses, grads = run(params, frozen, batch, scalars)
    return losses, jax.lax.with_sharding_constraint(grads, jax.tree.map(lambda spec: NamedSharding(mesh, spec), update))


def validation_loss(
    params: Params, frozen: Params, batch: Batch, *, modules: Modules, exchange: Exchange, unroll: bool
) -> Float[Array, ""]:
    """Return the mean loss of the micro-batches, over all devices and without dropout.

    Args:
        params: The trained weights, or a moving average of them, divided as weights are.
        frozen: Weights that do not train.
        batch: As in `train_step`.
        modules: The pipeline's modules.
        exchange: The devices.
        unroll: As in `sum_over_micro_batches`.
    """
    mesh = exchange.mesh
    divided, divided_frozen = partitions(params, mesh), partitions(frozen, mesh)

    def on_device(params: Params, frozen: Params, batch: Batch) -> Float[Array, ""]:
        whole = merge(_whole(modules, exchange, frozen, divided_frozen), _whole(modules, exchange, params, divided))
        count = batch["loss_weights"].shape[0]
        loss = sum_over_micro_batches(
            lambda micro: mean_losses(modules, whole, micro, None)["loss"], (batch,), unroll=unroll or count == 1
        )
        return exchange.mean(loss / count)

    images = PartitionSpec(None, mesh.axis_names)
    return exchange.shard_map(on_device, (divided, divided_frozen, images), PartitionSpec())(params, frozen, batch)


def _whole(modules: Modules, exchange: Exchange, parts: Params, specs: Params) -> Params:
    """Return the weights whole in the precision of their computation, but those that layers gather as they are."""

    def whole(path: tuple[str, ...], part: jax.Array, spec: PartitionSpec) -> jax.Array:
        if modules.layers_gather(path):
            return part
        return exchange.gather(part.astype(dtype_of(path, part, modules.dtype_of(path[0]))), spec)

    return _map_by_path(whole, parts, specs)


def _summed(modules: Modules, exchange: Exchange, grads: Params, specs: Params, weights: Params) -> Params:
    """Return the gradients summed over devices, in the dtypes of the weights; where layers gather, layers sum."""

    def summed(path: tuple[str, ...], grad: jax.Array, spec: PartitionSpec, weight: jax.Array) -> jax.Array:
        return grad if modules.layers_gather(path) else exchange.sum(grad, spec, weight.dtype)

    return _map_by_path(summed, grads, specs, weights)


def _map_by_path(function: Callable[..., Any], *trees: Any) -> Any:
    """Map over the leaves of trees a function that is told their path, from the component's name on, first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(tuple(key.key for key in path), *leaves), *trees
    )


def train_step(
    state: TrainState,
    frozen: Params,
    batch: Batch,
    rates: dict[str, Any],
    *,
    modules: Modules,
    exchange: Exchange,
    optimizer: optax.GradientTransformationExtraArgs,
    max_grad_norm: float,
    rate_factors: Mapping[str, float],
    seed: int,
    unroll: bool,
    skip_nonfinite: bool = False,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Take one optimizer step.

    All arguments after `rates` are static under jit.

    Args:
        state: The state, which the caller donates.
        frozen: Weights that do not train.
        batch: Batch of `denoising_loss`, or of the family's or the objective's own loss, with a leading axis A.
        rates: The scalar learning_rate, and ema_decays, a scalar by name of the moving average.
        modules: The pipeline's modules.
        exchange: The devices.
        optimizer: Optimizer of `make_optimizer`, whose update is not yet multiplied by the learning rate.
        max_grad_norm: Global gradient norm to clip to.
        rate_factors: Factors on the learning rate, by component name.
        seed: Seed of dropout.
        unroll: As in `sum_over_micro_batches`.
        skip_nonfinite: Whether a step whose loss or gradient is not finite changes nothing but the step count.

    Returns:
        The new state, and the metrics: the losses of `mean_losses`, grad_norm (before clipping), and loss_scale under
        fp16.
    """
    count = batch["loss_weights"].shape[0]
    scale = state.loss_scale.scale if state.loss_scale else None
    losses, grads = loss_and_gradients(
        state.params, frozen, batch, (state.step, scale), modules=modules, exchange=exchange, seed=seed, unroll=unroll
    )
    losses = {name: loss / count for name, loss in losses.items()}
    grads = jax.tree.map(lambda g: g / (count if scale is None else count * scale), grads)

    clipped, norm = clip_by_global_norm(grads, max_grad_norm)
    finite = jnp.isfinite(norm) & jnp.isfinite(losses["loss"])
    asked = finite if state.loss_scale or skip_nonfinite else None
    updates, opt_state = optimizer.update(clipped, state.opt_state, state.params, finite=asked)
    params = {}
    changes: Any = updates
    for name, weights in state.params.items():
        rate = rates["learning_rate"] * rate_factors.get(name, 1.0)
        params[name] = jax.tree.map(lambda p, u, rate=rate: p - rate.astype(p.dtype) * u, weights, changes[name])
    decays, averages = rates["ema_decays"], state.ema
    ema = None if averages is None else {name: update_ema(averages[name], params, decays[name]) for name in averages}
    params, ema = where_finite(asked, (params, ema), (state.params, state.ema))
    new = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
    metrics = losses | {"grad_norm": norm}
    if state.loss_scale:
        metrics["loss_scale"] = state.loss_scale.scale
        new = new.replace(loss_scale=state.loss_scale.update(finite))
    return new, metrics
