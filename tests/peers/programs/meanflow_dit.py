"""One-step generation on latents: a small network trained over a mesh, pictures decoded by the autoencoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from diffusers import FlaxAutoencoderKL
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class LatentManager:
    """Encodes and decodes with everything in its place on the mesh."""

    def __init__(self, path, mesh):
        vae, params = FlaxAutoencoderKL.from_pretrained(path, from_pt=True)
        self.replicated, self.divided = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        self.params = jax.device_put(params, self.replicated)
        self.encode = jax.jit(
            lambda params, x, key: (
                vae.apply({"params": params}, x, method=vae.encode).latent_dist.sample(key) * 0.18215
            ),
            in_shardings=(self.replicated, self.divided, self.replicated),
            out_shardings=self.divided,
        )
        self.decode = jax.jit(
            lambda params, z: vae.apply({"params": params}, z / 0.18215, method=vae.decode).sample,
            in_shardings=(self.replicated, self.divided),
            out_shardings=self.divided,
        )


class Velocity(nn.Module):
    @nn.compact
    def __call__(self, z, r, t):
        times = jnp.stack([r, t], axis=-1)[:, None, None]
        h = nn.silu(nn.Dense(32)(z) + nn.Dense(32)(times))
        return nn.Dense(z.shape[-1])(h)


def main(folder):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    manager, model, tx = LatentManager(f"{folder}/sd/vae", mesh), Velocity(), optax.adam(1e-3)
    count, key = 2 * jax.device_count(), jax.random.PRNGKey(0)
    images = np.random.default_rng(0).uniform(-1, 1, (count, 3, 16, 16)).astype(np.float32)
    latents = manager.encode(manager.params, images, key)
    params = model.init(key, latents, jnp.zeros(count), jnp.ones(count))
    state = (params, tx.init(params))

    @jax.jit
    def step(state, x, key):
        params, opt_state = state
        e, times = jax.random.normal(key, x.shape), jnp.sort(jax.random.uniform(key, (2, count)), axis=0)
        r, t = times
        z = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * e

        def loss(params):
            u, dudt = jax.jvp(lambda *args: model.apply(params, *args), (z, r, t), (e - x, 0 * r, 1 + 0 * t))
            target = (e - x) - (t - r)[:, None, None, None] * dudt
            return jnp.mean((u - jax.lax.stop_gradient(target)) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), value

    for number in range(2):
        state, value = step(state, latents, jax.random.fold_in(key, number))
    noise = jax.device_put(jax.random.normal(key, latents.shape), manager.divided)
    z = noise - model.apply(state[0], noise, jnp.zeros(count), jnp.ones(count))
    pictures = manager.decode(manager.params, z).transpose(0, 2, 3, 1)
    return {"loss": value, "latents": latents, "pictures": pictures}
