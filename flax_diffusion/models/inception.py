"""The Inception network of the Fréchet Inception distance: TensorFlow's graph of 2015, as `pytorch-fid` carries it.

It differs from torchvision's Inception v3: its average pooling counts no padding, its last block pools by maximum, and
it has 1,008 classes. Pictures of any size are resized to 299 x 299, bilinearly and without smoothing.

The names of the parameters are those of pytorch-fid's file, `pt_inception-2015-12-05-6726825d.pth`.

Axes in shapes: B batch, H height, W width.

Reference:
    Szegedy et al., https://arxiv.org/abs/1512.00567, for the blocks; Heusel et al., https://arxiv.org/abs/1706.08500,
    for the features.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_diffusion.core.errors import WeightsError, shown
from flax_diffusion.core.io.files import as_path, local_copy
from flax_diffusion.core.io.model_files import PICKLED, read_safetensors
from flax_diffusion.core.io.torch_files import read_torch_tensors
from flax_diffusion.core.io.torch_names import from_torch_layout, torch_shape

POOL_FEATURES, CLASSES, SIDE = 2048, 1008, 299
_EPS = 1e-3  # added to the variances of all norms


class InceptionOutput(NamedTuple):
    """What the network says of a batch of pictures.

    Attributes:
        features: Means over the last block's pixels, (B, 2048).
        logits: Scores of the classes, (B, 1008).
    """

    features: jax.Array
    logits: jax.Array


class _Conv(NamedTuple):
    """A convolution of a block: it keeps the size, or halves it (`stride` 2) and then pads nothing."""

    name: str
    features: int
    height: int = 1
    width: int = 1
    stride: int = 1


_Branch = tuple[Any, ...]
"""Steps one after another. Convolutions in a tuple are taken side by side; "mean", "max" and "half" pool."""


def _square(name: str, features: int, side: int = 1, stride: int = 1) -> _Conv:
    return _Conv(name, features, side, side, stride)


def _block_a(pooled: int) -> tuple[_Branch, ...]:
    return (
        (_square("branch1x1", 64),),
        (_square("branch5x5_1", 48), _square("branch5x5_2", 64, 5)),
        (_square("branch3x3dbl_1", 64), _square("branch3x3dbl_2", 96, 3), _square("branch3x3dbl_3", 96, 3)),
        ("mean", _square("branch_pool", pooled)),
    )


def _block_c(inner: int) -> tuple[_Branch, ...]:
    return (
        (_square("branch1x1", 192),),
        (_square("branch7x7_1", inner), _Conv("branch7x7_2", inner, 1, 7), _Conv("branch7x7_3", 192, 7, 1)),
        (
            _square("branch7x7dbl_1", inner),
            _Conv("branch7x7dbl_2", inner, 7, 1),
            _Conv("branch7x7dbl_3", inner, 1, 7),
            _Conv("branch7x7dbl_4", inner, 7, 1),
            _Conv("branch7x7dbl_5", 192, 1, 7),
        ),
        ("mean", _square("branch_pool", 192)),
    )


def _block_e(pooling: str) -> tuple[_Branch, ...]:
    return (
        (_square("branch1x1", 320),),
        (_square("branch3x3_1", 384), (_Conv("branch3x3_2a", 384, 1, 3), _Conv("branch3x3_2b", 384, 3, 1))),
        (
            _square("branch3x3dbl_1", 448),
            _square("branch3x3dbl_2", 384, 3),
            (_Conv("branch3x3dbl_3a", 384, 1, 3), _Conv("branch3x3dbl_3b", 384, 3, 1)),
        ),
        (pooling, _square("branch_pool", 192)),
    )


BLOCKS: dict[str, tuple[_Branch, ...]] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": (
        (_square("branch3x3", 384, 3, 2),),
        (_square("branch3x3dbl_1", 64), _square("branch3x3dbl_2", 96, 3), _square("branch3x3dbl_3", 96, 3, 2)),
        ("half",),
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": (
        (_square("branch3x3_1", 192), _square("branch3x3_2", 320, 3, 2)),
        (
            _square("branch7x7x3_1", 192),
            _Conv("branch7x7x3_2", 192, 1, 7),
            _Conv("branch7x7x3_3", 192, 7, 1),
            _square("branch7x7x3_4", 192, 3, 2),
        ),
        ("half",),
    ),
    "Mixed_7b": _block_e("mean"),
    "Mixed_7c": _block_e("max"),
}
"""The branches of each block, in the order in which their channels are joined."""


class _Norm(nn.Module):
    """Batch normalisation by the statistics of the training, which are parameters here."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param("weight", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("running_mean", nn.initializers.zeros, shape)
        variance = self.param("running_var", nn.initializers.ones, shape)
        return (x - mean) * (jax.lax.rsqrt(variance + _EPS) * scale) + bias


