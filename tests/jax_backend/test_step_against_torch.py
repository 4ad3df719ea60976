"""The compiled step equals a plain PyTorch loop with Diffusers' classes: same weights, same batches, same numbers."""

import jax
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from tiny import RUN, TEXT_RUN, UNET, pictures, stable_diffusion

from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.run.schedule.rates import ema_decays, learning_rate_schedule
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.tasks.text_to_image import TextToImageConfig
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig
from flax_diffusion.jax_backend.backend import JaxBackend
from flax_diffusion.models.weights import to_torch

STEPS = 5


def run_ours(config, spec, source):
    """Losses, gradient norms, final weights and EMA by PyTorch name, and the batches that were used."""
    backend = JaxBackend(config, spec, jax.devices()[:1])
    backend.init_state()
    start = {name: np.array(value) for name, value in to_torch(backend.state.params["unet"])}
    rate = learning_rate_schedule(config, STEPS, config.learning_rate)
    loader = Loader(
        source, task_of(config).make_example_fn(spec), seed=config.seed, batch_size=config.train_batch_size,
        accumulation=config.gradient_accumulation_steps, num_steps=STEPS,
    )  # fmt: skip
    batches, metrics = [], []
    with loader:
        for step, batch in enumerate(loader):
            batches.append(batch)
            metrics.append(backend.read(backend.train_step(backend.put(batch), rate(step), ema_decays(config, step))))
    final = dict(to_torch(jax.device_get(backend.state.params["unet"])))
    ema = dict(to_torch(jax.device_get(backend.state.ema["ema"]["unet"]))) if config.use_ema else None
    return start, metrics, final, ema, batches


def run_torch(config, scheduler, unet, batches, condition=None, encode=None):
    """The loop of Diffusers' scripts, in float32."""
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay, eps=config.adam_epsilon,
    )  # fmt: skip
    rate = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=STEPS
    )
    ema = EMAModel(
        unet.parameters(), decay=config.ema_max_decay, use_ema_warmup=config.ema_warmup,
        inv_gamma=config.ema_inv_gamma, power=config.ema_power,
    )  # fmt: skip
    losses, norms = [], []
    for batch in batches:
        total = 0.0
        for index in range(config.gradient_accumulation_steps):
            micro = {key: torch.from_numpy(value[index]) for key, value in batch.items()}
            clean = micro["pixel_values"] if encode is None else encode(micro["pixel_values"], micro["latent_noise"])
            t = micro["timesteps"].long()
            added = micro["noise"] + micro["perturbation"] if "perturbation" in micro else micro["noise"]
            noisy = scheduler.add_noise(clean, added, t)
            extra = () if condition is None else (condition(micro["input_ids"].long()),)
            predicted = unet(noisy, t, *extra).sample
            kind = scheduler.config.prediction_type
            if kind == "epsilon":
                target = micro["noise"]
            else:
                target = clean if kind == "sample" else scheduler.get_velocity(clean, micro["noise"], t)
            error = ((predicted - target) ** 2).mean(dim=(1, 2, 3))
            if config.snr_gamma is not None:
                snr = compute_snr(scheduler, t)
                capped = torch.minimum(snr, torch.full_like(snr, config.snr_gamma))
                error = error * capped / (snr + 1 if kind == "v_prediction" else snr)
            elif kind == "sample" and condition is None:
                error = error * compute_snr(scheduler, t)
            loss = error.mean() / config.gradient_accumulation_steps
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm).item())
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        losses.append(total)
    names = [name for name, _ in unet.named_parameters()]
    return losses, norms, dict(zip(names, ema.shadow_params, strict=True))


def check(metrics, final, ema, unet, theirs):
    losses, norms, averaged = theirs
    np.testing.assert_allclose([m["loss"] for m in metrics], losses, rtol=1e-5)
    np.testing.assert_allclose([m["grad_norm"] for m in metrics], norms, rtol=1e-4)
    for tree, reference in ((final, dict(unet.named_parameters())), (ema, averaged)):
        if tree is None:
            continue
        for name, value in reference.items():
            # Adam divides a gradient by its size: one that is only rounding moves a weight by up to the rate.
            np.testing.assert_allclose(tree[name], value.detach().numpy(), rtol=1e-4, atol=2e-5, err_msg=name)


pytestmark = pytest.mark.acceptance  # the gate holds the step to `torch_backend`

CASES = {
    "sample": {"prediction_type": "sample"},
    "v_min_snr_ema": {"prediction_type": "v_prediction", "snr_gamma": 5.0, "use_ema": True, "ema_warmup": False},
    "all": {
        "snr_gamma": 5.0, "noise_offset": 0.1, "input_perturbation": 0.1, "gradient_accumulation_steps": 2,
        "use_ema": True, "lr_scheduler": "linear", "max_grad_norm": 0.05,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_unconditional(case):
    options = RUN | {"learning_rate": 1e-4, "train_batch_size": 4} | CASES[case]
    config = UnconditionalConfig(**options)
    spec = task_of(config).make_spec([])
    source = open_source(dataset_name="digits", caption_column=None)
    start, metrics, final, ema, batches = run_ours(config, spec, source)
    unet = UNet2DModel(**{"sample_size": 8} | UNET)
    unet.load_state_dict({name: torch.from_numpy(value) for name, value in start.items()})
    scheduler = DDPMScheduler(prediction_type=spec.prediction_type)
    check(metrics, final, ema, unet, run_torch(config, scheduler, unet, batches))


def test_fine_tuning_stable_diffusion(tmp_path):
    base = stable_diffusion(tmp_path / "base")
    drop = {"unet", "text_encoder", "dataset_name", "max_train_samples", "train_text_encoder", "vae"}
    options = {key: value for key, value in TEXT_RUN.items() if key not in drop} | {
        "pretrained_model_name_or_path": str(base), "train_data_dir": str(pictures(tmp_path / "data")),
        "resolution": 16, "train_batch_size": 2, "learning_rate": 1e-4, "use_ema": True,
    }  # fmt: skip
    config = TextToImageConfig(**options)
    source = open_source(train_data_dir=config.train_data_dir, caption_column="text")
    spec = task_of(config).make_spec(source)
    _, metrics, final, ema, batches = run_ours(config, spec, source)

    pipe = StableDiffusionPipeline.from_pretrained(base)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    def encode(pixels, noise):
        with torch.no_grad():
            posterior = pipe.vae.encode(pixels).latent_dist
            return (posterior.mean + posterior.std * noise) * pipe.vae.config.scaling_factor

    def condition(ids):
        with torch.no_grad():
            return pipe.text_encoder(ids)[0]

    theirs = run_torch(config, scheduler, pipe.unet, batches, condition, encode)
    check(metrics, final, ema, pipe.unet, theirs)
