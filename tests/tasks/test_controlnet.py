"""ControlNet: its first weights, its data, its exports, a run that is resumed, and the flags of Diffusers' scripts."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from PIL import Image
from proofs import proof
from tiny import paired_pictures, pictures, stable_diffusion

import flax_diffusion.generate
import torch_backend.generate
from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.data.sources.opening import coarse_shape, open_source
from flax_diffusion.core.data.sources.source import ExtraImages
from flax_diffusion.core.errors import ConfigError, DataError, UserError, WeightsError
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.tasks.controlnet import ControlNetConfig
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.jax_backend.backend import JaxBackend
from torch_backend.backend import TorchBackend

BACKENDS = {"jax": JaxBackend, "torch": TorchBackend}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("model"), length=40)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return paired_pictures(tmp_path_factory.mktemp("data") / "pictures", 5)


@pytest.fixture
def options(model, data, tmp_path):
    return {
        "pretrained_model_name_or_path": str(model), "train_data_dir": str(data), "resolution": 16,
        "train_batch_size": 2, "learning_rate": 1e-2, "lr_warmup_steps": 0, "report_to": "none",
        "draw_samples": False, "max_train_steps": 4,
        "center_crop": False, "random_flip": True, "output_dir": str(tmp_path / "run"), "validation_epochs": None,
        "validation_steps": None,
    }  # fmt: skip


def example(options, index=0, epoch=0):
    task = task_of(ControlNetConfig(**options))
    source = task.open_source()
    return task.make_example_fn(task.make_spec(source))(source, 0, epoch, index)


def test_the_second_picture_is_cut_and_mirrored_like_the_first(options):
    """It is the negative of the first, in 0..1, where the first is in -1..1."""
    for epoch in range(6):
        made = example(options, 3, epoch)
        np.testing.assert_allclose(made["conditioning_pixel_values"], (1 - made["pixel_values"]) / 2, atol=2e-2)
    flipped = {example(options, 3, epoch)["pixel_values"].tobytes() for epoch in range(6)}
    assert len(flipped) > 2


def test_a_second_picture_of_another_size_keeps_its_place(options, data, tmp_path):
    small = shutil.copytree(data, tmp_path / "small")
    for path in (small / "conditioning").iterdir():
        with Image.open(path) as picture:
            larger = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
        larger.save(path)
    for epoch in range(4):
        made = example(options | {"train_data_dir": str(small)}, 4, epoch)
        apart = made["conditioning_pixel_values"] - (1 - made["pixel_values"]) / 2
        assert np.abs(apart).mean() < 0.1


def test_the_folder_of_the_second_pictures_may_be_elsewhere_or_inside(options, data, tmp_path):
    expected = example(options)["conditioning_pixel_values"]
    plain = pictures(tmp_path / "plain", 5)
    elsewhere = {"train_data_dir": str(plain), "conditioning_data_dir": str(data / "conditioning")}
    np.testing.assert_array_equal(example(options | elsewhere)["conditioning_pixel_values"], expected)
    shutil.copytree(data / "conditioning", plain / "edges")
    for path in (plain / "edges").iterdir():
        with Image.open(path) as picture:
            picture.save(path.with_suffix(".webp"), lossless=True)
        path.unlink()
    inside = elsewhere | {"conditioning_data_dir": str(plain / "edges")}
    np.testing.assert_array_equal(example(options | inside)["conditioning_pixel_values"], expected)
    (plain / "edges/2.webp").unlink()
    with pytest.raises(DataError, match=r"--conditioning_data_dir .*edges: 1 of 5 pictures in .* have none there: 2"):
        example(options | inside)


def test_mistakes_in_data_are_named(options, data, tmp_path):
    where = ExtraImages(column="edges", option="conditioning_image_column", folder_option="conditioning_data_dir")
    with pytest.raises(DataError, match=r"--conditioning_image_column is edges, but .* has the columns file_name"):
        open_source(train_data_dir=data, extra=where)
    bare = pictures(tmp_path / "bare", 2)
    (bare / "metadata.jsonl").unlink()
    for number in range(2):
        (bare / f"{number}.txt").write_text("a dog")
    with pytest.raises(DataError, match=r"has no metadata\.jsonl or metadata\.csv with a column edges_file_name; add"):
        open_source(train_data_dir=bare, extra=where)
    with pytest.raises(DataError, match="--conditioning_image_column is edges, but digits has the columns condition"):
        open_source(dataset_name="digits", extra=where)
    broken = shutil.copytree(data, tmp_path / "broken")
    (broken / "conditioning/3.png").unlink()
    with pytest.raises(DataError, match=r"names 1 files that do not exist: conditioning/3\.png"):
        example(options | {"train_data_dir": str(broken)})
    (broken / "conditioning/3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"conditioning/3\.png is not an image"):
        fit(task_of(ControlNetConfig(**options | {"train_data_dir": str(broken)})), TorchBackend)


def test_the_digits_have_their_coarse_shape():
    where = ExtraImages(column="conditioning_image", option="conditioning_image_column", folder_option="")
    source = open_source(dataset_name="digits", extra=where)
    shape, digit = source[7].extra.image, source[7].image
    np.testing.assert_array_equal(coarse_shape(digit[None])[0], shape)
    assert set(np.unique(shape)) == {0, 255}
    assert 0.1 < (shape > 0).mean() < 0.7


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_one_starts_as_diffusers_makes_it(options, model, backend):
    """Copies of the UNet's weights, zeros where the outputs are, and outputs that are zero."""
    task = task_of(ControlNetConfig(**options))
    spec = task.make_spec(task.open_source())
    made = BACKENDS[backend](task.config, spec)
    made.init_state()
    arrays = made.trained_arrays()
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    theirs = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=[16, 32])
    assert {f"controlnet/{name}" for name, _ in theirs.named_parameters()} == set(arrays)
    for name, parameter in theirs.named_parameters():
        own = arrays[f"controlnet/{name}"]
        if name.startswith("controlnet_cond_embedding") and "conv_out" not in name:
            assert own.shape == tuple(parameter.shape)
        else:
            np.testing.assert_array_equal(own, parameter.detach().numpy(), err_msg=name)


