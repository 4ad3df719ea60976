"""Pipeline folders: what they say they are, variants, the size that is exported, and defaults that are known early."""

import inspect
import logging
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from proofs import proof
from tiny import CONDITION_UNET, ONE_BLOCK, RUN, UNET, VAE, pictures, rewrite, stable_diffusion

import flax_diffusion.generate
import flax_diffusion.train
import torch_backend.generate
import torch_backend.train
from flax_diffusion import models
from flax_diffusion.core.checkpoints.folders import require_whole
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.errors import ConfigError, UserError, WeightsError
from flax_diffusion.core.families.family import FAMILIES, model_class
from flax_diffusion.core.io import model_files
from flax_diffusion.core.spec.adapters import LoraLayer, Overlay
from flax_diffusion.core.spec.pipeline import open_pipeline
from flax_diffusion.core.tasks.task import TASKS, task_of
from torch_backend import modules as torch_modules
from torch_backend.families.family import class_of

BACKENDS = {"jax": flax_diffusion, "torch": torch_backend}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("model"))


@pytest.fixture
def own_model(model, tmp_path):
    """One to change."""
    return shutil.copytree(model, tmp_path / "own")


@pytest.fixture
def folder(tmp_path):
    return str(pictures(tmp_path / "data"))


def text_run(model, folder, out, **options):
    return {
        "pretrained_model_name_or_path": str(model), "train_data_dir": folder, "resolution": 16, "train_batch_size": 2,
        "max_train_steps": 1, "lr_warmup_steps": 0, "report_to": "none", "output_dir": str(out),
    } | options  # fmt: skip


def lists(value):
    return list(value) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("kind", sorted({name for family in FAMILIES.values() for name in family.models}))
def test_defaults_that_are_known_early_are_those_of_the_models(kind):
    """Of the Flax class, and of Diffusers' and Transformers'."""
    known = model_class(kind).schema
    # The class of Transformers' face takes a config; its Linen module has the defaults.
    modules = {"CLIPTextModel": "FlaxCLIPTextModule", "CLIPTextModelWithProjection": f"Flax{kind}Module"}
    ours = getattr(models, modules.get(kind, f"Flax{kind}"))().config
    theirs = class_of(kind)
    if kind in modules:
        defaults = theirs.config_class().to_dict()
    else:
        defaults = {name: one.default for name, one in inspect.signature(theirs.__init__).parameters.items()}
    keys = [key for one in known.__mro__ for key in vars(one).get("__annotations__", {})]
    assert keys
    for key in keys:
        assert lists(getattr(known, key)) == lists(ours[key]) == lists(defaults[key]), key


