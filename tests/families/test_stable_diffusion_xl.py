"""Stable Diffusion XL: trained, drawn, adapted and converted as Diffusers' own pipeline does it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from proofs import proof
from safetensors.torch import load_file
from tiny import paired_pictures, pictures, rewrite, stable_diffusion, stable_diffusion_xl

import flax_diffusion.generate
import flax_diffusion.train
import torch_backend.generate
import torch_backend.train
from flax_diffusion.convert import convert
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.data.batches import Precomputed
from flax_diffusion.core.errors import ConfigError, UserError, WeightsError
from flax_diffusion.core.randomness.streams import sampling_noise
from flax_diffusion.core.spec.pipeline import open_pipeline
from flax_diffusion.core.tasks.task import TASKS, task_of

# Of Diffusers' own scheduler.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
BACKENDS = {"jax": flax_diffusion, "torch": torch_backend}
PROMPT = "a photo of sks dog"
SIZE = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion_xl(tmp_path_factory.mktemp("xl") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = pictures(tmp_path_factory.mktemp("pictures"), 3)
    (root / "metadata.jsonl").unlink()
    return root


@pytest.fixture
def shared(model, tmp_path):
    return {
        "pretrained_model_name_or_path": str(model), "resolution": SIZE, "train_batch_size": 2, "max_train_steps": 2,
        "report_to": "none", "draw_samples": False, "lr_warmup_steps": 0, "learning_rate": 1e-1,
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def opened(folder, **options):
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False, **options)


def predicted(pipe, prompt=PROMPT):
    """The noise that a Diffusers pipeline predicts for a prompt."""
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        sizes = torch.tensor([[24.0, 20, 1, 2, SIZE, SIZE]])
        told = {"text_embeds": pooled, "time_ids": sizes}
        return pipe.unet(torch.ones(1, 4, 8, 8), torch.tensor(10), embeds, added_cond_kwargs=told).sample.numpy()


@pytest.mark.parametrize(("zeros", "negative"), [(True, ""), proof(False, ""), proof(True, "a seven")])
def test_pictures_are_those_of_diffusers(tmp_path, zeros, negative):
    """Those of an empty prompt to guide away from are zeros, where the pipeline says so."""
    model = stable_diffusion_xl(tmp_path / "model", force_zeros_for_empty_prompt=zeros)
    latents = torch.from_numpy(sampling_noise(3, np.arange(2), 0, (4, 12, 8)))
    pipe = opened(model)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "negative_prompt": negative}
    given = settings | {"negative_prompt": negative or None}  # none is given, and not an empty one
    expected = pipe(
        [PROMPT] * 2, latents=latents, height=24, width=SIZE, output_type="np", **given
    ).images  # fmt: skip
    for backend in BACKENDS.values():
        drawn = backend.generate.generate(
            model, prompt=[PROMPT], num_images=2, seed=3, height=24, width=SIZE, **settings
        )
        assert np.abs(drawn - np.round(expected * 255)).max() <= 1
    other = flax_diffusion.generate.generate(
        model, prompt=[PROMPT], num_images=2, seed=3, height=24, width=SIZE, **settings | {"guidance_scale": 1.0}
    )
    assert np.abs(other.astype(float) - expected * 255).max() > 1


@pytest.mark.parametrize("backend", [proof("jax"), "torch"])
def test_a_trained_pipeline_opens_in_diffusers(shared, tmp_path, model, backend):
    options = shared | {
        "train_data_dir": str(pictures(tmp_path / "data")), "validation_prompts": ["a dog"], "eval_batch_size": 1,
        "validation_num_inference_steps": 1, "proportion_empty_prompts": 0.5,
    }  # fmt: skip
    out = BACKENDS[backend].train.train("text_to_image", **options)
    index = json.loads((out / "model_index.json").read_text())
    theirs = json.loads((model / "model_index.json").read_text())
    assert index == {name: value for name, value in theirs.items() if name != "_diffusers_version"}
    pipe, base = opened(out), opened(model)
    for name in ("unet", "text_encoder", "text_encoder_2", "vae"):
        ours, given = getattr(pipe, name).state_dict(), getattr(base, name).state_dict()
        assert ours.keys() == given.keys()
        same = all(torch.equal(ours[key], given[key]) for key in given)
        assert same == (name != "unet")
    assert (pipe.tokenizer_2.pad_token, len(pipe.tokenizer_2)) == ("!", len(base.tokenizer_2))


def test_sizes_are_those_of_the_pixels(tmp_path, shared):
    """A picture whose colours are its coordinates says where it was cut, 200 times."""
    root, rng = tmp_path / "data", np.random.default_rng(0)
    root.mkdir()
    rows = []
    for number in range(200):
        height, width = rng.permutation([SIZE, int(rng.integers(SIZE, 200))]).tolist()  # nothing is resized
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"a {height} {width}"}))
    (root / "metadata.jsonl").write_text("\n".join(rows))
    flips = set()
    for options in ({"random_flip": True}, {"random_flip": True, "center_crop": True}, {}):
        task = task_of(TASKS["text_to_image"].config_class(**shared | {"train_data_dir": str(root)} | options))
        source = task.open_source()
        spec = task.make_spec(source)
        make = task.make_example_fn(spec)
        posteriors = {
            record.name: np.zeros((2, 2, 4, 8, 8), np.float32) for record in map(source.__getitem__, range(200))
        }
        cached = task.make_example_fn(spec, Precomputed(posteriors=posteriors))
        for index in range(200):
            example = make(source, 0, 1, index)
            x, y, _ = np.rint((example["pixel_values"] + 1) * 127.5).astype(int)
            _, height, width = source[index].caption.split()
            flipped = x[0, 0] > x[0, -1]
            flips.add(bool(flipped))
            left = int(width) - 1 - x[0, 0] if flipped else x[0, 0]
            expected = [int(height), int(width), y[0, 0], left, SIZE, SIZE]
            assert example["time_ids"].tolist() == expected
            assert example["time_ids"].dtype == np.float32
            np.testing.assert_array_equal(cached(source, 0, 1, index)["time_ids"], expected)
    assert flips == {True, False}


def test_the_size_told_is_that_before_resizing(tmp_path, shared):
    pictures(tmp_path / "data", 3, size=40)
    task = task_of(TASKS["text_to_image"].config_class(**shared | {"train_data_dir": str(tmp_path / "data")}))
    source = task.open_source()
    make = task.make_example_fn(task.make_spec(source))
    assert [make(source, 0, 0, index)["time_ids"][:2].tolist() for index in range(3)] == [[40, 40], [40, 41], [40, 42]]


ONE = [proof("jax"), "torch"]


@pytest.mark.parametrize("backend", ONE)
def test_lora_of_all_models(shared, folder, model, tmp_path, backend):
    out = BACKENDS[backend].train.train(
        "dreambooth", **shared, instance_data_dir=str(folder), instance_prompt=PROMPT, lora_rank=2, lora_alpha=3,
        train_text_encoder=True,
    )  # fmt: skip
    file = out / "pytorch_lora_weights.safetensors"
    parts = {name.partition(".")[0] for name in load_file(file)}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}
    pipe, base = opened(model), opened(model)
    pipe.load_lora_weights(out)
    expected = predicted(pipe)
    assert np.abs(expected - predicted(base)).max() > 1e-3
    np.testing.assert_allclose(
        predicted(opened(convert(model, tmp_path / "merged", lora=[str(out)]))), expected, atol=1e-5
    )
    kohya = convert(model, tmp_path / "kohya", lora=[str(out)], format="kohya")
    names = load_file(kohya / file.name)
    assert "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in names
    assert "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.alpha" in names
    again = convert(model, tmp_path / "again", lora=[str(kohya)])
    np.testing.assert_allclose(predicted(opened(again)), expected, atol=1e-5)
    draw = {"prompt": PROMPT, "num_inference_steps": 2}
    drawn = BACKENDS[backend].generate.generate(out, **draw)
    assert np.abs(drawn.astype(int) - BACKENDS[backend].generate.generate(tmp_path / "merged", **draw)).max() <= 1


@pytest.mark.acceptance
def test_a_word_for_both_text_encoders(shared, folder, model, tmp_path):
    out = flax_diffusion.train.train(
        "textual_inversion", **shared, train_data_dir=str(folder), placeholder_token="<Toy>", initializer_token="dog",
        num_vectors=2,
    )  # fmt: skip
    file = out / "learned_embeds.safetensors"
    state = load_file(file)
    assert {name: tuple(rows.shape) for name, rows in state.items()} == {"clip_l": (2, 16), "clip_g": (2, 24)}
    pipe = opened(model)
    prompt = "a photo of <toy>"
    before = predicted(pipe, prompt)
    pipe.load_textual_inversion({"<toy>": state["clip_l"]}, "<toy>")
    pipe.load_textual_inversion(
        {"<toy>": state["clip_g"]}, "<toy>", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
    )
    expected = predicted(pipe, prompt)
    assert np.abs(expected - before).max() > 1e-4
    made = opened(convert(model, tmp_path / "made", embeddings=[str(file)]))
    np.testing.assert_allclose(predicted(made, prompt), expected, atol=1e-5)
    draw = {"prompt": "a photo of <toy>", "num_inference_steps": 2}
    drawn = [BACKENDS[name].generate.generate(source, **draw, **more) for name in BACKENDS for source, more in (
        (out, {}), (model, {"embeddings": str(file)})
    )]  # fmt: skip
    for pictures_ in drawn[1:]:
        assert np.abs(pictures_.astype(int) - drawn[0]).max() <= 1


def test_a_single_file(model, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    file = convert(model, tmp_path / "single", format="single_file") / "model.safetensors"
    names = load_file(file)
    assert "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert names["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"].shape == (72, 24)
    assert names["conditioner.embedders.1.model.text_projection"].shape == (24, 12)
    assert names["model.diffusion_model.label_emb.0.0.weight"].shape == (32, 36)
    back = convert(model, tmp_path / "back", checkpoint=str(file))
    base = opened(model)
    for name in ("unet", "text_encoder", "text_encoder_2", "vae"):
        given, ours = getattr(base, name).state_dict(), getattr(opened(back), name).state_dict()
        assert all(torch.equal(given[key], ours[key]) for key in given)
    pipe = StableDiffusionXLPipeline.from_single_file(file, config=str(model), local_files_only=True)
    np.testing.assert_allclose(predicted(pipe), predicted(base), atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=pytest.mark.acceptance)])
def test_a_control_net(shared, tmp_path, backend):
    from diffusers import StableDiffusionXLControlNetPipeline

    data = paired_pictures(tmp_path / "data")
    followed = str(data / "conditioning" / "0.png")
    options = {"validation_prompts": ["a dog"], "validation_images": [followed], "validation_num_inference_steps": 1}
    out = BACKENDS[backend].train.train("controlnet", **shared, train_data_dir=str(data), **options)
    pipe = StableDiffusionXLControlNetPipeline.from_pretrained(out, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(sampling_noise(3, np.arange(1), 0, (4, 8, 8)))
    draw = {"num_inference_steps": 2, "guidance_scale": 3.0}
    image = Image.open(followed).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    expected = pipe(PROMPT, image=image, latents=latents, height=SIZE, width=SIZE, output_type="np", **draw).images
    drawn = BACKENDS[backend].generate.generate(out, prompt=PROMPT, conditioning_image=followed, seed=3, **draw)
    assert np.abs(drawn - np.round(expected * 255)).max() <= 1


@pytest.mark.acceptance
def test_an_inpainting_model(shared, model, tmp_path):
    from diffusers import StableDiffusionXLInpaintPipeline

    options = shared | {"train_data_dir": str(pictures(tmp_path / "data")), "inpainting": True}
    out = flax_diffusion.train.train("text_to_image", **options)
    pipe = StableDiffusionXLInpaintPipeline.from_pretrained(out, add_watermarker=False)
    assert pipe.unet.config.in_channels == 9
    again = options | {"pretrained_model_name_or_path": str(out), "output_dir": str(tmp_path / "again")}
    torch_backend.train.train("text_to_image", **again)
    with pytest.raises(UserError, match="it fills in pictures; add --inpainting"):
        flax_diffusion.train.train("text_to_image", **again | {"inpainting": False, "output_dir": str(tmp_path / "no")})


def test_from_scratch(tmp_path):
    """Its captions make both tokenizers, and what it guides away from is what it was trained on."""
    encoder = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
               "max_position_embeddings": 8}  # fmt: skip
    unet = {
        "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [8],
        "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"], "norm_num_groups": 4,
        "attention_head_dim": 2, "cross_attention_dim": 32, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 24 + 8,
    }  # fmt: skip
    options = {
        "pipeline": "StableDiffusionXLPipeline", "unet": unet, "text_encoder": encoder, "vae": None,
        "text_encoder_2": encoder | {"projection_dim": 8, "hidden_act": "gelu"}, "train_text_encoder": True,
        "dataset_name": "digits", "max_train_samples": 20, "resolution": 8, "max_train_steps": 1, "report_to": "none",
        "draw_samples": False,
        "lr_warmup_steps": 0, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    out = flax_diffusion.train.train("text_to_image", **options)
    spec = open_pipeline(str(out))
    assert spec.kind == "StableDiffusionXLPipeline"
    assert spec.setting("force_zeros_for_empty_prompt") is False
    assert set(spec.tokenize("a seven")) == {"input_ids", "input_ids_2"}
    for change, message in (
        ({"text_encoder_2": None}, "give --pretrained_model_name_or_path, or --text_encoder_2 to start from scratch"),
        (
            {"pipeline": "StableDiffusionXlPipeline"},
            "must be one of StableDiffusionPipeline, StableDiffusionXLPipeline",
        ),
        ({"pipeline": "StableDiffusionPipeline"}, "--text_encoder_2: a StableDiffusionPipeline has one text encoder"),
    ):
        with pytest.raises(ConfigError, match=message):
            flax_diffusion.train.train("text_to_image", **options | change | {"output_dir": str(tmp_path / "no")})


def spoilt_index(model, folder, **changes):
    import shutil

    shutil.copytree(model, folder)
    rewrite(folder / "model_index.json", **changes)
    return folder


NOTHING = [None, None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_encoder": NOTHING, "tokenizer": NOTHING},
            "only text_encoder_2: it is a refiner of Stable Diffusion XL",
        ),
        (
            {"text_encoder_2": NOTHING},
            "has no text_encoder_2, and Stable Diffusion XL needs both: use a whole pipeline",
        ),
    ],
)
def test_parts_that_are_missing(model, tmp_path, shared, backend, changes, message):
    source = spoilt_index(model, tmp_path / "spoilt", **changes)
    options = shared | {"pretrained_model_name_or_path": str(source), "train_data_dir": str(pictures(tmp_path / "d"))}
    with pytest.raises(WeightsError, match=message):
        BACKENDS[backend].train.train("text_to_image", **options)
    with pytest.raises(WeightsError, match=message):
        BACKENDS[backend].generate.generate(source, prompt=PROMPT)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"addition_embed_type": None}, "UNet with addition_embed_type None and addition_time_embed_dim 4"),
        (
            "unet",
            {"projection_class_embeddings_input_dim": 40},
            "input_dim 40: it must be 36, 6 times its addition_time",
        ),
        (
            "text_encoder",
            {"hidden_size": 20},
            "hidden_size 20 and 24, and UNet of cross_attention_dim 40: it must be 44",
        ),
        ("vae", {"latent_channels": 3}, "the VAE has 3 latent channels, the UNet takes 4"),
        ("unet", {"in_channels": 9}, "it fills in pictures; add --inpainting"),
    ],
)
def test_parts_that_do_not_go_together(model, tmp_path, shared, part, changes, message):
    source = spoilt_index(model, tmp_path / "spoilt")
    rewrite(source / part / "config.json", **changes)
    options = shared | {"pretrained_model_name_or_path": str(source), "train_data_dir": str(pictures(tmp_path / "d"))}
    with pytest.raises(UserError, match=message):
        flax_diffusion.train.train("text_to_image", **options)


def test_adapters_of_other_families(model, tmp_path, shared, folder):
    small = stable_diffusion(tmp_path / "small", length=40)
    runs = {}
    for name, base in (("xl", model), ("sd", small)):
        for task, options in (
            ("dreambooth", {"instance_data_dir": str(folder), "instance_prompt": PROMPT, "lora_rank": 2,
                            "train_text_encoder": True}),
            ("textual_inversion", {"train_data_dir": str(folder), "placeholder_token": "<toy>",
                                   "initializer_token": "dog"}),
        ):  # fmt: skip
            values = shared | options | {"pretrained_model_name_or_path": str(base), "max_train_steps": 1}
            values["output_dir"] = str(tmp_path / f"{name}-{task}")
            runs[name, task] = str(torch_backend.train.train(task, **values))
    for source, added, message in (
        (small, {"lora": [runs["xl", "dreambooth"]]}, "holds LoRA of Stable Diffusion XL, and the model has one text"),
        (
            model,
            {"lora": [runs["sd", "dreambooth"]]},
            "does not fit the model: .* give the model that it was trained on",
        ),
        (small, {"embeddings": [runs["xl", "textual_inversion"]]}, "clip_g and clip_l, a word of Stable Diffusion XL"),
        (model, {"embeddings": [runs["sd", "textual_inversion"]]}, "has clip_l and clip_g, one for each text encoder"),
    ):
        with pytest.raises(WeightsError, match=message):
            convert(source, tmp_path / "out", **added)
    single = convert(small, tmp_path / "single", format="single_file") / "model.safetensors"
    with pytest.raises(WeightsError, match=r"a checkpoint of Stable Diffusion .*: give a StableDiffusionPipeline"):
        convert(model, tmp_path / "out", checkpoint=str(single))


FLAGS = {
    "text_to_image": """
        adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 cache_dir caption_column center_crop
        checkpointing_steps checkpoints_total_limit dataloader_num_workers dataset_config_name dataset_name
        debug_loss enable_npu_flash_attention enable_xformers_memory_efficient_attention
        gradient_accumulation_steps gradient_checkpointing hub_model_id hub_token image_column
        image_interpolation_mode learning_rate local_rank logging_dir lr_scheduler lr_warmup_steps max_grad_norm
        max_train_samples max_train_steps mixed_precision noise_offset num_train_epochs num_validation_images
        output_dir prediction_type pretrained_model_name_or_path pretrained_vae_model_name_or_path
        proportion_empty_prompts push_to_hub random_flip rank report_to resolution resume_from_checkpoint
        revision scale_lr seed snr_gamma timestep_bias_begin timestep_bias_end timestep_bias_multiplier
        timestep_bias_portion timestep_bias_strategy train_batch_size train_data_dir train_text_encoder
        use_8bit_adam use_ema validation_epochs validation_prompt variant
    """,
    "dreambooth": """
        adam_beta1 adam_beta2 adam_epsilon adam_weight_decay adam_weight_decay_text_encoder allow_tf32 cache_dir
        caption_column center_crop checkpointing_steps checkpoints_total_limit class_data_dir class_prompt
        dataloader_num_workers dataset_config_name dataset_name do_edm_style_training
        enable_xformers_memory_efficient_attention gradient_accumulation_steps gradient_checkpointing
        hub_model_id hub_token image_column image_interpolation_mode instance_data_dir instance_prompt
        learning_rate local_rank logging_dir lora_dropout lr_num_cycles lr_power lr_scheduler lr_warmup_steps
        max_grad_norm max_train_steps mixed_precision num_class_images num_train_epochs num_validation_images
        optimizer output_dir output_kohya_format pretrained_model_name_or_path pretrained_vae_model_name_or_path
        prior_generation_precision prior_loss_weight prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup
        prodigy_use_bias_correction push_to_hub random_flip rank repeats report_to resolution
        resume_from_checkpoint revision sample_batch_size scale_lr seed snr_gamma text_encoder_lr
        train_batch_size train_text_encoder use_8bit_adam use_dora validation_epochs validation_prompt variant
        with_prior_preservation
    """,
    "textual_inversion": """
        adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 center_crop checkpointing_steps
        checkpoints_total_limit dataloader_num_workers enable_xformers_memory_efficient_attention
        gradient_accumulation_steps gradient_checkpointing hub_model_id hub_token initializer_token
        learnable_property learning_rate local_rank logging_dir lr_num_cycles lr_scheduler lr_warmup_steps
        max_train_steps mixed_precision num_train_epochs num_validation_images num_vectors output_dir
        placeholder_token pretrained_model_name_or_path push_to_hub repeats report_to resolution
        resume_from_checkpoint revision save_as_full_pipeline save_steps scale_lr seed train_batch_size
        train_data_dir use_8bit_adam validation_prompt validation_steps variant
    """,
    "controlnet": """
        adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 cache_dir caption_column
        checkpointing_steps checkpoints_total_limit conditioning_image_column controlnet_model_name_or_path
        crops_coords_top_left_h crops_coords_top_left_w dataloader_num_workers dataset_config_name dataset_name
        enable_npu_flash_attention enable_xformers_memory_efficient_attention gradient_accumulation_steps
        gradient_checkpointing hub_model_id hub_token image_column image_interpolation_mode learning_rate
        logging_dir lr_num_cycles lr_power lr_scheduler lr_warmup_steps max_grad_norm max_train_samples
        max_train_steps mixed_precision num_train_epochs num_validation_images output_dir
        pretrained_model_name_or_path pretrained_vae_model_name_or_path proportion_empty_prompts push_to_hub
        report_to resolution resume_from_checkpoint revision scale_lr seed set_grads_to_none tokenizer_name
        tracker_project_name train_batch_size train_data_dir use_8bit_adam validation_image validation_prompt
        validation_steps variant
    """,
}
"""Of Diffusers' scripts for SDXL, by the task that takes their place."""


