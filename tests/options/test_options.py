"""Every option of every task changes something that can be seen: a batch, a rate, the state, a file or a message.

`TABLE` says of each option what to change it to and where the difference must show. An option without a row fails.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import world as folders
from observing import MODELS, Observer
from tiny import CONDITION_UNET, TEXT_ENCODER, VAE

from flax_diffusion.core.tasks.task import TASKS

SHARED = {
    "resolution": 16, "train_batch_size": 2, "num_train_epochs": 2, "max_train_steps": None, "lr_warmup_steps": 0,
    "learning_rate": 1e-4, "validation_epochs": None, "validation_steps": None, "save_model_epochs": None,
    "checkpoint_models": False, "report_to": "none", "eval_batch_size": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """How an option is seen to do something.

    Args:
        value: To change it to; a function is given the folders, and the value that it has otherwise.
        look: Channels of `Observer` that must differ, all of them. "refused": the run is refused, by the option's name.
        given: Options that both runs have; a function is given the folders.
        before: Options of a run that is in the folder already.
        tasks: That the row is for; None for all that have the option.
    """

    value: Any
    look: str | tuple[str, ...]
    given: dict[str, Any] | Callable[[Any], dict[str, Any]] = field(default_factory=dict)
    before: dict[str, Any] | None = None
    tasks: tuple[str, ...] | None = None


def other(_: Any, value: Any) -> bool:
    """The other position of a switch."""
    return not value


BACKENDS = ("jax", "torch", "torch_built", "jax_says")
"""Channels that make models: those of text get a pipeline that trains on pixels, of fewer layers."""
BOTH = ("jax", "torch")
TEXT = ("text_to_image", "dreambooth", "textual_inversion", "controlnet")
TUNED = ("dreambooth", "textual_inversion", "controlnet")
FLOW = {"objective": "flow_matching"}
EARLIER = {"max_train_steps": 4, "checkpointing_steps": 2}


def unfilled(w: Any) -> dict[str, Any]:
    """Class pictures have to be drawn."""
    return prior(w) | {"class_data_dir": str(w.unfilled), "num_class_images": 4}


def scratch(_: Any) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": None, "unet": CONDITION_UNET | {"in_channels": 3, "out_channels": 3},
        "text_encoder": TEXT_ENCODER, "vae": None, "train_text_encoder": True,
    }  # fmt: skip


def prior(w: Any) -> dict[str, Any]:
    things = {"class_data_dir": str(w.classes), "class_prompt": "a photo of dog", "num_class_images": 4}
    return things | {"with_prior_preservation": True}


def latent(w: Any) -> dict[str, Any]:
    unet = folders.COLOUR_UNET | {"in_channels": 4, "out_channels": 4}
    return {"vae": str(w.vae), "unet": unet, "center_crop": True}


def latent_classes(w: Any) -> dict[str, Any]:
    return {"vae": str(w.vae), "transformer": folders.DIT | {"in_channels": 4}, "center_crop": True}


def judged(w: Any) -> dict[str, Any]:
    return {
        "evaluate_steps": 2, "evaluate_features": "pixels", "evaluate_reference": str(w.data),
        "evaluate_num_images": 10,
    }  # fmt: skip


def concept(w: Any, folder: Any, prompt: str) -> dict[str, Any]:
    return {"instance_data_dir": str(folder), "instance_prompt": prompt}


BIAS = {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 99.0}


def prompts_file(w: Any, _: Any) -> str:
    file = w.folder / "prompts.txt"
    file.write_text("a <new> thing --seed 3\n")
    return str(file)


TABLE: dict[str, list[Row]] = {
    # Model
    "pretrained_model_name_or_path": [
        Row(lambda w, _: str(w.other), "spec", tasks=TEXT),
        Row(lambda w, _: str(w.ddpm), "spec", {"unet": None}, tasks=("unconditional",)),
        Row(lambda w, _: str(w.classes_ddpm), "spec", {"transformer": None}, tasks=("class_conditional",)),
        Row(lambda w, _: str(w.base), "spec", {"vae": None}, tasks=("autoencoder",)),
    ],
    "revision": [
        Row("v2", ("asked", "spec"), {"pretrained_model_name_or_path": "me/base"}, tasks=TEXT),
        Row("v2", ("asked", "spec"), {"pretrained_model_name_or_path": "me/ddpm", "unet": None},
            tasks=("unconditional",)),
        Row("v2", ("asked", "spec"), {"pretrained_model_name_or_path": "me/base", "vae": None}, tasks=("autoencoder",)),
        Row("v2", ("asked", "spec"), {"pretrained_model_name_or_path": "me/classes_ddpm", "transformer": None},
            tasks=("class_conditional",)),
    ],
    "variant": [
        Row("fp16", "spec", lambda w: {"pretrained_model_name_or_path": f"{w.base}-half"}, tasks=TEXT),
        Row("fp16", "spec", lambda w: {"pretrained_model_name_or_path": f"{w.ddpm}-half", "unet": None},
            tasks=("unconditional",)),
        Row("fp16", "spec", lambda w: {"pretrained_model_name_or_path": f"{w.base}-half", "vae": None},
            tasks=("autoencoder",)),
        Row("fp16", "spec", lambda w: {"pretrained_model_name_or_path": f"{w.classes_ddpm}-half", "transformer": None},
            tasks=("class_conditional",)),
    ],
    "unet": [
        Row(folders.COLOUR_UNET | {"layers_per_block": 2}, "spec", tasks=("unconditional",)),
        Row(folders.COLOUR_UNET, "spec", {"transformer": None, "unet": folders.COLOUR_UNET | {"layers_per_block": 2}},
            tasks=("class_conditional",)),
        Row(CONDITION_UNET | {"in_channels": 3, "out_channels": 3, "layers_per_block": 2}, "spec", scratch,
            tasks=("text_to_image",)),
        Row(CONDITION_UNET, "refused", tasks=TUNED),
    ],
    "vae": [
        Row(lambda w, _: str(w.vae), "spec", tasks=TEXT),
        Row(lambda w, _: str(w.vae), "spec", lambda w: {"unet": latent(w)["unet"]}, tasks=("unconditional",)),
        Row(lambda w, _: str(w.vae), "spec", {"transformer": folders.DIT | {"in_channels": 4}},
            tasks=("class_conditional",)),
        Row(VAE | {"layers_per_block": 2}, "spec", tasks=("autoencoder",)),
    ],
    # Classes
    "transformer": [Row(folders.DIT | {"num_layers": 2}, "spec")],
    "label_column": [Row("kind", ("batch", "spec"))],
    # What they change is in tests/run/test_latents.py.
    "latents_dir": [Row(lambda w, _: str(w.data), "refused", {"center_crop": True})],
    "latents_dtype": [Row("bfloat16", "refused")],
    "stream_shards": [Row(1, "batch", lambda w: {"train_data_dir": str(w.columns)})],
    "class_dropout_prob": [Row(0.9, "batch")],
    "new_class_embedding": [
        Row(True, "spec",
            lambda w: {"transformer": None, "pretrained_model_name_or_path": str(w.classes_ddpm)}),
    ],
    "validation_class_labels": [Row(["1"], "samples")],
    "text_encoder": [Row(TEXT_ENCODER | {"num_hidden_layers": 2}, "spec", scratch)],
    # What they change is in tests/families/test_stable_diffusion_xl.py.
    "text_encoder_2": [Row(TEXT_ENCODER, "refused")],
    "pipeline": [Row("StableDiffusionXLPipeline", "refused")],
    "tokenizer_name": [Row(lambda w, _: str(w.tokenizer), "batch", tasks=("text_to_image", "dreambooth", "controlnet")),
                       Row(lambda w, _: str(w.tokenizer), "batch", {"initializer_token": "a"},
                           tasks=("textual_inversion",))],
    "noise_scheduler": [Row({"num_train_timesteps": 20, "beta_schedule": "scaled_linear"}, ("spec", "batch"))],
    "ddpm_num_steps": [Row(10, "batch", tasks=("unconditional", "class_conditional")),
                       Row(10, "batch", scratch, tasks=("text_to_image",)),
                       Row(10, "refused", tasks=TUNED)],
    "ddpm_beta_schedule": [
        Row("squaredcos_cap_v2", "spec", tasks=("unconditional", "class_conditional")),
        Row("squaredcos_cap_v2", "spec", scratch, tasks=("text_to_image",)),
        Row("squaredcos_cap_v2", "refused", tasks=TUNED),
    ],
    "prediction_type": [Row("v_prediction", ("spec", "batch"))],
    "optimizer": [Row("adam", ("jax_says", "torch_says"))],  # refused: there is one, and tests/house adds another
    "objective": [Row("flow_matching", ("spec", "batch"))],
    "weighting_scheme": [Row("logit_normal", "batch", FLOW)],
    "logit_mean": [Row(1.0, "batch", FLOW | {"weighting_scheme": "logit_normal"})],
    "logit_std": [Row(0.5, "batch", FLOW | {"weighting_scheme": "logit_normal"})],
    "shift": [Row(3.0, ("spec", "batch"), FLOW)],
    "edm_log_mean": [Row(-0.4, "batch", {"objective": "edm"})],
    "edm_log_std": [Row(1.0, "batch", {"objective": "edm"})],
    # Data
    "dataset_name": [Row("digits", "batch", {"train_data_dir": None})],
    "dataset_config_name": [Row("cats", "asked", {"dataset_name": "me/pets", "train_data_dir": None})],
    "train_data_dir": [
        Row(lambda w, _: str(w.more), "batch",
            tasks=("unconditional", "class_conditional", "text_to_image", "textual_inversion", "autoencoder")),
        Row(lambda w, _: str(w.paired_more), "batch", tasks=("controlnet",)),
        Row(lambda w, _: f"{w.data}:3", "batch", tasks=("unconditional", "text_to_image", "autoencoder")),
    ],
    "image_column": [Row("picture", "batch", lambda w: {"train_data_dir": str(w.columns)})],
    "caption_column": [
        Row("words", "batch", lambda w: {"train_data_dir": str(w.words)}, tasks=("text_to_image",)),
        Row("words", "batch", lambda w: {"train_data_dir": str(w.words), "conditioning_data_dir": str(w.data)},
            tasks=("controlnet",)),
    ],
    "max_train_samples": [Row(3, "batch")],
    "cache_dir": [
        Row(lambda w, _: str(w.folder / "cache"), "asked", {"dataset_name": "me/pets", "train_data_dir": None})
    ],
    "proportion_empty_prompts": [Row(1.0, "batch")],
    "resolution": [Row(8, "batch")],
    "bucket_resolutions": [
        Row(["auto"], "batch", {"resize_mode": "crop"}),
        Row(["auto"], "batch", {"resize_mode": "crop", "center_crop": True, "cache_latents": True}, tasks=TEXT),
        Row(["auto"], "batch", prior, tasks=("dreambooth",)),
    ],
    "resize_mode": [Row(lambda _, value: "stretch" if value == "crop" else "crop", "batch")],
    "center_crop": [Row(other, "batch", {"resize_mode": "crop"})],
    "random_flip": [Row(other, "batch")],
    "image_interpolation_mode": [Row("nearest", "batch")],
    "dataloader_num_workers": [Row(1, "asked")],
    "skip_bad_images": [
        Row(True, "batch", lambda w: {"instance_data_dir": str(w.bad)}, tasks=("dreambooth",)),
        Row(True, "batch", lambda w: {"train_data_dir": str(w.bad)},
            tasks=("unconditional", "class_conditional", "text_to_image", "textual_inversion", "autoencoder")),
        Row(True, "batch", lambda w: {"train_data_dir": str(w.bad), "conditioning_data_dir": str(w.data)},
            tasks=("controlnet",)),
    ],
    "cache_latents": [Row(True, "batch", latent, tasks=("unconditional",)),
                      Row(True, "batch", latent_classes, tasks=("class_conditional",)),
                      Row(True, "batch", {"center_crop": True}, tasks=TEXT)],
    "pre_compute_text_embeddings": [Row(True, "batch")],
    "precomputed_dir": [
        Row(lambda w, _: str(w.folder / "kept"), "kept", lambda w: latent(w) | {"cache_latents": True},
            tasks=("unconditional",)),
        Row(lambda w, _: str(w.folder / "kept"), "kept", lambda w: latent_classes(w) | {"cache_latents": True},
            tasks=("class_conditional",)),
        Row(lambda w, _: str(w.folder / "kept"), "kept", {"cache_latents": True, "center_crop": True}, tasks=TEXT),
    ],
    "precomputed_dtype": [Row("bfloat16", "batch", {"pre_compute_text_embeddings": True})],
    # Batch, devices, length
    "train_batch_size": [Row(3, "batch")],
    "gradient_accumulation_steps": [Row(2, "batch")],
    "global_batch_size": [Row(4, "batch")],
    "data_parallelism": [Row(4, "mesh", {"fsdp_parallelism": 2}), Row(4, "torch_says")],
    "fsdp_parallelism": [Row(2, ("mesh", "torch_says"))],
    "num_train_epochs": [Row(3, "batch")],
    "max_train_steps": [Row(3, "batch")],
    # Optimizer
    "learning_rate": [Row(1e-3, "rates")],
    "scale_lr": [Row(True, "rates")],
    "lr_scheduler": [Row("linear", "rates")],
    "lr_warmup_steps": [Row(2, "rates", {"lr_scheduler": "linear"})],
    "lr_num_cycles": [Row(2, "rates", {"lr_scheduler": "cosine_with_restarts"})],
    "lr_power": [Row(2.0, "rates", {"lr_scheduler": "polynomial"})],
    "lr_step_rules": [Row("1:1,0.1", "rates", {"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:2,0.1"})],
    "text_encoder_learning_rate": [Row(1e-3, ("jax", "torch_built"), {"train_text_encoder": True})],
    "adam_beta1": [Row(0.5, BOTH)],
    "adam_beta2": [Row(0.5, BOTH)],
    "adam_weight_decay": [Row(0.5, BOTH)],
    "adam_epsilon": [Row(1e-2, BOTH)],
    "max_grad_norm": [Row(1e-3, BOTH)],
    "use_ema": [Row(True, BOTH)],
    "ema_max_decay": [Row(0.2, "rates", {"use_ema": True})],
    "ema_warmup": [Row(other, "rates", {"use_ema": True})],
    "ema_inv_gamma": [Row(2.0, "rates", {"use_ema": True, "ema_warmup": True})],
    "ema_power": [Row(0.5, "rates", {"use_ema": True, "ema_warmup": True})],
    "ema_decays": [Row([0.2, 0.9], ("rates", "files", *BOTH), {"use_ema": True})],
    "ema_sigma_rels": [Row([0.05, 0.1], ("rates", "files", *BOTH), {"use_ema": True})],
    "ema_snapshot_steps": [Row(2, "files", {"ema_sigma_rels": [0.05]})],
    "snr_gamma": [Row(5.0, "batch")],
    "variance_loss_weight": [
        Row(0.001, "batch", lambda _: {"transformer": folders.DIT | {"out_channels": 2 * folders.DIT["in_channels"]}},
            tasks=("class_conditional",)),
    ],
    "timestep_bias_strategy": [Row("earlier", "batch", BIAS)],
    "timestep_bias_multiplier": [Row(9.0, "batch", {"timestep_bias_strategy": "later"})],
    "timestep_bias_portion": [Row(0.9, "batch", BIAS)],
    "timestep_bias_begin": [Row(800, "batch", BIAS | {"timestep_bias_strategy": "range"})],
    "timestep_bias_end": [Row(100, "batch", BIAS | {"timestep_bias_strategy": "range"})],
    "noise_offset": [Row(0.1, "batch")],
    "input_perturbation": [Row(0.1, "batch")],
    "rec_loss": [Row("l1", BOTH)],
    "kl_scale": [Row(1.0, BOTH)],
    # Precision and memory
    "fsdp_gather": [Row("block", "exchanges", {"fsdp_parallelism": 2}), Row("block", "torch_says")],
    "reduce_dtype": [Row("bf16", ("exchanges", "torch_sums", "torch_says"))],
    "mixed_precision": [Row("bf16", BOTH)],
    "gradient_checkpointing": [Row(True, ("jax", "torch_built"))],
    "use_8bit_adam": [Row(True, ("jax", "torch_built"))],
    "offload_optimizer": [Row(True, ("jax", "torch_says"))],
    "enable_xformers_memory_efficient_attention": [Row(True, ("jax_says", "torch_says"))],
    "set_grads_to_none": [Row(True, ("jax_says", "torch"))],
    "allow_tf32": [Row(True, ("jax_says", "torch_says"))],
    "channels_last": [Row(True, ("jax_says", "torch_built"))],
    "torch_compile": [Row(True, ("jax_says", "torch_built"))],
    # What trains
    "train_text_encoder": [Row(True, ("jax", "torch_built"))],
    "lora_rank": [Row(2, ("spec", "jax", "torch_built"))],
    "lora_alpha": [Row(8.0, "spec", {"lora_rank": 4})],
    "lora_dropout": [Row(0.5, BOTH, {"lora_rank": 4})],
    "lora_target_modules": [Row(["to_q"], ("spec", "torch_built"), {"lora_rank": 4})],
    "lora_text_encoder_target_modules": [
        Row(["q_proj"], ("spec", "torch_built"), {"lora_rank": 4, "train_text_encoder": True})
    ],
    "lora_format": [Row("kohya", "files", {"lora_rank": 4})],
    # DreamBooth
    "instance_data_dir": [Row(lambda w, _: str(w.more), "batch")],
    "instance_prompt": [Row("a photo of sks cat", "batch")],
    "with_prior_preservation": [Row(True, "batch", lambda w: prior(w) | {"with_prior_preservation": False})],
    "class_data_dir": [Row(lambda w, _: str(w.animals), "batch", prior)],
    "class_prompt": [Row("a photo of animal", "batch", prior)],
    "num_class_images": [Row(2, "batch", prior)],
    "prior_loss_weight": [Row(0.5, "batch", prior)],
    "sample_batch_size": [Row(3, "samples", unfilled)],
    "class_num_inference_steps": [Row(7, "samples", unfilled)],
    "class_guidance_scale": [Row(1.0, "samples", unfilled)],
    "concepts": [
        Row(lambda w, _: [concept(w, w.data, "a sks dog"), concept(w, w.more, "a zwx cat")], "batch",
            lambda w: {"instance_data_dir": None, "instance_prompt": None,
                       "concepts": [concept(w, w.data, "a sks dog")]}),
    ],
    # Inpainting
    "inpainting": [Row(True, ("spec", "batch"))],
    "mask_column": [Row("picture", "batch", lambda w: {"train_data_dir": str(w.columns), "inpainting": True})],
    "mask_data_dir": [Row(lambda w, _: str(w.edges), "batch", {"inpainting": True})],
    # ControlNet
    "controlnet_model_name_or_path": [Row(lambda w, _: str(w.control), "spec")],
    "controlnet_revision": [Row("v2", ("asked", "spec"), {"controlnet_model_name_or_path": "me/control"})],
    "conditioning_image_column": [Row("edges", "batch", lambda w: {"train_data_dir": str(w.columns)})],
    "conditioning_data_dir": [
        Row(lambda w, _: str(w.edges), "batch",
            lambda w: {"train_data_dir": str(w.data), "conditioning_data_dir": str(w.data)}),
    ],
    "validation_images": [Row(lambda w, _: [str(w.data / "1.png")], "samples", tasks=("controlnet",)),
                          Row(lambda w, _: [str(w.data / "1.png")], "files", tasks=("autoencoder",))],
    # Textual inversion
    "placeholder_token": [Row("<other>", ("spec", "files"), {"validation_prompts": ["<new> <other>"]})],
    "initializer_token": [Row("photo", ("spec", "torch"))],
    "num_vectors": [Row(2, ("spec", "batch"))],
    "learnable_property": [Row("style", "batch")],
    "prompt_templates": [Row(["all of {}"], "batch")],
    "repeats": [Row(2, "batch")],
    # Samples
    "validation_epochs": [Row(1, "files")],
    "validation_steps": [Row(2, "files")],
    "draw_samples": [Row(False, "files")],
    "profile_steps": [Row("1:1", "files")],
    "eval_batch_size": [Row(2, "files")],
    "validation_split": [Row(0.4, ("batch", "files"))],
    "validation_data_dir": [
        Row(lambda w, _: str(w.more), ("batch", "files"),
            tasks=("unconditional", "class_conditional", "text_to_image", "textual_inversion", "autoencoder")),
        Row(lambda w, _: str(w.paired_more), ("batch", "files"), tasks=("controlnet",)),
    ],
    "validation_loss_steps": [Row(1, "files", {"validation_split": 0.4})],
    "max_validation_samples": [Row(1, "batch", {"validation_split": 0.4})],
    "evaluate_steps": [Row(1, "files", judged)],
    "evaluate_metrics": [Row(["fid", "precision"], "files", judged)],
    "evaluate_features": [Row("inception", "refused", judged)],
    "evaluate_inception": [Row("weights.pth", "refused", judged)],
    "evaluate_reference": [Row(lambda w, _: str(w.more), "files", judged)],
    "evaluate_num_images": [Row(20, "samples", judged)],
    "evaluate_num_inference_steps": [Row(3, "samples", judged)],
    "evaluate_batch_size": [Row(2, "samples", judged)],
    "evaluate_guidance_scale": [Row([1.0, 2.0], "samples", judged)],
    "validation_num_inference_steps": [Row(3, "samples")],
    "validation_prompts_file": [Row(prompts_file, "samples", {"validation_prompts": []})],
    "validation_prompts": [Row(["a <new> thing"], "samples")],
    "validation_guidance_scale": [Row(3.0, "samples")],
    # Output
    "output_name": [Row("dog", "files", lambda w: {"lora_rank": 2}, tasks=("text_to_image", "dreambooth")),
                    Row("dog", "files", tasks=("textual_inversion",))],
    "output_dir": [Row(lambda w, _: tempfile.mkdtemp("-elsewhere", dir=w.folder), "where")],
    "overwrite_output_dir": [Row(True, "batch", before=EARLIER)],
    "save_model_epochs": [Row(1, "exports")],
    "checkpointing_steps": [Row(2, "files")],
    "checkpoint_models": [Row(True, "files")],
    "checkpoints_total_limit": [Row(2, "files", {"checkpointing_steps": 1})],
    "resume_from_checkpoint": [Row("checkpoint-2", "batch", {"resume_from_checkpoint": "latest"}, EARLIER)],
    "skip_nonfinite": [Row(1, BOTH)],
    "repeat_step": [Row(2, "batch", {"resume_from_checkpoint": "latest"}, EARLIER)],
    "report_to": [
        Row("tensorboard", "files"), Row(["csv"], "files"), Row(["tensorboard", "wandb"], ("asked", "files")),
    ],
    "tracker_project_name": [Row("digits", "asked", {"report_to": "wandb"})],
    "logging_dir": [Row("curves", "files", {"report_to": "tensorboard"})],
    "quiet": [Row(True, "said")],
    "log_level": [Row("warning", "said"), Row("debug", "said")],
    "push_to_hub": [Row(True, ("asked", "files"))],
    "hub_model_id": [Row("me/another", "asked", {"push_to_hub": True})],
    "hub_private_repo": [Row(True, "asked", {"push_to_hub": True})],
    "hub_token": [Row("another", "asked", {"push_to_hub": True})],
    "seed": [Row(1, "batch")],
}  # fmt: skip

PAIRS = [(task, name) for task in TASKS for name in TASKS[task].config_class.model_fields]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return folders.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def observer(world):
    with pytest.MonkeyPatch.context() as patch:
        yield Observer(world, patch)


def base(task: str, w: Any) -> dict[str, Any]:
    """The options that a task is looked at with."""
    text = {"pretrained_model_name_or_path": str(w.base), "validation_num_inference_steps": 2}
    text |= {"validation_prompts": ["a <new>"]}
    return SHARED | {
        "unconditional": {
            "unet": folders.COLOUR_UNET, "validation_num_inference_steps": 2, "train_data_dir": str(w.data),
        },
        "class_conditional": {
            "transformer": folders.DIT, "validation_num_inference_steps": 2, "train_data_dir": str(w.data),
            "validation_class_labels": ["0"],
        },
        "text_to_image": text | {"train_data_dir": str(w.data)},
        "dreambooth": text | {"instance_data_dir": str(w.data), "instance_prompt": "a photo of sks dog"},
        "textual_inversion": text
        | {"train_data_dir": str(w.data), "placeholder_token": "<new>", "initializer_token": "dog", "repeats": 1},
        "controlnet": text | {"train_data_dir": str(w.paired), "validation_images": [str(w.data / "0.png")]},
        "autoencoder": {"vae": VAE, "train_data_dir": str(w.data)},
    }[task]  # fmt: skip


def rows(task: str, name: str) -> list[Row]:
    return [row for row in TABLE.get(name, []) if row.tasks is None or task in row.tasks]


def channels(row: Row) -> tuple[str, ...]:
    return (row.look,) if isinstance(row.look, str) else row.look


def cases() -> Iterator[Any]:
    """Task, option and the kind of channel.

    What makes models is the same for all tasks, and what `class_conditional` shares with `unconditional` is the same
    code: the gate looks at one.
    """
    looked_at = set()
    shared = TASKS["unconditional"].config_class.model_fields
    for task, name in PAIRS:
        kinds = {channel in MODELS for row in rows(task, name) for channel in channels(row)}
        for models in sorted(kinds):
            again = (models and name in looked_at) or (task == "class_conditional" and name in shared)
            marks = [pytest.mark.acceptance] if again else []
            yield pytest.param(task, name, models, marks=marks, id=f"{task}-{name}-{'models' if models else 'run'}")
            looked_at |= {name} if models else set()


def check(observer: Observer, task: str, name: str, row: Row, w: Any, models: bool) -> None:
    """Raises AssertionError unless the change of an option shows wherever the row says.

    Args:
        observer: Looks.
        task: Its name.
        name: Of the option.
        row: Of the table.
        w: The folders.
        models: Look at the channels that make models, or at the others.
    """
    options = base(task, w) | (row.given(w) if callable(row.given) else row.given)
    was = options.get(name, TASKS[task].config_class.model_fields[name].default)
    value = row.value(w, was) if callable(row.value) else row.value
    assert value != was, f"the row changes --{name} to the value that it has"
    changed = options | {name: value}
    for channel in channels(row):
        if (channel in MODELS) != models:
            continue
        if channel == "refused":
            seen = observer.look("batch", task, changed)
            assert str(seen).startswith("error: "), f"--{name} is taken"
            assert f"--{name}" in str(seen)
            continue
        light = {"pretrained_model_name_or_path": str(w.pixels), "vae": None}
        if channel in BACKENDS and options.get("pretrained_model_name_or_path") == str(w.base):
            options, changed = options | light, changed | light
        seen, expected = (observer.look(channel, task, one, row.before) for one in (changed, options))
        assert seen != expected, f"--{name} {value}: {channel} is as with {was}"
        if str(seen).startswith("error: "):  # of a backend that does not have it
            assert channel.endswith("_says") or channel == "mesh", seen
            assert f"--{name}" in str(seen)


def test_every_option_has_a_row_and_a_description() -> None:
    missing = [f"{task} --{name}" for task, name in PAIRS if not rows(task, name)]
    assert not missing, f"options of which no row says what they change: {', '.join(missing)}"
    unknown = set(TABLE) - {name for _, name in PAIRS}
    assert not unknown, f"rows of options that there are not: {unknown}"
    for task, name in PAIRS:
        assert TASKS[task].config_class.model_fields[name].description, name


@pytest.mark.parametrize("task", TASKS)
def test_the_same_options_show_the_same(task: str, observer: Observer, world: Any) -> None:
    """Else every difference below would prove nothing."""
    first, again = (observer.run(task, base(task, world), None) for _ in range(2))
    assert first == again
    if task == "unconditional":
        for channel in (observer.torch, observer.torch_built, observer.jax):
            assert channel(task, base(task, world)) == channel(task, base(task, world))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by PyTorch's own compiler
@pytest.mark.parametrize(("task", "name", "models"), list(cases()))
def test_every_option_changes_something(task: str, name: str, models: bool, observer: Observer, world: Any) -> None:
    for row in rows(task, name):
        check(observer, task, name, row, world, models)