LONE = {"_class_name": "UNet2DConditionModel"}
KINDS = {
    "StableDiffusionXLPipeline": "has no text_encoder_2, and Stable Diffusion XL needs both: use a whole pipeline",
    "FlaxStableDiffusionXLPipeline": "has no text_encoder_2, and Stable Diffusion XL needs both",
    "FluxPipeline": "is a FluxPipeline: use a Stable Diffusion 1.x or 2.x pipeline or one of Stable Diffusion XL",
    "DDPMPipeline": "is a DDPMPipeline: use a Stable Diffusion 1.x or 2.x pipeline",
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_pipeline_for_a_text_task(own_model, folder, tmp_path, kind):
    """It is what its index says, whatever its UNet looks like."""
    rewrite(own_model / "model_index.json", _class_name=kind)
    with pytest.raises(WeightsError, match=KINDS[kind]):
        task_of(TASKS["text_to_image"].config_class(**text_run(own_model, folder, tmp_path))).make_spec([])


def test_a_lone_model_for_a_pipeline(model, folder, tmp_path):
    config = TASKS["text_to_image"].config_class(**text_run(model / "unet", folder, tmp_path))
    with pytest.raises(WeightsError, match="is a UNet2DConditionModel by itself, not a pipeline: use a Stable Diff"):
        task_of(config).make_spec([])
    with pytest.raises(WeightsError, match="is a CLIPTextModel by itself, not a pipeline: use one of DDPMPipeline"):
        open_pipeline(str(model / "text_encoder"))


def test_a_text_pipeline_for_the_unconditional_task(model, folder, tmp_path):
    config = TASKS["unconditional"].config_class(**text_run(model, folder, tmp_path))
    with pytest.raises(WeightsError, match="is a StableDiffusionPipeline: use one of DDPMPipeline, DDIMPipeline"):
        task_of(config).make_spec([])


def test_a_pipeline_of_the_same_parts_is_taken(own_model, folder, tmp_path):
    rewrite(own_model / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline")
    task_of(TASKS["text_to_image"].config_class(**text_run(own_model, folder, tmp_path))).make_spec([])
    assert open_pipeline(str(own_model)).kind == "StableDiffusionPipeline"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_file_for_a_folder(tmp_path, folder, backend, name):
    file = tmp_path / name
    file.write_bytes(b"")
    with pytest.raises(WeightsError, match=r"is one file of weights.* flax_diffusion\.convert --model FOLDER --checkp"):
        BACKENDS[backend].train.train("text_to_image", **text_run(file, folder, tmp_path / "run"))
    with pytest.raises(WeightsError, match=r"is one file of weights.* flax_diffusion\.convert --model FOLDER --checkp"):
        BACKENDS[backend].generate.generate(file, prompt="a dog")


@pytest.fixture
def half(own_model):
    """A pipeline whose UNet has a variant, and nothing but that."""
    part = own_model / "unet/diffusion_pytorch_model.safetensors"
    part.rename(part.with_suffix(".fp16.safetensors"))
    return own_model


@pytest.mark.parametrize("backend", [proof("jax"), "torch"])
def test_a_variant_that_only_some_parts_have(model, half, folder, tmp_path, backend, caplog):
    options = {"prompt": "a dog", "num_inference_steps": 1}
    with caplog.at_level(logging.WARNING):
        drawn = BACKENDS[backend].generate.generate(half, variant="fp16", **options)
    for part in ("text_encoder", "vae"):
        assert f"{part}: has no weights of variant fp16; its others are read" in caplog.text
    assert "unet: has no" not in caplog.text
    np.testing.assert_array_equal(drawn, BACKENDS[backend].generate.generate(model, **options))
    out = BACKENDS[backend].train.train("text_to_image", **text_run(half, folder, tmp_path / "run", variant="fp16"))
    assert (out / "vae/diffusion_pytorch_model.safetensors").is_file()


def test_a_variant_that_no_part_has(model, folder, tmp_path):
    with pytest.raises(WeightsError, match=r"--variant fp61: no weights of .* have it: drop it, or check the name"):
        open_pipeline(str(model), variant="fp61")
    config = TASKS["text_to_image"].config_class(**text_run(model, folder, tmp_path, variant="fp61"))
    with pytest.raises(WeightsError, match="--variant fp61: no weights of"):
        task_of(config).make_spec([])


def test_names_of_files_on_the_hub(monkeypatch, tmp_path):
    """Asked for without a download; where the Hub cannot be reached, what its cache has."""
    import huggingface_hub
    from huggingface_hub.errors import DryRunError

    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text("{}")
    online = [True]

    def snapshot_download(name, revision=None, allow_patterns=None, dry_run=False):
        assert name == "owner/model"
        if not dry_run:
            return str(tmp_path)
        if not online[0]:
            raise DryRunError
        names = ["unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
        assert allow_patterns == ["unet/*"]
        return [type("File", (), {"filename": name}) for name in names]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert model_files.file_names("owner/model", "unet") == ["config.json", "diffusion_pytorch_model.fp16.safetensors"]
    online[0] = False
    assert model_files.file_names("owner/model", "unet") == ["config.json"]


def test_what_the_hub_refuses(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    answer: Any = SimpleNamespace(headers={}, request=None)
    for error, says in (
        (
            RevisionNotFoundError("no", response=answer),
            r"^owner/model has no revision 'v9' on the Hub: check its branches$",
        ),
        (
            RepositoryNotFoundError("no", response=answer),
            "^owner/model is neither a folder nor a repository on the Hub that you",
        ),
    ):

        def refuse(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(WeightsError, match=says):
            model_files.resolve("owner/model", "unet", "v9")


def test_files_that_are_not_what_their_names_say(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(WeightsError, match=r"config\.json holds a list, not a JSON object: fetch the file again$"):
        model_files.read_json(tmp_path / "config.json")
    header = b'{"a":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    tensor = model_files.read_safetensors(tmp_path / "model.safetensors")["a"]
    with pytest.raises(WeightsError, match=r"model\.safetensors: a cannot be read \(.*\): save it as float32$"):
        tensor.array()


def test_what_differs_must_fit_the_weights():
    table = {"text_model.embeddings.token_embedding.weight": np.zeros((9, 4), np.float32)}
    with pytest.raises(
        WeightsError, match=r"^m: its embedding table is \(9, 4\), and the new words are of 5 features b"
    ):
        Overlay(rows=np.zeros((1, 5), np.float32), first=9).apply(table, "m")
    layer = LoraLayer(down=np.zeros((2, 3), np.float32), up=np.zeros((3, 2), np.float32), alpha=1.0)
    with pytest.raises(WeightsError, match=r"^m: has no to_q.weight of the size that the LoRA has: use its own model$"):
        Overlay(loras=(({"to_q": layer}, 1.0),)).apply(table, "m")


def test_a_weights_file_on_the_hub(monkeypatch, tmp_path):
    """A repository, its folder or its file, as users of Diffusers name a LoRA; only that file is downloaded."""
    import huggingface_hub

    here = ("a.safetensors", "sub/pytorch_lora_weights.safetensors", "sub/b.bin")
    asked = []

    def snapshot_download(name, revision=None, allow_patterns=None, dry_run=False):
        assert name == "owner/dog.v1"
        if dry_run:
            return [type("File", (), {"filename": one}) for one in here if fnmatch(one, allow_patterns[0])]
        asked.append(allow_patterns)
        for one in here:
            if any(fnmatch(one, pattern) for pattern in allow_patterns):
                (tmp_path / one).parent.mkdir(exist_ok=True)
                (tmp_path / one).write_text(one)
        (tmp_path / "sub").mkdir(exist_ok=True)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    def read(name):
        return model_files.weights_file(Path(name), "--lora", ("pytorch_lora_weights.safetensors",)).read_text()

    assert read("owner/dog.v1/a.safetensors") == "a.safetensors"
    assert read("owner/dog.v1/sub") == here[1]
    assert asked == [
        ["a.safetensors", "*.json"],
        [f"sub/{one}" for one in ("pytorch_lora_weights.safetensors", "*.json")],
    ]
    for name, says in (
        ("owner/dog.v1", r"--lora owner/dog.v1 holds no pytorch_lora.*; it holds a\.safetensors.*: name the file"),
        ("owner/dog.v1/c.safetensors", r"holds no c\.safetensors; it holds a\.safetensors"),
        ("owner/dog.v1/sub/b.bin", "is pickled"),
        ("dog/a.safetensors", r"--lora dog/a\.safetensors does not exist: check the path"),
        ("../owner/dog.v1", "does not exist: check the path"),
    ):
        with pytest.raises(WeightsError, match=says):
            read(name)


@pytest.mark.parametrize("backend", [proof("jax"), "torch"])
def test_a_pipeline_draws_what_it_was_trained_at(model, folder, tmp_path, backend):
    """The model was made for 16 pixels, or 8 latents. The VAE does not train, so its own size stays."""
    out = BACKENDS[backend].train.train(
        "text_to_image", **text_run(model, folder, tmp_path / "run", resolution=32, checkpoint_models=True)
    )
    for unet in (out / "unet", out / "checkpoint-1/unet"):
        assert model_files.read_json(unet / "config.json")["sample_size"] == 16
    assert model_files.read_json(out / "vae/config.json")["sample_size"] == 16
    for other in BACKENDS.values():
        assert other.generate.generate(out, prompt="a dog", num_inference_steps=1).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_size_in_a_config_from_scratch_gives_way(tmp_path, backend):
    unet = UNET | ONE_BLOCK | {"sample_size": 64}
    run = RUN | {"unet": unet, "max_train_steps": 1, "eval_batch_size": 1, "report_to": "none", "draw_samples": False}
    out = BACKENDS[backend].train.train("unconditional", output_dir=str(tmp_path), **run)
    assert model_files.read_json(out / "unet/config.json")["sample_size"] == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_autoencoder_of_another_size(model, folder, tmp_path, backend):
    options = text_run(model, folder, tmp_path / "run", resolution=32)
    out = BACKENDS[backend].train.train("autoencoder", **options)
    assert model_files.read_json(out / "vae/config.json")["sample_size"] == 32


def test_where_an_autoencoder_comes_from(own_model, folder, tmp_path):
    """A pipeline's `vae`, the `vqvae` of one on latents, or an autoencoder by itself."""

    def opened(source):
        return task_of(TASKS["autoencoder"].config_class(**text_run(source, folder, tmp_path / "run"))).make_spec([])

    assert opened(own_model).components["vae"].subfolder == "vae"
    assert opened(own_model / "vae").components["vae"].subfolder is None
    (own_model / "vae").rename(own_model / "vqvae")
    rewrite(own_model / "model_index.json", vae=[None, None], vqvae=["diffusers", "AutoencoderKL"])
    assert opened(own_model).components["vae"].subfolder == "vqvae"
    rewrite(own_model / "model_index.json", vqvae=[None, None])
    with pytest.raises(WeightsError, match="is a StableDiffusionPipeline without an autoencoder: name a pipeline that"):
        opened(own_model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_copy_of_an_autoencoder_has_its_measured_scale(folder, tmp_path, backend):
    options = text_run(None, folder, tmp_path / "run", vae=VAE, max_train_steps=4, learning_rate=1e-2)
    options |= {"checkpoint_models": True, "checkpointing_steps": 2, "eval_batch_size": 2}
    del options["pretrained_model_name_or_path"]
    out = BACKENDS[backend].train.train("autoencoder", **options)
    places = (out / "checkpoint-2", out / "checkpoint-4", out)
    scales = [model_files.read_json(at / "vae/config.json")["scaling_factor"] for at in places]
    assert scales[1] == scales[2]
    assert scales[0] != scales[1]
    assert 0.18215 not in scales
    for at in places[:2]:
        require_whole(at)


def test_options_of_a_scheduler_that_is_not_ours_to_choose(folder, tmp_path, model):
    with pytest.raises(ConfigError, match="--ddpm_beta_schedule: must be 'linear'"):
        command_line.parse_train(
            ["unconditional", "--dataset_name", "digits", "--ddpm_beta_schedule", "cosine"], "train"
        )
    for name, value in (("ddpm_beta_schedule", "sigmoid"), ("ddpm_num_steps", 10)):
        own = {"noise_scheduler": {"beta_end": 0.01}}
        for owner, given in (
            ("pretrained_model_name_or_path", {}),
            ("noise_scheduler", own | {"unet": CONDITION_UNET, "text_encoder": {}, "vae": None}),
        ):
            options = text_run(model, folder, tmp_path, **given, **{name: value}, train_text_encoder=True)
            if given:
                del options["pretrained_model_name_or_path"]
            with pytest.raises(ConfigError, match=f"--{name} {value} is for a scheduler that we choose, and --{owner}"):
                command_line.build(TASKS["text_to_image"].config_class, options, "train")


def test_a_mapping_on_the_command_line_is_yaml_too():
    for text, value in (("{in_channels: 3}", {"in_channels": 3}), ('{"norm_eps":1e-4}', {"norm_eps": 1e-4})):
        words = ["unconditional", "--dataset_name", "digits", "--unet", text]
        assert command_line.parse_train(words, "train")[1].unet == value


def test_weights_that_do_not_fit_are_listed_on_pytorch(own_model):
    from safetensors.torch import load_file, save_file

    file = own_model / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"] = torch.zeros(3)
    tensors["extra.weight"] = tensors.pop("conv_out.bias")
    tensors["conv_norm_out.weight"] = tensors["conv_norm_out.weight"].int()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        torch_modules.load(open_pipeline(str(own_model)).components["unet"])
    for part in (
        "missing conv_out.bias",
        "unexpected extra.weight",
        "misshapen conv_in",
        "conv_norm_out.weight holds int32",
    ):
        assert part in str(caught.value)
