"""Folders of the last Flax release beside its plain pipeline: bfloat16, shards, other pipelines, every scheduler.

`flax_folders.zip` was written by Diffusers 0.39.0, Transformers 4.57.6, JAX 0.10.2 and Flax 0.12.8 with
`write_flax_folders.py`, which stands beside it and says what it holds.
"""

import json
import logging
import re
import shutil

import flax_folders
import ml_dtypes
import numpy as np
import pytest
import torch
from PIL import Image
from proofs import proof
from tiny import pictures

import flax_diffusion.generate
import flax_diffusion.train
import torch_backend.generate
import torch_backend.train
from flax_diffusion.convert import convert
from flax_diffusion.core.errors import ConfigError, UserError, WeightsError
from flax_diffusion.core.families import folders
from flax_diffusion.core.io.torch_names import to_torch_layout, torch_name
from flax_diffusion.core.objectives.samplers import sampler_config
from flax_diffusion.core.spec import weight_files
from flax_diffusion.core.spec.pipeline import open_pipeline, read_component
from flax_diffusion.jax_backend import modules as jax_modules
from flax_diffusion.models import (
    FlaxAutoencoderKL,
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
    FlaxPreTrainedModel,
    FlaxUNet2DConditionModel,
    weights,
)
from flax_diffusion.schedulers import scheduler_from_config
from torch_backend import modules as torch_modules
from torch_backend import sampling as torch_sampling

BACKENDS = {"jax": flax_diffusion, "torch": torch_backend}
RUN = {
    "resolution": 16, "train_batch_size": 2, "max_train_steps": 1, "lr_warmup_steps": 0, "report_to": "none",
    "draw_samples": False,
}  # fmt: skip
PARTS = {"unet": FlaxUNet2DConditionModel, "vae": FlaxAutoencoderKL, "text_encoder": FlaxCLIPTextModel}
DRAW = {"prompt": "a dog", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return flax_folders.unpack(tmp_path_factory.mktemp("release"))


@pytest.fixture
def own(release, tmp_path):
    """A copy of one of the folders, to be changed."""
    return lambda name: shutil.copytree(release / name, tmp_path / name)


def loaded(model, folder, part):
    """The parameters that a class reads; those in the manner of Transformers would keep them."""
    options = {"_do_init": False} if issubclass(model, FlaxPreTrainedModel) else {}
    return model.from_pretrained(folder, subfolder=part, **options)[1]


def arrays(params):
    return {name: np.asarray(array) for name, array in weights.to_torch(params)}


def rewrite(file, drop=(), **values):
    """Changes a JSON file."""
    old = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
    file.write_text(json.dumps(old | values))


def in_bfloat16(array):
    return torch.from_numpy(np.array(array)).to(torch.bfloat16).float().numpy()


@pytest.mark.parametrize("name", ["half", "safe"])
def test_weights_are_those_of_the_plain_pipeline(release, name):
    """In bfloat16 exactly the rounded ones, which float32 holds; whole, in shards, or in safetensors."""
    rounded = in_bfloat16 if name == "half" else np.array
    for part, model in PARTS.items():
        plain = arrays(loaded(model, release / "pipeline", part))
        jax_side = arrays(loaded(model, release / name, part))
        component = open_pipeline(str(release / name)).components[part]
        torch_side = torch_modules.load(component).named_parameters()
        theirs = {torch_modules.file_name(component.kind, key): value for key, value in torch_side}
        assert jax_side.keys() == plain.keys() == theirs.keys()
        for key, array in plain.items():
            assert jax_side[key].dtype == (ml_dtypes.bfloat16 if name == "half" else np.float32)
            np.testing.assert_array_equal(jax_side[key].astype(np.float32), rounded(array), err_msg=key)
            np.testing.assert_array_equal(theirs[key].detach().numpy().reshape(array.shape), rounded(array))


def test_which_files_are_read(release, own):
    """All shards and their index; a whole file comes before them, and safetensors before both."""
    encoder = own("half") / "text_encoder"
    names = {file.name for file in weight_files.files_of(encoder, "model")}
    assert names == {file.name for file in encoder.iterdir()} - {"config.json"}
    assert weight_files.fetch(encoder, None, None, "model", None) == encoder
    assert weight_files.read(encoder, "model")[1].name == "flax_model.msgpack.index.json"
    (encoder / "pytorch_model.bin").write_bytes(b"pickled, and never opened")
    for folder, file in (("pipeline", "flax_model.msgpack"), ("safe", "model.safetensors")):
        shutil.copyfile(release / folder / "text_encoder" / file, encoder / file)
        assert weight_files.read(encoder, "model")[1].name == file


def test_a_variant_is_not_looked_for_in_msgpack(own, caplog):
    """That release ignored the argument; here a warning says so."""
    unet = own("pipeline") / "unet"
    with caplog.at_level(logging.WARNING):
        FlaxUNet2DConditionModel.from_pretrained(unet, variant="bf16")
    assert "its diffusion_flax_model.msgpack is read, as Flax's files have no variant bf16" in caplog.text
    model, params = FlaxUNet2DConditionModel.from_pretrained(unet)
    model.save_pretrained(unet, params)
    with pytest.raises(WeightsError, match="set variant to match"):
        FlaxUNet2DConditionModel.from_pretrained(unet, variant="bf16")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [proof("half"), "safe", proof("img2img")])