class _ConvNorm(nn.Module):
    """Convolution without bias, norm, ReLU."""

    spec: _Conv
    padded: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec = self.spec
        x = nn.Conv(
            spec.features,
            (spec.height, spec.width),
            (spec.stride, spec.stride),
            padding=[(side // 2, side // 2) if self.padded else (0, 0) for side in (spec.height, spec.width)],
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,  # a TPU's own choice, bfloat16, would change the distance
            name="conv",
        )(x)
        return nn.relu(_Norm(name="bn")(x))


class _Block(nn.Module):
    """Branches side by side, whose channels are joined."""

    branches: tuple[_Branch, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([self._run(branch, x) for branch in self.branches], -1)

    def _run(self, branch: _Branch, x: jax.Array) -> jax.Array:
        for step in branch:
            if isinstance(step, _Conv):
                x = self._conv(step, x)
            elif isinstance(step, tuple):
                x = jnp.concatenate([self._conv(one, x) for one in step], -1)
            else:
                x = _POOLINGS[step](x)
        return x

    def _conv(self, spec: _Conv, x: jax.Array) -> jax.Array:
        return _ConvNorm(spec, padded=spec.stride == 1, name=spec.name)(x)


def _half(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2))


_AROUND = cast(Any, ((1, 1), (1, 1)))  # Flax declares a name of a kind of padding only
_POOLINGS = {
    "mean": lambda x: nn.avg_pool(x, (3, 3), padding=_AROUND, count_include_pad=False),
    "max": lambda x: nn.max_pool(x, (3, 3), padding=_AROUND),
    "half": _half,
}


class FlaxInceptionV3(nn.Module):
    """The network, in float32 throughout; it has no training mode."""

    @nn.compact
    def __call__(self, pixels: jax.Array) -> InceptionOutput:
        """Return features and logits.

        Args:
            pixels: Pictures of any size, float32 (B, H, W, 3) in -1..1.
        """
        x = jax.image.resize(pixels, (len(pixels), SIDE, SIDE, 3), "bilinear", antialias=False)

        def conv(name: str, features: int, square: int, stride: int = 1, *, padded: bool = False) -> jax.Array:
            return _ConvNorm(_Conv(name, features, square, square, stride), padded, name=name)(x)

        x = conv("Conv2d_1a_3x3", 32, 3, 2)
        x = conv("Conv2d_2a_3x3", 32, 3)
        x = conv("Conv2d_2b_3x3", 64, 3, padded=True)
        x = _half(x)
        x = conv("Conv2d_3b_1x1", 80, 1)
        x = conv("Conv2d_4a_3x3", 192, 3)
        x = _half(x)
        for name, branches in BLOCKS.items():
            x = _Block(branches, name=name)(x)
        features = x.mean((1, 2))
        logits = nn.Dense(CLASSES, precision=jax.lax.Precision.HIGHEST, name="fc")(features)
        return InceptionOutput(features, logits)


def _stored_name(path: tuple[str, ...]) -> str:
    return ".".join((*path[:-1], "weight" if path[-1] == "kernel" else path[-1]))


@functools.cache
def inception_shapes() -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return the shape of every parameter in Linen's layout, by its path in the tree."""
    pixels = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    tree = jax.eval_shape(FlaxInceptionV3().init, jax.eval_shape(lambda: jax.random.key(0)), pixels)["params"]
    return {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree).items()}  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]


class InceptionWeights(NamedTuple):
    """Weights of the network.

    Attributes:
        params: Tree of the parameters, float32 NumPy arrays.
        fingerprint: Checksum of all of them, by which statistics of other weights are told apart.
    """

    params: dict[str, Any]
    fingerprint: str


def read_inception(file: str | Path) -> InceptionWeights:
    """Read the weights from a local file; nothing is downloaded.

    Args:
        file: pytorch-fid's file, which `torch.save` has written, or safetensors of the same names.

    Returns:
        The weights.

    Raises:
        WeightsError: If the file cannot be read, or holds another network.
    """
    path = as_path(file)
    if not path.is_file():
        raise WeightsError(f"{path} is no file: give pytorch-fid's pt_inception-2015-12-05-6726825d.pth")
    path = local_copy(path.parent, (path.name,)) / path.name
    if path.suffix == ".safetensors":
        return _fitted({name: tensor.array() for name, tensor in read_safetensors(path).items()}, path)
    if path.suffix not in PICKLED:
        raise WeightsError(f"{path}: must end in .safetensors or one of {' '.join(PICKLED)}")
    try:
        return _fitted(read_torch_tensors(path), path)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is no file of weights ({error}): fetch it again") from error


def _fitted(stored: Mapping[str, np.ndarray], path: Path) -> InceptionWeights:
    """Return the weights, once they are those of this network."""
    # Newer releases of PyTorch count the batches of the training, which nothing uses.
    left = {name: array for name, array in stored.items() if not name.endswith(".num_batches_tracked")}
    params, problems, checksum = {}, [], hashlib.sha256()
    for where, shape in sorted(inception_shapes().items()):
        name, wanted = _stored_name(where), torch_shape(where, shape)
        array = left.pop(name, None)
        if array is None:
            problems.append(f"{name} is missing")
        elif array.shape != wanted:
            problems.append(f"{name} has shape {array.shape} instead of {wanted}")
        elif not np.issubdtype(array.dtype, np.floating):
            problems.append(f"{name} holds {array.dtype}, not floats")
        else:
            params[where] = np.array(from_torch_layout(where, array, len(shape)), np.float32, order="C")
            checksum.update(name.encode() + params[where].tobytes())
    problems += [f"{shown(name)} is not known" for name in left]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(
            f"{path} does not hold the Inception network of the FID: {'; '.join(problems[:3])}{more}; "
            "give pytorch-fid's pt_inception-2015-12-05-6726825d.pth"
        )
    return InceptionWeights(unflatten_dict(params), checksum.hexdigest()[:16])
