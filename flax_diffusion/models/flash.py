"""Attention whose scores never leave the chip, as Pallas kernels for TPUs.

Shape suffixes: B batch, L query tokens, S key tokens, N heads, D channels a head. The kernels lay tokens out in lanes
and channels in sublanes: a head of 40 channels then takes 48 in memory and not 128, and the sums of the softmax run
over sublanes, where they are cheap. Keys come in chunks as long as the matrix units are wide; while the exponentials of
one are taken, these multiply for the next.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, PartitionSpec

LANES = 128
QUERIES, SCORES, MOST_QUERIES = 512, 2**21, 4096
"""Queries of a step of the kernels' grid at most; or as many as make so many scores, up to the last number."""
KEYS = 4096
"""At most, whose chunks are laid out one after the other: beyond, compiling takes longer and is worth little."""
GIVEN = 12 * 2**20
"""Bytes of a chip's memory that a kernel gets unasked, less what it computes with."""
PRODUCTS = {"flash_attention": (1, 1), "flash_attention_gradient": (2, 3)}
"""By kernel: products of matrices of scores' size that sum over channels, and those that sum over tokens."""

_OVER_CHANNELS = (((0,), (0,)), ((), ()))
_OVER_LANES = (((1,), (1,)), ((), ()))
_PLAIN = (((1,), (0,)), ((), ()))


def has_kernel(mesh: AbstractMesh, q_BLND: jax.Array, k_BSND: jax.Array) -> bool:
    """Whether `flash_attention` runs on the devices of a mesh, and has room in their memory for all keys of a head.

    Args:
        mesh: Of the program that is traced, as `jax.sharding.get_abstract_mesh` gives it: kernels have to know how the
            batch is split, so there is none without a mesh.
        q_BLND: Queries.
        k_BSND: Keys.
    """
    if mesh.empty or mesh.abstract_device is None or mesh.abstract_device.platform != "tpu":
        return False
    batch, queries = q_BLND.shape[:2]
    if batch % mesh.size or queries % LANES:
        return False
    q, k = (jax.ShapeDtypeStruct([x.shape[axis] for axis in (0, 2, 3, 1)], x.dtype) for x in (q_BLND, k_BSND))
    return _held(q, k, buffers=1) <= _room()


