"""What a LoRA file says of itself, for the programs that list such files."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from tiny import pictures, stable_diffusion, stable_diffusion_xl

from flax_diffusion.convert import convert
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.model_files import read_safetensors, safetensors_metadata
from flax_diffusion.core.spec.pipeline import open_pipeline
from torch_backend.generate import generate
from torch_backend.train import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("model"))


@pytest.fixture
def options(model, tmp_path):
    folder = pictures(tmp_path / "data", 3)
    (folder / "metadata.jsonl").unlink()
    return {
        "pretrained_model_name_or_path": str(model), "instance_data_dir": str(folder), "instance_prompt": "a sks dog",
        "resolution": 16, "train_batch_size": 2, "max_train_steps": 1, "lr_warmup_steps": 0, "learning_rate": 1e-3,
        "lora_rank": 2, "snr_gamma": 5.0, "report_to": "none", "draw_samples": False,
        "output_dir": str(tmp_path / "my_dog"),
    }  # fmt: skip


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_header(options, model, form):
    file = train("dreambooth", **options, lora_format=form) / "pytorch_lora_weights.safetensors"
    header = safetensors_metadata(file)
    assert {key: text for key, text in header.items() if key.startswith("modelspec.")} == {
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers", "modelspec.title": "my_dog", "modelspec.resolution": "16x16",
        "modelspec.prediction_type": "epsilon", "modelspec.trigger_phrase": "a sks dog",
    }  # fmt: skip
    assert json.loads(header.pop("ss_tag_frequency")) == {"my_dog": {"a sks dog": 1}}
    assert {key: text for key, text in header.items() if key.startswith("ss_")} == {
        "ss_base_model_version": "sd_v1", "ss_gradient_accumulation_steps": "1", "ss_learning_rate": "0.001",
        "ss_lr_scheduler": "constant", "ss_lr_warmup_steps": "0", "ss_max_train_steps": "1", "ss_min_snr_gamma": "5.0",
        "ss_mixed_precision": "no", "ss_network_alpha": "2.0", "ss_network_dim": "2", "ss_noise_offset": "0.0",
        "ss_network_module": "networks.lora", "ss_num_train_images": "3", "ss_output_name": "my_dog",
        "ss_resolution": "(16, 16)", "ss_sd_model_name": model.name, "ss_seed": "0",
    }  # fmt: skip
    assert ("lora_adapter_metadata" in header) == (form == "peft")
    assert len(read_safetensors(file)) > 0
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.load_lora_weights(file)
    assert pipe.get_active_adapters()


def test_names_of_models(model, tmp_path):
    """As ModelSpec and sd-scripts name them."""

    def named(spec, width=None, **scheduler):
        parts = dict(spec.components)
        if width is not None:
            unet = parts["unet"]
            parts["unet"] = replace(unet, config=unet.config | {"cross_attention_dim": width})
        changed = replace(spec, components=parts, scheduler=dict(spec.scheduler) | scheduler)
        return changed.family.lora_base(changed)[:2]

    of_1 = open_pipeline(str(model))
    assert named(of_1) == ("stable-diffusion-v1", "sd_v1")
    assert named(of_1, 1024) == ("stable-diffusion-v2-512", "sd_v2")
    assert named(of_1, 1024, prediction_type="v_prediction") == ("stable-diffusion-v2-768-v", "sd_v2_v")
    of_xl = open_pipeline(str(stable_diffusion_xl(tmp_path)))
    assert named(of_xl) == ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")


def test_a_file_by_another_name(options, model, tmp_path):
    """Diffusers finds it in its folder, and so does what draws from the run; another run does not write over it."""
    out = train("dreambooth", **options | {"output_dir": str(tmp_path / "run")}, output_name="sks_dog").output_dir
    (file,) = out.glob("*.safetensors")
    assert file.name == "sks_dog.safetensors"
    header = safetensors_metadata(file)
    assert (header["modelspec.title"], header["ss_output_name"]) == ("sks_dog", "sks_dog")
    StableDiffusionPipeline.from_pretrained(model).load_lora_weights(out)
    how = {"prompt": "a sks dog", "num_images": 1, "num_inference_steps": 1}
    of_run, by_folder, by_file = (
        generate(out, **how),
        generate(model, lora=out, **how),
        generate(model, lora=file, **how),
    )
    np.testing.assert_array_equal(of_run, by_folder)
    np.testing.assert_array_equal(of_run, by_file)
    assert not np.array_equal(of_run, generate(model, **how))
    shutil.rmtree(out / "checkpoint-1")
    again = options | {"output_dir": str(out)}
    with pytest.raises(ConfigError, match="holds another run"):
        train("dreambooth", **again)
    train("dreambooth", **again, overwrite_output_dir=True)
    assert [path.name for path in out.glob("*.safetensors")] == ["pytorch_lora_weights.safetensors"]


def test_a_word_by_another_name(options, model):
    given = {name: value for name, value in options.items() if name not in ("instance_prompt", "lora_rank")}
    given["train_data_dir"] = given.pop("instance_data_dir")
    word = {
        "placeholder_token": "<dog>",
        "initializer_token": "dog",
        "output_name": "my_word",
        "prompt_templates": ["a {}"],
    }
    out = train("textual_inversion", **given, **word).output_dir
    assert [path.name for path in out.glob("*.safetensors")] == ["my_word.safetensors"]
    how = {"prompt": "a <dog>", "num_images": 1, "num_inference_steps": 1}
    np.testing.assert_array_equal(generate(out, **how), generate(model, embeddings=out, **how))


@pytest.mark.parametrize("name", ["a/b", "a b", "", "dog.safetensors"])
def test_names_that_are_none(options, name):
    with pytest.raises(ConfigError, match=r"--output_name: '.*': must be a name without folder, spaces and \.saf"):
        train("dreambooth", **options, output_name=name)
    with pytest.raises(ConfigError, match="--output_name goes with --lora_rank"):
        train("dreambooth", **options | {"lora_rank": None}, output_name="dog")


def test_a_copy_in_another_form_keeps_it(options, model, tmp_path):
    out = train("dreambooth", **options)
    header = safetensors_metadata(out / "pytorch_lora_weights.safetensors")
    copy = convert(model, tmp_path / "kohya", lora=[f"{out}:0.5"], format="kohya") / "pytorch_lora_weights.safetensors"
    kept = {key: text for key, text in header.items() if key.startswith(("modelspec.", "ss_"))}
    del kept["ss_network_alpha"]  # the strength is in the alphas
    assert len(kept) > 20
    assert safetensors_metadata(copy) == kept | {"format": "pt"}
