"""The same prompt and noise under each sampler, on one loaded pipeline."""

import diffusers
import jax
import jax.numpy as jnp
from diffusers import FlaxDPMSolverMultistepScheduler, FlaxStableDiffusionPipeline
from diffusers.schedulers import FlaxDDIMScheduler, FlaxPNDMScheduler

SAMPLERS = {"ddim": FlaxDDIMScheduler, "pndm": FlaxPNDMScheduler, "dpm": FlaxDPMSolverMultistepScheduler}


def main(folder):
    base = f"{folder}/sd"
    scheduler, scheduler_state = FlaxDPMSolverMultistepScheduler.from_pretrained(base, subfolder="scheduler")
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(
        base, scheduler=scheduler, dtype=jnp.float32, safety_checker=None, feature_extractor=None
    )
    params["scheduler"] = scheduler_state
    prompt_ids = pipeline.prepare_inputs(["a red cat"])
    latents = jax.random.normal(jax.random.PRNGKey(0), (1, 4, 8, 8))
    images = {}
    for name, cls in SAMPLERS.items():
        scheduler = cls(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            num_train_timesteps=1000,
            **({"skip_prk_steps": True} if name == "pndm" else {}),
        )
        pipeline.scheduler, params["scheduler"] = scheduler, scheduler.create_state()
        images[f"images {name}"] = pipeline(
            prompt_ids, params, jax.random.PRNGKey(1), num_inference_steps=5, latents=latents
        ).images
    scheduler, params["scheduler"] = diffusers.FlaxDDIMScheduler.from_pretrained(
        base, subfolder="scheduler", set_alpha_to_one=False, prediction_type="v_prediction"
    )
    pipeline = diffusers.FlaxStableDiffusionPipeline(
        **dict.fromkeys(("safety_checker", "feature_extractor")),
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=pipeline.unet,
        scheduler=scheduler,
    )
    images["images v"] = pipeline(prompt_ids, params, jax.random.PRNGKey(1), 5, latents=latents)[0]
    return images