def test_they_draw_and_train(release, tmp_path, name, backend, caplog):
    """Drawn from the same weights, pictures are the plain pipeline's; PyTorch opens what is written."""
    from diffusers import StableDiffusionPipeline

    model, module = str(release / name), BACKENDS[backend]
    with caplog.at_level(logging.WARNING):
        drawn = module.generate.generate(model, **DRAW)
    assert "is left out" not in caplog.text
    if name != "half":
        np.testing.assert_array_equal(drawn, module.generate.generate(str(release / "pipeline"), **DRAW))
    out = module.train.train(
        "text_to_image", pretrained_model_name_or_path=model, train_data_dir=str(pictures(tmp_path / "data")),
        output_dir=str(tmp_path / "run"), **RUN,
    )  # fmt: skip
    assert "Flax" not in (out / "model_index.json").read_text()
    assert type(StableDiffusionPipeline.from_pretrained(out).scheduler).__name__ == "PNDMScheduler"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("half", "StableDiffusionPipeline"),
        ("img2img", "StableDiffusionImg2ImgPipeline"),
        ("inpaint", "StableDiffusionInpaintPipeline"),
        ("controlnet", "StableDiffusionControlNetPipeline"),
    ],
)
def test_they_convert(release, tmp_path, name, kind):
    from diffusers import DiffusionPipeline

    out = convert(str(release / name), tmp_path / "out")
    made = DiffusionPipeline.from_pretrained(out, safety_checker=None)
    assert type(made).__name__ == kind
    assert "Flax" not in "".join(file.read_text() for file in out.rglob("*.json") if "tokenizer" not in file.parts)
    theirs = made.unet.state_dict()
    for key, array in arrays(FlaxUNet2DConditionModel.from_pretrained(release / name, subfolder="unet")[1]).items():
        np.testing.assert_array_equal(theirs[key].numpy(), array, err_msg=key)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_inpainting_model_fills_in(release, tmp_path, backend):
    model = str(release / "inpaint")
    for name, value in {"picture": "red", "mask": "white"}.items():
        Image.new("RGB", (24, 24), value).save(tmp_path / f"{name}.png")
    given = {"image": str(tmp_path / "picture.png"), "mask_image": str(tmp_path / "mask.png")}
    assert BACKENDS[backend].generate.generate(model, **DRAW, **given).shape[-1] == 3
    with pytest.raises(UserError, match="in_channels 9 and out_c"):
        BACKENDS[backend].train.train(
            "text_to_image", pretrained_model_name_or_path=str(release / "inpaint"), output_dir=str(tmp_path / "run"),
            train_data_dir=str(pictures(tmp_path / "data")), **RUN,
        )  # fmt: skip