def test_both_backends_draw_the_same_first_weights(options):
    task = task_of(ControlNetConfig(**options))
    spec = task.make_spec(task.open_source())
    arrays = []
    for backend in BACKENDS.values():
        made = backend(task.config, spec)
        made.init_state()
        arrays.append(made.trained_arrays())
    for name, array in arrays[0].items():
        np.testing.assert_array_equal(array, arrays[1][name], err_msg=name)


def run(options, backend, folder, until=None, **more):
    def make(config, spec):
        made = BACKENDS[backend](config, spec)
        if until is not None:
            made.should_stop = lambda requested, step: step == until
        return made

    config = ControlNetConfig(**options | {"output_dir": str(folder), "checkpointing_steps": 4, "use_ema": True} | more)
    fit(task_of(config), make)
    return portable.read(folder / f"checkpoint-{until or 4}")


@pytest.mark.parametrize(
    ("backend", "cached"), [proof("jax", False), proof("jax", True), ("torch", False), ("torch", True)]
)
def test_resume_is_bitwise(options, tmp_path, backend, cached):
    if cached:
        options |= {"cache_latents": True, "center_crop": True, "pre_compute_text_embeddings": True}
    whole = run(options, backend, tmp_path / "whole")
    run(options, backend, tmp_path / "part", 2)
    rest = run(options, backend, tmp_path / "part", resume_from_checkpoint="latest")
    assert rest[0].keys() == whole[0].keys()
    assert all(name == "count" or name.split("/")[1] == "controlnet" for name in whole[0])
    for name, array in whole[0].items():
        np.testing.assert_array_equal(rest[0][name], array, err_msg=name)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.acceptance
def test_a_run_moves_between_backends_is_drawn_from_and_opens_in_diffusers(options, data, tmp_path):
    folder, picture = tmp_path / "moved", str(data / "conditioning/0.png")
    run(options, "torch", folder, 2)
    previewed = {"validation_prompts": ["a dog"], "validation_images": [picture, str(data / "1.png")]}
    previewed |= {"validation_num_inference_steps": 1, "eval_batch_size": 2, "draw_samples": True}
    run(options, "jax", folder, resume_from_checkpoint="latest", **previewed)
    assert (folder / "samples/00000004.png").is_file()
    drawn = {}
    for source in (folder, folder / "checkpoint-4"):
        for module in (flax_diffusion.generate, torch_backend.generate):
            asked = {"prompt": ["a dog", "a photo"], "num_inference_steps": 3, "num_images": 2, "guidance_scale": 3.0}
            drawn[source, module] = module.generate(source, conditioning_image=[picture], **asked).astype(int)
            other = module.generate(source, conditioning_image=str(data / "2.png"), **asked)
            assert (other != drawn[source, module]).any()
    first, *others = drawn.values()
    for other in others:
        assert np.abs(first - other).mean() < 1
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionControlNetPipeline"
    theirs = StableDiffusionControlNetPipeline.from_pretrained(folder)
    weights = dict(theirs.controlnet.named_parameters())
    for name, array in portable.read(folder / "checkpoint-4")[0].items():
        if name.startswith("ema/"):
            own = weights[name.removeprefix("ema/controlnet/")].detach().numpy()
            np.testing.assert_array_equal(own, array, err_msg=name)
    image = Image.open(picture).convert("RGB").resize((16, 16))
    theirs.set_progress_bar_config(disable=True)
    assert theirs("a dog", image=image, num_inference_steps=2, height=16, width=16).images[0].size == (16, 16)
    assert torch.any(theirs.controlnet.controlnet_mid_block.weight != 0)