def flash_attention(q_BLND: jax.Array, k_BSND: jax.Array, v_BSND: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Return scaled dot-product attention without a mask.

    Args:
        q_BLND: Queries, (B, L, N, D); L a multiple of 128.
        k_BSND: Keys, (B, S, N, D); up to the next multiple of 128 they are filled up.
        v_BSND: Values, (B, S, N, D).
        interpret: Run the kernels by XLA, on any device.

    Returns:
        (B, L, N, D) in the dtype of the queries.

    Reference: Dao, https://arxiv.org/abs/2307.08691, algorithms 1 and 2.
    """
    keys = k_BSND.shape[1]

    def local(*tokens_first: jax.Array) -> jax.Array:
        q, k, v = (jnp.transpose(x, (0, 2, 3, 1)) for x in tokens_first)
        k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, -keys % LANES),)) for x in (k, v))
        return jnp.transpose(_attend(q, k, v, keys, interpret), (0, 3, 1, 2))

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q_BLND, k_BSND, v_BSND)
    images = PartitionSpec(mesh.axis_names)
    return jax.shard_map(local, in_specs=(images,) * 3, out_specs=images, check_vma=False)(q_BLND, k_BSND, v_BSND)


def grid_of(queries: tuple[int, ...], keys: tuple[int, ...]) -> tuple[int, int, int]:
    """Steps of the kernels, by image, head and block of queries.

    Args:
        queries: Shape (B, N, D, L).
        keys: Shape (B, N, D, S).
    """
    batch, heads, _, length = queries
    return batch, heads, length // _largest(length, max(QUERIES, min(SCORES // keys[-1], MOST_QUERIES)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q_BNDL: jax.Array, k_BNDS: jax.Array, v_BNDS: jax.Array, valid: int, interpret: bool) -> jax.Array:
    return _forward(q_BNDL, k_BNDS, v_BNDS, valid, interpret)[0]


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, valid: int, interpret: bool) -> tuple[jax.Array, Any]:
    out, log_sum = _forward(q, k, v, valid, interpret)
    return out, (q, k, v, out, log_sum)


def _attend_backward(valid: int, interpret: bool, kept: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, out, log_sum = kept
    return _backward(q, k, v, out, log_sum, grad, valid, interpret)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, valid: int, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """The weighted values (B, N, D, L), and the logarithm to base 2 of each query's sum of weights (B, N, 1, L).

    Only the first `valid` keys are attended to.
    """
    batch, heads, channels, queries = q.shape
    keys, (grid, (by_query, row, all_keys, _)) = k.shape[-1], _blocks(q, k, interpret)
    results = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32))
    return pl.pallas_call(
        functools.partial(_forward_kernel, scale=_scale(channels), chunk=_chunk(keys, interpret), valid=valid),
        grid=grid,
        in_specs=[by_query, all_keys, all_keys],
        out_specs=(by_query, row),
        out_shape=results,
        compiler_params=_parameters(("parallel",) * 3, q, k, interpret),
        cost_estimate=_cost("flash_attention", q, keys, (q, k, v, *results)),
        name="flash_attention",
        interpret=interpret,
    )(q, k, v)


def _forward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, log_sum_ref: Any, *, scale: float, chunk: int, valid: int
):
    """One block of queries: the softmax goes on from chunk to chunk of keys."""
    q = q_ref[...]

    def products(first: Any) -> jax.Array:
        return _scores(k_ref[:, pl.ds(first, chunk)], q, first, scale=scale, valid=valid)

    def attend(first: Any, scores: jax.Array, carry: Any) -> Any:
        top, total, out = carry
        new_top = jnp.maximum(top, scores.max(axis=0, keepdims=True))
        weights = jnp.exp2(scores - new_top)
        fade = jnp.exp2(top - new_top)
        total = total * fade + weights.sum(axis=0, keepdims=True)
        return new_top, total, out * fade + _dot(v_ref[:, pl.ds(first, chunk)], weights.astype(q.dtype), _PLAIN)

    start = (
        jnp.full((1, q.shape[1]), -jnp.inf, jnp.float32),
        jnp.zeros((1, q.shape[1]), jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    top, total, out = _over_chunks(products, attend, start, k_ref.shape[1], chunk)
    out_ref[...] = (out / total).astype(out_ref.dtype)
    log_sum_ref[...] = top + jnp.log2(total)


def _backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    log_sum: jax.Array,
    grad: jax.Array,
    valid: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of queries, keys and values."""
    channels, keys = q.shape[2], k.shape[-1]
    grid, (by_query, row, all_keys, gradient) = _blocks(q, k, interpret)
    return pl.pallas_call(
        functools.partial(_backward_kernel, scale=_scale(channels), chunk=_chunk(keys, interpret), valid=valid),
        grid=grid,
        in_specs=[by_query, all_keys, all_keys, by_query, row, by_query],
        out_specs=(by_query, gradient, gradient),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
        scratch_shapes=[pltpu.VMEM((channels, keys), jnp.float32)] * 2,
        compiler_params=_parameters(("parallel", "parallel", "arbitrary"), q, k, interpret),
        cost_estimate=_cost("flash_attention_gradient", q, keys, (q, k, v, out, log_sum, grad, q, k, v)),
        name="flash_attention_gradient",
        interpret=interpret,
    )(q, k, v, out, log_sum, grad)


def _backward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, log_sum_ref: Any, grad_ref: Any,
    dq_ref: Any, dk_ref: Any, dv_ref: Any, dk_sum: Any, dv_sum: Any, *, scale: float, chunk: int, valid: int,
):  # fmt: skip
    """One block of queries: its gradient, and what it adds to those of all keys and values."""
    q, grad, log_sum = q_ref[...], grad_ref[...], log_sum_ref[...]
    wide = grad.astype(jnp.float32) * out_ref[...].astype(jnp.float32)
    of_softmax = wide.sum(axis=0, keepdims=True)  # (1, L)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def products(first: Any) -> tuple[jax.Array, jax.Array]:
        part = pl.ds(first, chunk)
        scores = _scores(k_ref[:, part], q, first, scale=scale, valid=valid)
        return scores, _dot(v_ref[:, part], grad, _OVER_CHANNELS)

    def attend(first: Any, made: tuple[jax.Array, jax.Array], dq: jax.Array) -> jax.Array:
        part, (scores, dweights) = pl.ds(first, chunk), made
        weights = jnp.exp2(scores - log_sum)
        dv_sum[:, part] += _dot(grad, weights.astype(grad.dtype), _OVER_LANES)
        dscores = (weights * (dweights - of_softmax)).astype(q.dtype)
        dk_sum[:, part] += _dot(q, dscores, _OVER_LANES)
        return dq + _dot(k_ref[:, part], dscores, _PLAIN)

    dq = _over_chunks(products, attend, jnp.zeros(q.shape, jnp.float32), k_ref.shape[1], chunk)
    natural = scale / math.log2(math.e)
    dq_ref[...] = (dq * natural).astype(dq_ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dk_ref[...] = (dk_sum[...] * natural).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def _blocks(q: jax.Array, k: jax.Array, interpret: bool) -> tuple[tuple[int, int, int], list[pl.BlockSpec]]:
    """The kernels' grid, and what a step of it sees of arrays like the queries, of a number each, and of keys.

    Of keys twice: read, and written. Where there is no room to read the next head's ahead, that is waited for.
    """
    channels, keys, grid = q.shape[2], k.shape[3], grid_of(q.shape, k.shape)
    block = q.shape[3] // grid[-1]
    waits = {} if interpret or _held(q, k) <= _room() else {"pipeline_mode": pl.Buffered(1)}
    return grid, [
        pl.BlockSpec((None, None, channels, block), lambda b, n, i: (b, n, 0, i)),
        pl.BlockSpec((None, None, 1, block), lambda b, n, i: (b, n, 0, i)),
        pl.BlockSpec((None, None, channels, keys), lambda b, n, i: (b, n, 0, 0), **waits),
        pl.BlockSpec((None, None, channels, keys), lambda b, n, i: (b, n, 0, 0)),
    ]


def _held(q: Any, k: Any, buffers: int = 2) -> int:
    """Bytes of a chip's memory for what a step of the gradient's grid sees; the other kernel's sees less.

    Args:
        q: Queries, (B, N, D, L), or anything of their shape and dtype.
        k: Keys, (B, N, D, S).
        buffers: Of the keys and of the values; with two, the next head's are read ahead.
    """
    narrow, wide = (32 * math.ceil(q.shape[2] * size / 32) for size in (q.dtype.itemsize, 4))
    block = q.shape[3] // grid_of(q.shape, k.shape)[-1]
    return k.shape[3] * ((2 * buffers + 4) * narrow + 2 * wide) + block * (8 * narrow + 2 * wide)


def _room() -> int:
    """Bytes of the chip's memory that a kernel may ask for."""
    return max(pltpu.get_tpu_info().vmem_capacity_bytes // 2, 2**24)


def _over_chunks(
    products: Callable[[Any], Any], use: Callable[[Any, Any, Any], Any], carry: Any, keys: int, chunk: int
) -> Any:
    """Uses the products of each chunk of keys, after those of the next one are asked for.

    Args:
        products: Of the chunk that begins at a key.
        use: Takes the first key, its products and what is carried on; returns the last.
        carry: Before the first chunk.
        keys: In all.
        chunk: Keys of one.
    """
    span = _largest(keys, KEYS, chunk)

    def of_span(index: Any, carry: Any) -> Any:
        places = [pl.multiple_of(index * span + first, chunk) for first in range(0, span, chunk)]
        made = products(places[0])
        for here, following in itertools.zip_longest(places, places[1:]):
            ahead = None if following is None else products(following)
            carry = use(here, made, carry)
            made = ahead
        return carry

    return jax.lax.fori_loop(0, keys // span, of_span, carry)


def _scores(k: jax.Array, q: jax.Array, first: Any, *, scale: float, valid: int) -> jax.Array:
    """Of a chunk of keys, counted from `first`, and all queries (S, L); minus infinity where a key only fills up."""
    scores = _dot(k, q, _OVER_CHANNELS) * scale
    if valid % LANES == 0:
        return scores
    key = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    return jnp.where(key < valid, scores, -jnp.inf)


def _dot(a: jax.Array, b: jax.Array, dimensions: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _scale(channels: int) -> float:
    """Of scores whose weights are powers of 2."""
    return math.log2(math.e) / math.sqrt(channels)


def _chunk(keys: int, interpret: bool) -> int:
    """Keys that are multiplied at a time."""
    return _largest(keys, LANES if interpret else pltpu.get_tpu_info().mxu_column_size)


def _largest(length: int, longest: int, unit: int = LANES) -> int:
    """The largest multiple of a unit up to `longest` that divides a length, which is a multiple of it too."""
    return next(size for size in range(min(length, longest), 0, -unit) if length % size == 0)


def _parameters(order: tuple[Any, ...], q: jax.Array, k: jax.Array, interpret: bool) -> pltpu.CompilerParams:
    """The order of a grid's steps; and more of the chip's memory than the compiler gives unasked, for long images."""
    room = None if interpret or _held(q, k) <= GIVEN else _room()
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=room)


def _cost(kernel: str, q: jax.Array, keys: int, arrays: Any) -> pl.CostEstimate:
    """Of its products, and of each array once."""
    scores = q.size // q.shape[-2] * keys
    return pl.CostEstimate(
        flops=2 * sum(PRODUCTS[kernel]) * scores * q.shape[-2],
        transcendentals=scores,
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in arrays),
    )
