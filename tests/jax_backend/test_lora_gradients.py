"""Layers with LoRA beside the plain formula: outputs and gradients of all weights in float64."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_diffusion.jax_backend.adapters import interceptor
from flax_diffusion.models.layers import HalvedDense, LayerConfig

LORA = SimpleNamespace(lora=SimpleNamespace(scale=1.5, dropout=0.0), new_tokens=None)
LAYERS = {
    "dense": nn.Dense(6, dtype=jnp.float64, param_dtype=jnp.float64),
    "halved": HalvedDense(6, LayerConfig(groups=1, eps=1e-5, dtype=jnp.float64, param_dtype=jnp.float64)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_lora_is_the_plain_formula(name):
    with jax.enable_x64(True):
        layer, rng = LAYERS[name], np.random.default_rng(0)
        x, target = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 6))
        shapes = {"kernel": (4, 6), "bias": (6,), "lora_A": (4, 2), "lora_B": (2, 6)}
        drawn = {key: rng.standard_normal(shape) for key, shape in shapes.items()}

        def loss(function, weights, x):
            out = function(weights, x)
            return jnp.sum(jnp.square(out - target)), out

        def with_adapters(weights, x):
            params = {key: {"kernel": value} if "lora" in key else value for key, value in weights.items()}
            with nn.intercept_methods(interceptor(LORA, train=True)):
                out = layer.apply({"params": params}, x)
            return jnp.concatenate(out, axis=-1) if isinstance(out, tuple) else out

        def plain(weights, x):
            return x @ (weights["kernel"] + 1.5 * weights["lora_A"] @ weights["lora_B"]) + weights["bias"]

        results = [
            jax.value_and_grad(lambda *inputs, f=function: loss(f, *inputs), argnums=(0, 1), has_aux=True)(drawn, x)
            for function in (with_adapters, plain)
        ]
        jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12), *results)