def test_a_folder_of_sdxl_draws_and_trains(release, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    model = str(release / "xl")
    out = BACKENDS["torch"].train.train(
        "text_to_image", pretrained_model_name_or_path=model, output_dir=str(tmp_path / "run"),
        train_data_dir=str(pictures(tmp_path / "data")), **RUN,
    )  # fmt: skip
    StableDiffusionXLPipeline.from_pretrained(out, add_watermarker=False)
    drawn = [BACKENDS[name].generate.generate(model, **DRAW) for name in BACKENDS]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1


def test_parts_of_sdxl_open_by_the_classes(release):
    reference = dict(np.load(release / "xl/reference.npz"))
    encoder = FlaxCLIPTextModelWithProjection.from_pretrained(release / "xl", subfolder="text_encoder_2")
    found = encoder(reference["input_ids"])
    np.testing.assert_allclose(found.text_embeds, reference["text_embeds"], rtol=0, atol=4e-6)
    np.testing.assert_allclose(found.last_hidden_state, reference["hidden"], rtol=0, atol=4e-6)
    unet, _ = FlaxUNet2DConditionModel.from_pretrained(release / "xl", subfolder="unet")
    assert unet.config["addition_embed_type"] == "text_time"
    torch_modules.load(
        read_component(release / "xl/unet", "UNet2DConditionModel", str(release / "xl"), "unet", None, None)
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize(
    "name", ["DDIM", "PNDM", *map(proof, ("DDPM", "LMSDiscrete", "EulerDiscrete", "DPMSolverMultistep"))]
)
def test_every_scheduler_opens(own, release, tmp_path, name):
    """Both backends draw with it, and it is written as PyTorch's, which takes every key."""
    import diffusers

    model = own("pipeline")
    shutil.copytree(release / "schedulers" / name, model / "scheduler", dirs_exist_ok=True)
    ours, theirs = (
        module.generate.generate(str(model), **DRAW | {"num_inference_steps": 4}) for module in BACKENDS.values()
    )
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    written = json.loads((convert(str(model), tmp_path / "out") / "scheduler/scheduler_config.json").read_text())
    cls = getattr(diffusers, f"{name}Scheduler")
    assert written.pop("_class_name") == cls.__name__
    assert {key for key in written if not key.startswith("_")} <= set(cls().config)
    assert written.get("final_sigmas_type", None) == ("sigma_min" if name == "DPMSolverMultistep" else None)


@pytest.mark.parametrize("name", ["KarrasVe", "ScoreSdeVe"])
def test_schedulers_without_betas_are_refused(own, release, name):
    model = own("pipeline")
    shutil.copytree(release / "schedulers" / name, model / "scheduler", dirs_exist_ok=True)
    with pytest.raises(ConfigError, match=rf"scheduler {name}Scheduler: is not among those whose models train here"):
        open_pipeline(str(model))


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.mark.parametrize(
    ("config", "prediction_type"),
    [
        ({"_class_name": "PNDMScheduler", "_diffusers_version": "0.2.2", "skip_prk_steps": True}, "epsilon"),
        ({"_class_name": "DDIMScheduler", "tensor_format": "np", "timestep_values": None}, "epsilon"),
        ({"_class_name": "FlaxDDPMScheduler", "clip_sample": True, "predict_epsilon": True}, "epsilon"),
        ({"_class_name": "FlaxDPMSolverMultistepScheduler", "predict_epsilon": False}, "sample"),
    ],
)
def test_scheduler_configs_of_old_releases(tmp_path, config, prediction_type):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(BETAS | config))
    found = sampler_config(folders.read_scheduler(tmp_path))
    ours, theirs = scheduler_from_config(found), torch_sampling.scheduler_from_config(found)
    assert ours.config["prediction_type"] == theirs.config["prediction_type"] == prediction_type
    np.testing.assert_array_equal(ours.numpy_alphas_cumprod(), theirs.alphas_cumprod.numpy())


OLD_UNET = (
    "in_channels", "out_channels", "sample_size", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "attention_head_dim", "cross_attention_dim", "dropout",
)  # fmt: skip
"""The keys of a FlaxUNet2DConditionModel of Diffusers 0.5."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_folder_of_an_old_release(own, release, backend):
    """Its configs have fewer keys, and its index names classes that are gone."""
    model = own("pipeline")
    config = json.loads((model / "unet/config.json").read_text())
    rewrite(model / "unet/config.json", config.keys() - {*OLD_UNET, "_class_name"}, _diffusers_version="0.5.1")
    rewrite(model / "vae/config.json", ["scaling_factor"], _diffusers_version="0.5.1")
    rewrite(model / "text_encoder/config.json", dropout=0.0, torch_dtype="float32", _name_or_path="openai/clip")
    rewrite(
        model / "model_index.json", unet=["diffusers_flax", "FlaxUNet2DConditionModel"],
        safety_checker=["stable_diffusion", "FlaxStableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
    )  # fmt: skip
    drawn = BACKENDS[backend].generate.generate(str(model), **DRAW)
    np.testing.assert_array_equal(drawn, BACKENDS[backend].generate.generate(str(release / "pipeline"), **DRAW))


SHARD = "flax_model-00002-of-00003.msgpack"
INDEX = "flax_model.msgpack.index.json"


def cut(folder):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])


def pointer(folder):
    (folder / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 16522\n")


def integers(folder):
    from flax.serialization import msgpack_serialize

    tree = {"text_model": {"embeddings": {"token_embedding": {"embedding": np.zeros((514, 16), np.int32)}}}}
    (folder / SHARD).write_bytes(msgpack_serialize(tree))


def leads_out(folder):
    rewrite(folder / INDEX, weight_map={"text_model/embeddings": "../flax_model.msgpack"})


def lacks_some(folder):
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    rewrite(folder / INDEX, weight_map={key: name for key, name in names.items() if name != SHARD})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, rf"{SHARD} is not a whole Flax msgpack file"),
        (lambda folder: (folder / SHARD).unlink(), rf"{INDEX} names {SHARD}, which is missing: fetch the folder again"),
        (lambda folder: (folder / INDEX).unlink(), r"holds no model\.safetensors \(it holds flax_model-00001-of-00003"),
        (pointer, rf"{SHARD} is a pointer of Git LFS, without the weights: run `git lfs pull` in its folder"),
        (integers, r"text_model\.embeddings\.token_embedding\.weight holds int32, not floats"),
        (leads_out, rf"{INDEX} names .*\.\./flax_model\.msgpack.*, which is not a file next to it"),
        (lacks_some, r"missing text_model\.embeddings\.token_embedding\.weight"),
    ],
)  # fmt: skip
def test_damaged_shards(own, damage, says, backend):
    """One line that names the file, and what to do."""
    model = own("half")
    damage(model / "text_encoder")
    part = open_pipeline(str(model)).components["text_encoder"]
    load = torch_modules.load if backend == "torch" else jax_modules.load_pretrained
    with pytest.raises(WeightsError, match=says) as caught:
        load(part)
    assert "\n" not in str(caught.value)


def test_safetensors_in_linens_layout(tmp_path):
    """Every kind of parameter, and a leaf that none has."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    shapes = {"conv.kernel": (3, 3, 2, 4), "proj.kernel": (2, 5), "norm.scale": (4,), "words.embedding": (6, 2)}
    stored = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(stored | {"other": np.zeros(1, np.float32)}, tmp_path / "model.safetensors", {"format": "flax"})
    tensors, _ = weight_files.read(tmp_path, "model")
    assert tensors.pop("other").shape == (1,)
    for name, array in stored.items():
        where = name.split(".")
        tensor = tensors.pop(torch_name(where))
        np.testing.assert_array_equal(tensor.array(), to_torch_layout(where, array))
        assert tensor.shape == tensor.array().shape
    assert not tensors
    assert re.fullmatch(r"\(4, 2, 3, 3\)", str(weight_files.read(tmp_path, "model")[0]["conv.weight"].shape))
