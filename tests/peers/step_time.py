"""Steps of one training loop, as many as each line of the input asks for: python step_time.py SIDE RUN

SIDE is flax_diffusion, torch_backend or 0.39; RUN a JSON file {"task": …, "options": {…}}. Each answer is the mean time
of a step in seconds. As in runs, a step does not wait for the loss of the one before.
"""

import json
import sys
import time
from pathlib import Path


def ours(side, run):
    """A step of a backend, on a batch of the run's own, and what waits for its loss."""
    from importlib import import_module

    from flax_diffusion.core.cli.command_line import merge
    from flax_diffusion.core.run.assembly import make_loader
    from flax_diffusion.core.run.schedule.steps import make_schedule
    from flax_diffusion.core.tasks.task import task_of

    load_backend = import_module(f"{side}.train").load_backend
    config = merge(run["task"], {}, run["options"], "the benchmark")
    task = task_of(config)
    source = task.open_source()
    spec = task.make_spec(source)
    backend = load_backend()(config, spec)
    backend.init_state()
    schedule = make_schedule(config, task.count_examples(source), backend.device_count)
    with make_loader(task, spec, source, schedule, num_steps=1) as loader:
        batch = next(iter(loader))
    decays = dict.fromkeys(config.averages, 0.99)
    return lambda: backend.train_step(backend.put(batch), 1e-4, decays), backend.read


def reference(run):
    """The same of a step as the Flax scripts of 0.39 take it: jitted, its noise drawn inside."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from diffusers import FlaxDDPMScheduler, FlaxUNet2DConditionModel

    options = run["options"]
    unet, size, images = options["unet"], options["resolution"], options["train_batch_size"]
    model = FlaxUNet2DConditionModel(**unet, sample_size=size)
    scheduler = FlaxDDPMScheduler()
    noises = scheduler.create_state()
    params = model.init_weights(jax.random.key(0))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.standard_normal((images, unet["in_channels"], size, size)), jnp.float32)
    text = jnp.asarray(rng.standard_normal((images, 8, unet["cross_attention_dim"])), jnp.float32)

    def loss_of(params, key):
        drawn, when = jax.random.split(key)
        noise = jax.random.normal(drawn, pixels.shape)
        steps = jax.random.randint(when, (images,), 0, 1000)
        told = model.apply({"params": params}, scheduler.add_noise(noises, pixels, noise, steps), steps, text)
        return jnp.mean((noise - told.sample) ** 2)

    def step(params, state, key):
        key, own = jax.random.split(key)
        loss, grads = jax.value_and_grad(loss_of)(params, own)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, key, loss

    jitted = jax.jit(step, donate_argnums=(0, 1))
    kept = params, optimizer.init(params), jax.random.key(1)

    def once():
        nonlocal kept
        *kept, loss = jitted(*kept)
        return loss

    return once, float


def main(side, path):
    run = json.loads(Path(path).read_text())
    step, read = reference(run) if side == "0.39" else ours(side, run)
    for _ in range(2):
        read(step())
    print("ready", flush=True)
    last = None
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            last = step()
        read(last)
        print((time.perf_counter() - start) / int(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
