"""Attention whose scores never leave the chip, as Pallas kernels for TPUs.

Axes in shapes: B batch, L query tokens, S key tokens, N heads, D channels per head. Outside the kernels, arrays are
(B, L, N, D). Inside, they are (B, N, D, L): tokens lie in lanes and channels in sublanes. A head of 40 channels then
takes 48 in memory and not 128, and the sums of the softmax run over sublanes, where they are cheap. Keys come in chunks
as long as the matrix units are wide; while the exponentials of one chunk are taken, these multiply for the next.
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
MIN_BLOCK_QUERIES, MAX_BLOCK_SCORES, MAX_BLOCK_QUERIES = 512, 2**21, 4096
"""Upper limit of the queries in one step of the kernels' grid: as many as make MAX_BLOCK_SCORES scores, between the
first number and the last.
"""
MAX_UNROLLED_KEYS = 4096
"""Keys whose chunks are unrolled, one after the other: more would take longer to compile and gain little."""
DEFAULT_VMEM_BYTES = 12 * 2**20
"""Bytes of a chip's vector memory that the compiler gives a kernel unasked, less what the kernel computes with."""
MATMULS_PER_KERNEL = {"flash_attention": (1, 1), "flash_attention_gradient": (2, 3)}
"""For each kernel, its matrix products of the size of the scores: those that sum over channels, and over tokens."""

_LEFT_TRANSPOSED = (((0,), (0,)), ((), ()))
_RIGHT_TRANSPOSED = (((1,), (1,)), ((), ()))
_NOT_TRANSPOSED = (((1,), (0,)), ((), ()))


def has_kernel(mesh: AbstractMesh, q: jax.Array, k: jax.Array) -> bool:
    """Return whether `flash_attention` runs on a mesh's devices, with room in their memory for all keys of a head.

    Args:
        mesh: Mesh of the program that is traced, from `jax.sharding.get_abstract_mesh`: kernels have to know how the
            batch is split, so there is none without a mesh.
        q: Queries, (B, L, N, D).
        k: Keys, (B, S, N, D).
    """
    if mesh.empty or mesh.abstract_device is None or mesh.abstract_device.platform != "tpu":
        return False
    batch, queries = q.shape[:2]
    if batch % (1 if mesh.manual_axes else mesh.size) or queries % LANES:
        return False
    inside = [jax.ShapeDtypeStruct([x.shape[axis] for axis in (0, 2, 3, 1)], x.dtype) for x in (q, k)]
    return _needed_vmem_bytes(*inside, buffers=1) <= _max_vmem_bytes()