@pytest.mark.parametrize(("task", "flag"), [(task, flag) for task, flags in FLAGS.items() for flag in flags.split()])
def test_flags_of_diffusers_scripts_are_taken_or_replaced(task, flag):
    if flag in command_line.fields_by_spelling(TASKS[task].config_class):
        return
    with pytest.raises(ConfigError, match=rf"^command line: unknown option '--{flag}': .*(drop it|give --)[^\n]*$"):
        command_line.parse_train([task, f"--{flag}", "1"], "train")


def test_its_own_resolution(model, tmp_path, shared, monkeypatch, caplog):
    """Where none is given; a warning says that few pixels are few."""
    given = {name: value for name, value in shared.items() if name != "resolution"} | {"train_data_dir": str(tmp_path)}
    make = TASKS["text_to_image"].config_class
    assert task_of(make(**given)).config.resolution == 1024
    assert task_of(make(**given, resolution=64)).config.resolution == 64
    small = stable_diffusion(tmp_path / "small")
    assert task_of(make(**given | {"pretrained_model_name_or_path": str(small)})).config.resolution == 512
    rewrite(spoilt_index(model, tmp_path / "large") / "unet/config.json", sample_size=40)
    options = given | {"pretrained_model_name_or_path": str(tmp_path / "large"), "resolution": 16}
    task_of(make(**options)).read_pipeline(list, None)
    assert "--resolution 16: the model was trained at 80 pixels" in caplog.text