def test_one_goes_on_from_a_pipeline_or_by_itself(options, model, tmp_path):
    run(options, "torch", tmp_path / "first")
    weights = {"pretrained_model_name_or_path": str(tmp_path / "first")}
    alone = {"controlnet_model_name_or_path": str(tmp_path / "first/controlnet")}
    for changes in (weights, alone):
        task = task_of(ControlNetConfig(**options | changes))
        part = task.make_spec(task.open_source()).components["controlnet"]
        assert (part.copied_from, part.is_trained) == (None, True)
        assert (tmp_path / "first/controlnet").samefile(f"{part.weights}/{part.subfolder or ''}")
    task = task_of(ControlNetConfig(**options | {"controlnet_model_name_or_path": str(tmp_path / "first")}))
    source = task.open_source()
    with pytest.raises(WeightsError, match=r"--controlnet_model_name_or_path .*first: is a whole pipeline; give its f"):
        task.make_spec(source)
    values = {"pretrained_model_name_or_path": str(tmp_path / "first"), "train_data_dir": options["train_data_dir"]}
    other = task_of(command_line.merge("text_to_image", {}, values, "test"))
    with pytest.raises(WeightsError, match="is a StableDiffusionControlNetPipeline, whose controlnet this task has no"):
        other.make_spec(open_source(dataset_name="digits"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioning_embedding_out_channels": [8, 16, 32]}, "divide pictures by 4, and 2 pixels per latent"),
        ({"block_out_channels": [16]}, r"ControlNet of block_out_channels \[16\] and UNet of block_out_channels \[8\]"),
        ({"conditioning_channels": 1}, "conditioning_channels 1: it must have 3"),
    ],
)
def test_a_controlnet_of_another_model_is_refused(options, model, tmp_path, changes, message):
    values = json.loads((model / "unet/config.json").read_text())
    config = {key: values[key] for key in ("in_channels", "block_out_channels", "layers_per_block")}
    config |= {
        "cross_attention_dim": 16,
        "conditioning_embedding_out_channels": [16, 32],
        "_class_name": "ControlNetModel",
    }
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(config | changes))
    task = task_of(ControlNetConfig(**options | {"controlnet_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(ConfigError, match=message):
        task.make_spec(task.open_source())


def test_conditioning_images_of_generate_are_checked(model, data, tmp_path, options):
    with pytest.raises(ConfigError, match="--conditioning_image: the model takes no such picture; drop it"):
        flax_diffusion.generate.generate(model, prompt="a dog", conditioning_image=str(data / "0.png"))
    run(options, "torch", tmp_path / "first")
    with pytest.raises(
        ConfigError, match="the model has a ControlNet: give the picture to follow by --conditioning_image"
    ):
        flax_diffusion.generate.generate(tmp_path / "first", prompt="a dog")
    with pytest.raises(ConfigError, match="--conditioning_image are 2, for 3 prompts: give one for each, or one for"):
        flax_diffusion.generate.generate(tmp_path / "first", prompt=["a"] * 3, conditioning_image=["0.png", "1.png"])
    with pytest.raises(DataError, match=r"--conditioning_image nowhere\.png: does not exist"):
        flax_diffusion.generate.generate(tmp_path / "first", prompt="a dog", conditioning_image="nowhere.png")


FLAX_FLAGS = """
    adam_beta1 adam_beta2 adam_epsilon adam_weight_decay cache_dir caption_column ccache checkpointing_steps
    conditioning_image_column controlnet_from_pt controlnet_model_name_or_path controlnet_revision
    dataloader_num_workers dataset_config_name dataset_name from_pt gradient_accumulation_steps hub_model_id hub_token
    image_column learning_rate load_from_disk local_rank logging_steps lr_scheduler max_grad_norm max_train_samples
    max_train_steps mixed_precision num_train_epochs output_dir pretrained_model_name_or_path profile_memory
    profile_steps profile_validation proportion_empty_prompts push_to_hub report_to resolution revision scale_lr seed
    snr_gamma streaming tokenizer_name tracker_project_name train_batch_size train_data_dir validation_image
    validation_prompt validation_steps variant wandb_entity
"""
TORCH_FLAGS = """
    allow_tf32 checkpoints_total_limit enable_xformers_memory_efficient_attention gradient_checkpointing logging_dir
    lr_num_cycles lr_power lr_warmup_steps num_validation_images resume_from_checkpoint set_grads_to_none use_8bit_adam
"""


@pytest.mark.parametrize("flag", f"{FLAX_FLAGS} {TORCH_FLAGS}".split())
def test_flags_of_diffusers_scripts_are_taken_or_replaced(flag):
    known = command_line.fields_by_spelling(ControlNetConfig)
    if flag in known:
        return
    with pytest.raises(ConfigError, match=rf"^command line: unknown option '--{flag}': (drop it|set the env)[^\n]+$"):
        command_line.parse_train(["controlnet", f"--{flag}", "1"], "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pretrained_model_name_or_path": None},
            "controlnet starts from a model: give --pretrained_model_name_or_path",
        ),
        ({"controlnet_revision": "v2"}, "--controlnet_revision goes with --controlnet_model_name_or_path"),
        ({"validation_prompts": ["a"]}, "--validation_images are 0 and --validation_prompts are 1"),
        (
            {"validation_prompts": ["a"] * 3, "validation_images": ["0", "1"]},
            "images are 2 and --validation_prompts are 3",
        ),
        ({"output_dir": "runs/{timestamp}"}, "a run that can be resumed has one name"),
    ],
)
def test_mistakes_in_options_are_named(options, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        command_line.merge("controlnet", {}, options | changes, "test")