def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Return scaled dot-product attention without a mask.

    Args:
        q: Queries, (B, L, N, D); L a multiple of 128.
        k: Keys, (B, S, N, D); S is padded to the next multiple of 128.
        v: Values, (B, S, N, D).
        interpret: Run the kernels in Pallas' interpreter, on any device.

    Returns:
        (B, L, N, D) in the dtype of the queries.

    Reference:
        Dao, https://arxiv.org/abs/2307.08691, algorithms 1 and 2.
    """
    keys = k.shape[1]

    def local(*tokens_first: jax.Array) -> jax.Array:
        q, k, v = (jnp.transpose(x, (0, 2, 3, 1)) for x in tokens_first)
        k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, -keys % LANES),)) for x in (k, v))
        return jnp.transpose(_attend(q, k, v, keys, interpret), (0, 3, 1, 2))

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:  # the arrays are those of one device
        return local(q, k, v)
    images = PartitionSpec(mesh.axis_names)
    return jax.shard_map(local, in_specs=(images,) * 3, out_specs=images, check_vma=False)(q, k, v)


def grid_shape(queries: tuple[int, ...], keys: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the shape of the kernels' grid: images, heads and blocks of queries.

    Args:
        queries: Shape of the queries, (B, N, D, L).
        keys: Shape of the keys, (B, N, D, S).
    """
    batch, heads, _, length = queries
    limit = max(MIN_BLOCK_QUERIES, min(MAX_BLOCK_SCORES // keys[-1], MAX_BLOCK_QUERIES))
    return batch, heads, length // _largest_divisor(length, limit)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, valid: int, interpret: bool) -> jax.Array:
    return _forward(q, k, v, valid, interpret)[0]


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, valid: int, interpret: bool) -> tuple[jax.Array, Any]:
    out, log_sum = _forward(q, k, v, valid, interpret)
    return out, (q, k, v, out, log_sum)


def _attend_backward(valid: int, interpret: bool, kept: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, out, log_sum = kept
    return _backward(q, k, v, out, log_sum, grad, valid, interpret)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, valid: int, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Return attention and what its gradient needs.

    Args:
        q: Queries, (B, N, D, L).
        k: Keys, (B, N, D, S).
        v: Values, (B, N, D, S).
        valid: Number of keys that are attended to; those after them are padding.
        interpret: See `flash_attention`.

    Returns:
        The weighted values, (B, N, D, L), and the logarithm to base 2 of each query's sum of weights, (B, N, 1, L).
    """
    batch, heads, channels, queries = q.shape
    keys, (grid, (by_query, row, all_keys, _)) = k.shape[-1], _block_specs(q, k, interpret)
    results = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32))
    return pl.pallas_call(
        functools.partial(
            _forward_kernel, scale=_score_scale(channels), chunk=_chunk_length(keys, interpret), valid=valid
        ),
        grid=grid,
        in_specs=[by_query, all_keys, all_keys],
        out_specs=(by_query, row),
        out_shape=results,
        compiler_params=_compiler_params(("parallel",) * 3, q, k, interpret),
        cost_estimate=_cost_estimate("flash_attention", q, keys, (q, k, v, *results)),
        name="flash_attention",
        interpret=interpret,
    )(q, k, v)


def _forward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, log_sum_ref: Any, *, scale: float, chunk: int, valid: int
):
    """Attend from one block of queries to all keys; the softmax goes on from chunk to chunk of keys."""
    q = q_ref[...]

    def multiply(first: Any) -> jax.Array:
        return _scores(k_ref[:, pl.ds(first, chunk)], q, first, scale=scale, valid=valid)

    def attend(first: Any, scores: jax.Array, carry: Any) -> Any:
        top, total, out = carry
        new_top = jnp.maximum(top, scores.max(axis=0, keepdims=True))
        weights = jnp.exp2(scores - new_top)
        fade = jnp.exp2(top - new_top)
        total = total * fade + weights.sum(axis=0, keepdims=True)
        out = out * fade + _dot(v_ref[:, pl.ds(first, chunk)], weights.astype(q.dtype), _NOT_TRANSPOSED)
        return new_top, total, out

    start = (
        jnp.full((1, q.shape[1]), -jnp.inf, jnp.float32),
        jnp.zeros((1, q.shape[1]), jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    top, total, out = _loop_over_chunks(multiply, attend, start, k_ref.shape[1], chunk)
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
    """Return the gradients of queries, keys and values."""
    channels, keys = q.shape[2], k.shape[-1]
    grid, (by_query, row, all_keys, gradient) = _block_specs(q, k, interpret)
    return pl.pallas_call(
        functools.partial(
            _backward_kernel, scale=_score_scale(channels), chunk=_chunk_length(keys, interpret), valid=valid
        ),
        grid=grid,
        in_specs=[by_query, all_keys, all_keys, by_query, row, by_query],
        out_specs=(by_query, gradient, gradient),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
        scratch_shapes=[pltpu.VMEM((channels, keys), jnp.float32)] * 2,
        compiler_params=_compiler_params(("parallel", "parallel", "arbitrary"), q, k, interpret),
        cost_estimate=_cost_estimate("flash_attention_gradient", q, keys, (q, k, v, out, log_sum, grad, q, k, v)),
        name="flash_attention_gradient",
        interpret=interpret,
    )(q, k, v, out, log_sum, grad)


def _backward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, log_sum_ref: Any, grad_ref: Any,
    dq_ref: Any, dk_ref: Any, dv_ref: Any, dk_sum: Any, dv_sum: Any, *, scale: float, chunk: int, valid: int,
):  # fmt: skip
    """Compute the gradient of one block of queries, and what the block adds to those of all keys and values."""
    q, grad, log_sum = q_ref[...], grad_ref[...], log_sum_ref[...]
    wide = grad.astype(jnp.float32) * out_ref[...].astype(jnp.float32)
    softmax_sum = wide.sum(axis=0, keepdims=True)  # (1, L)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def multiply(first: Any) -> tuple[jax.Array, jax.Array]:
        part = pl.ds(first, chunk)
        scores = _scores(k_ref[:, part], q, first, scale=scale, valid=valid)
        return scores, _dot(v_ref[:, part], grad, _LEFT_TRANSPOSED)

    def attend(first: Any, products: tuple[jax.Array, jax.Array], dq: jax.Array) -> jax.Array:
        part, (scores, dweights) = pl.ds(first, chunk), products
        weights = jnp.exp2(scores - log_sum)
        dv_sum[:, part] += _dot(grad, weights.astype(grad.dtype), _RIGHT_TRANSPOSED)
        dscores = (weights * (dweights - softmax_sum)).astype(q.dtype)
        dk_sum[:, part] += _dot(q, dscores, _RIGHT_TRANSPOSED)
        return dq + _dot(k_ref[:, part], dscores, _NOT_TRANSPOSED)

    dq = _loop_over_chunks(multiply, attend, jnp.zeros(q.shape, jnp.float32), k_ref.shape[1], chunk)
    natural_scale = scale / math.log2(math.e)
    dq_ref[...] = (dq * natural_scale).astype(dq_ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dk_ref[...] = (dk_sum[...] * natural_scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def _block_specs(q: jax.Array, k: jax.Array, interpret: bool) -> tuple[tuple[int, int, int], list[pl.BlockSpec]]:
    """Return the kernels' grid, and the block that one step of it sees of each kind of array.

    Returns:
        The grid's shape, and the blocks of an array like the queries, of one number per query, of an array like the
        keys that is read, and of one that is written. Where the memory has no room to read the next head's keys ahead,
        they are waited for.
    """
    channels, keys, grid = q.shape[2], k.shape[3], grid_shape(q.shape, k.shape)
    block = q.shape[3] // grid[-1]
    waits = {} if interpret or _needed_vmem_bytes(q, k) <= _max_vmem_bytes() else {"pipeline_mode": pl.Buffered(1)}
    return grid, [
        pl.BlockSpec((None, None, channels, block), lambda b, n, i: (b, n, 0, i)),
        pl.BlockSpec((None, None, 1, block), lambda b, n, i: (b, n, 0, i)),
        pl.BlockSpec((None, None, channels, keys), lambda b, n, i: (b, n, 0, 0), **waits),
        pl.BlockSpec((None, None, channels, keys), lambda b, n, i: (b, n, 0, 0)),
    ]


def _needed_vmem_bytes(q: Any, k: Any, buffers: int = 2) -> int:
    """Return the bytes of vector memory that a step of the gradient's kernel needs; the other kernel needs fewer.

    Args:
        q: Queries, (B, N, D, L), or anything of their shape and dtype.
        k: Keys, (B, N, D, S), or anything of their shape and dtype.
        buffers: Buffers each of the keys and of the values; with two, those of the next head are read ahead.
    """
    narrow, wide = (32 * math.ceil(q.shape[2] * size / 32) for size in (q.dtype.itemsize, 4))
    block = q.shape[3] // grid_shape(q.shape, k.shape)[-1]
    return k.shape[3] * ((2 * buffers + 4) * narrow + 2 * wide) + block * (8 * narrow + 2 * wide)


def _max_vmem_bytes() -> int:
    """Return the bytes of the chip's vector memory that a kernel may ask for."""
    return max(pltpu.get_tpu_info().vmem_capacity_bytes // 2, 2**24)


def _loop_over_chunks(
    multiply: Callable[[Any], Any], use: Callable[[Any, Any, Any], Any], carry: Any, keys: int, chunk: int
) -> Any:
    """Multiply for each chunk of keys and use the products, always multiplying for the next chunk first.

    Args:
        multiply: Function from the first key of a chunk to the chunk's products.
        use: Function from the first key, the products and the carry to the next carry.
        carry: Carry before the first chunk.
        keys: Number of keys in all.
        chunk: Number of keys in one chunk.

    Returns:
        The carry after the last chunk.
    """
    span = _largest_divisor(keys, MAX_UNROLLED_KEYS, chunk)

    def use_span(index: Any, carry: Any) -> Any:
        starts = [pl.multiple_of(index * span + first, chunk) for first in range(0, span, chunk)]
        products = multiply(starts[0])
        for start, next_start in itertools.zip_longest(starts, starts[1:]):
            next_products = None if next_start is None else multiply(next_start)
            carry = use(start, products, carry)
            products = next_products
        return carry

    return jax.lax.fori_loop(0, keys // span, use_span, carry)


def _scores(k: jax.Array, q: jax.Array, first: Any, *, scale: float, valid: int) -> jax.Array:
    """Return the scores (S, L) of the chunk of keys that begins at `first`; minus infinity where a key is padding."""
    scores = _dot(k, q, _LEFT_TRANSPOSED) * scale
    if valid % LANES == 0:
        return scores
    key = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    return jnp.where(key < valid, scores, -jnp.inf)


def _dot(a: jax.Array, b: jax.Array, dimensions: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _score_scale(channels: int) -> float:
    """Return the factor of scores whose softmax takes powers of 2."""
    return math.log2(math.e) / math.sqrt(channels)


def _chunk_length(keys: int, interpret: bool) -> int:
    """Return the number of keys that are multiplied at a time."""
    return _largest_divisor(keys, LANES if interpret else pltpu.get_tpu_info().mxu_column_size)


def _largest_divisor(length: int, limit: int, unit: int = LANES) -> int:
    """Return the largest multiple of `unit` up to `limit` that divides `length`, itself a multiple of `unit`."""
    return next(size for size in range(min(length, limit), 0, -unit) if length % size == 0)


def _compiler_params(order: tuple[Any, ...], q: jax.Array, k: jax.Array, interpret: bool) -> pltpu.CompilerParams:
    """Return the order of a grid's steps and, for long images, more memory than the compiler gives unasked."""
    limit = None if interpret or _needed_vmem_bytes(q, k) <= DEFAULT_VMEM_BYTES else _max_vmem_bytes()
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=limit)


def _cost_estimate(kernel: str, q: jax.Array, keys: int, arrays: Any) -> pl.CostEstimate:
    """Return the FLOPs of a kernel's products, and the bytes of each array once."""
    scores = q.size // q.shape[-2] * keys
    return pl.CostEstimate(
        flops=2 * sum(MATMULS_PER_KERNEL[kernel]) * scores * q.shape[-2],
        transcendentals=scores,
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in arrays),
    )
