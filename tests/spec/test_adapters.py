"""LoRA, textual inversion and the autoencoder: what moves, what is written, what plain Diffusers makes of it."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import VAE, pictures, stable_diffusion

from flax_diffusion.convert import convert
from flax_diffusion.core.cli.command_line import build
from flax_diffusion.core.errors import CheckpointError, ConfigError, UserError, WeightsError
from flax_diffusion.core.io import model_files
from flax_diffusion.core.run import assembly
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.run.schedule.steps import make_schedule
from flax_diffusion.core.spec.adapters import EMBEDDINGS_FILE, LORA_FILE, Lora, lora_layers
from flax_diffusion.core.spec.pipeline import open_pipeline
from flax_diffusion.core.tasks.common.text import UNET_TARGETS
from flax_diffusion.core.tasks.task import TASKS, task_of
from flax_diffusion.core.tasks.textual_inversion import TEMPLATES
from flax_diffusion.jax_backend.backend import JaxBackend
from flax_diffusion.jax_backend.modules import build_modules, load_pretrained
from flax_diffusion.models import FlaxUNet2DConditionModel
from flax_diffusion.models.weights import torch_shapes
from flax_diffusion.train import train
from torch_backend.backend import TorchBackend

BACKENDS = pytest.mark.parametrize("backend", [JaxBackend, TorchBackend])
PROMPT = "a photo of sks dog"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("model"), length=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = pictures(tmp_path_factory.mktemp("new"), 3)
    (root / "metadata.jsonl").unlink()
    return root


@pytest.fixture
def shared(model, tmp_path):
    return {
        "pretrained_model_name_or_path": str(model), "resolution": 16, "train_batch_size": 2, "max_train_steps": 3,
        "draw_samples": False, "report_to": "none", "lr_warmup_steps": 0, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def lora(shared, folder, **options):
    return shared | {
        "instance_data_dir": str(folder), "instance_prompt": PROMPT, "lora_rank": 2, "lora_alpha": 3,
        "train_text_encoder": True, "learning_rate": 1e-2,
    } | options  # fmt: skip


def inversion(shared, folder, **options):
    return shared | {
        "train_data_dir": str(folder), "placeholder_token": "<dog-toy>", "initializer_token": "dog", "num_vectors": 2,
        "learning_rate": 1e-2,
    } | options  # fmt: skip


def theirs(pipe, prompt):
    """The noise that a Diffusers pipeline predicts for a prompt."""
    import torch

    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
        return pipe.unet(torch.ones(1, 4, 8, 8), torch.tensor(10), embeds).sample.numpy()


def ours(folder, prompt):
    """The same with the modules here."""
    spec = open_pipeline(str(folder))
    modules = build_modules(spec)
    params = {name: load_pretrained(part) for name, part in spec.components.items()}
    context = jax.jit(modules.condition)(params, spec.tokenize.stacked([prompt]))
    return np.asarray(jax.jit(modules.predict)(params, np.ones((1, 4, 8, 8), np.float32), np.array([10]), context))


@pytest.mark.parametrize("backend", [JaxBackend, pytest.param(TorchBackend, marks=pytest.mark.acceptance)])
def test_lora_in_plain_diffusers_and_merged(shared, folder, model, tmp_path, backend):
    from diffusers import StableDiffusionPipeline

    config = TASKS["dreambooth"].config_class(**lora(shared, folder, checkpointing_steps=2))
    out = fit(task_of(config), backend).output_dir
    assert not (out / "unet").exists()  # the model has not changed
    assert (out / "checkpoint-2" / LORA_FILE).is_file()
    pipe = StableDiffusionPipeline.from_pretrained(model)
    before = theirs(pipe, PROMPT)
    pipe.load_lora_weights(out)
    adapted = theirs(pipe, PROMPT)
    assert np.abs(adapted - before).max() > 1e-3
    merged = convert(model, tmp_path / "merged", lora=[str(out)])
    np.testing.assert_allclose(ours(merged, PROMPT), adapted, atol=1e-5)

    kohya = convert(model, tmp_path / "kohya", lora=[str(out)], format="kohya") / LORA_FILE
    names = set(model_files.read_safetensors(kohya))
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight" in names
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in names
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(kohya)
    np.testing.assert_allclose(theirs(pipe, PROMPT), adapted, atol=1e-5)
    again = convert(model, tmp_path / "again", lora=[str(kohya)])
    np.testing.assert_allclose(ours(again, PROMPT), adapted, atol=1e-5)


@BACKENDS
def test_lora_resumed_as_another(shared, folder, model, tmp_path, backend):
    values = lora(shared, folder, max_train_steps=1)
    fit(task_of(TASKS["dreambooth"].config_class(**values)), backend)
    another, moved = (shutil.copytree(model, tmp_path / name) for name in ("another", "moved"))
    file = another / "unet/diffusion_pytorch_model.safetensors"
    arrays = {name: tensor.array() * 2 for name, tensor in model_files.read_safetensors(file).items()}
    model_files.write_safetensors(file, arrays)
    again = values | {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    for changes, says in (
        ({"lora_alpha": 4}, "made with lora text_encoder alpha 3.0, this run has 4.0"),
        ({"lora_target_modules": ["to_q"]}, "made with lora unet targets .*'to_v'.*, this run has .'to_q'."),
        ({"train_text_encoder": False}, "made with lora text_encoder .*, this run has None"),
        (
            {"pretrained_model_name_or_path": str(another)},
            "base unet .* .the weights of the model that it adapts changed",
        ),
    ):
        with pytest.raises(CheckpointError, match=says):
            fit(task_of(build(TASKS["dreambooth"].config_class, again | changes, "test")), backend)
    changes = {"pretrained_model_name_or_path": str(moved)}
    fit(task_of(build(TASKS["dreambooth"].config_class, again | changes, "test")), backend)
    assert (Path(values["output_dir"]) / "checkpoint-2").is_dir()


def test_textual_inversion_resumed_from_another_word(shared, folder):
    fit(task_of(TASKS["textual_inversion"].config_class(**inversion(shared, folder, max_train_steps=1))), JaxBackend)
    again = {"max_train_steps": 2, "resume_from_checkpoint": "latest", "placeholder_token": "<dog-doll>"}
    with pytest.raises(CheckpointError, match=r"new_tokens text_encoder tokens .*<dog-toy>.*this run has .*<dog-doll>"):
        fit(task_of(TASKS["textual_inversion"].config_class(**inversion(shared, folder, **again))), JaxBackend)


@pytest.mark.acceptance
def test_lora_keeps_only_adapters_and_resumes_bitwise(shared, folder, tmp_path):
    def run(where, **options):
        made = []

        def make(config, spec):
            made.append(JaxBackend(config, spec))
            return made[-1]

        values = lora(shared, folder, lora_dropout=0.3, use_ema=True, max_train_steps=4)
        fit(task_of(TASKS["dreambooth"].config_class(**values | {"output_dir": str(tmp_path / where)} | options)), make)
        return made[-1].state_arrays()

    whole = run("whole")
    assert all(".lora_" in name for name in whole if "/" in name)
    run("part", max_train_steps=2)
    resumed = run("part", resume_from_checkpoint="latest")
    for name, array in whole.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)


@BACKENDS
def test_textual_inversion_in_plain_diffusers_and_merged(shared, folder, model, tmp_path, backend):
    from diffusers import StableDiffusionPipeline

    out = fit(task_of(TASKS["textual_inversion"].config_class(**inversion(shared, folder))), backend).output_dir
    (rows,) = (tensor.array() for tensor in model_files.read_safetensors(out / "learned_embeds.safetensors").values())
    merged = convert(model, tmp_path / "merged", embeddings=[str(out)])

    def table(root):
        tensors = model_files.read_safetensors(root / "text_encoder/model.safetensors")
        return next(tensors[name] for name in tensors if name.endswith("token_embedding.weight")).array()

    np.testing.assert_array_equal(table(merged)[:-2], table(model))  # only the new rows moved
    np.testing.assert_array_equal(table(merged)[-2:], rows)
    vocabulary = model_files.read_json(model / "tokenizer/tokenizer.json")["model"]["vocab"]
    moved = np.abs(rows - table(model)[vocabulary["dog</w>"]]).max(axis=1)
    assert (moved > 1e-3).all()

    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.load_textual_inversion(out)
    prompt = pipe.maybe_convert_prompt("a photo of <dog-toy>", pipe.tokenizer)
    assert prompt == "a photo of <dog-toy> <dog-toy>_1"
    np.testing.assert_allclose(ours(merged, prompt), theirs(pipe, "a photo of <dog-toy>"), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prompt_templates": ["one {}, drawn"]}, {"one <dog-toy>, drawn"}),
        ({"learnable_property": "style"}, {template.format("<dog-toy>") for template in TEMPLATES["style"]}),
    ],
)
def test_prompts_of_a_new_word(shared, folder, options, expected):
    source = task_of(TASKS["textual_inversion"].config_class(**inversion(shared, folder, **options))).open_source()
    assert {caption for index in range(len(source)) for caption in source[index].caption} == expected


def test_text_encoder_has_a_rate_of_its_own(shared, folder):
    """Adam's first update is the rate, in every weight that has a gradient."""
    config = TASKS["dreambooth"].config_class(**lora(shared, folder, text_encoder_learning_rate=1e-3))
    source = task_of(config).open_source()
    spec = task_of(config).make_spec(source)
    schedule = make_schedule(config, len(source), 1)
    with assembly.make_loader(task_of(config), spec, source, schedule, num_steps=1) as loader:
        (batch,) = loader
    made = TorchBackend(config, spec)  # that JAX does the same is for the parity tests
    made.init_state()
    made.train_step(made.put(batch), 1e-2, dict.fromkeys(config.averages, 0.0))
    for name, array in made.trained_arrays().items():
        if name.endswith("lora_B.weight"):  # it started from zero
            rate = 1e-3 if name.startswith("text_encoder") else 1e-2
            assert np.abs(array).max() == pytest.approx(rate, rel=0.05), name


def test_the_models_do_not_choose_the_version_of_peft(shared, folder, monkeypatch):
    """In their `add_adapter`, Diffusers and Transformers ask for versions of PEFT, even for some that are not out."""

    def refuse(min_version):
        raise ValueError(f"please use a version >= {min_version}")

    for library in ("diffusers.loaders", "transformers.integrations"):
        monkeypatch.setattr(f"{library}.peft.check_peft_version", refuse)
    config = TASKS["dreambooth"].config_class(**lora(shared, folder))
    made = TorchBackend(config, task_of(config).make_spec(task_of(config).open_source()))
    assert made.init_state() == sum(array.size for array in made.trained_arrays().values())
    trained = {(name.partition("/")[0], name.rpartition(".lora_")[2]) for name in made.trained_arrays()}
    halves = ("A.weight", "B.weight")
    assert trained == {(component, half) for component in ("unet", "text_encoder") for half in halves}


@BACKENDS
def test_autoencoder_brings_its_latents_to_unit_variance(folder, tmp_path, backend):
    import torch
    from diffusers import AutoencoderKL

    config = TASKS["autoencoder"].config_class(
        train_data_dir=str(folder), vae=VAE, resolution=16, train_batch_size=2, max_train_steps=4, rec_loss="l1",
        kl_scale=1e-4, lr_warmup_steps=0, learning_rate=1e-3, report_to="none", eval_batch_size=3,
        output_dir=str(tmp_path / "run"), use_ema=True,
    )  # fmt: skip
    out = fit(task_of(config), backend).output_dir
    assert (out / "samples/00000004.png").is_file()
    vae = AutoencoderKL.from_pretrained(out / "vae")
    source = task_of(config).open_source()
    make = task_of(config).make_example_fn(task_of(config).make_spec(source))
    examples = [make(source, 0, 0, index) for index in range(3)]
    pixels, noise = (torch.from_numpy(np.stack([e[key] for e in examples])) for key in ("pixel_values", "latent_noise"))
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    latents = posterior.mean + posterior.std * noise
    assert float(latents.std(correction=0)) * vae.config.scaling_factor == pytest.approx(1, abs=1e-4)


def autoencoder(folder, out, **options):
    return {
        "train_data_dir": str(folder), "vae": VAE, "resolution": 16, "train_batch_size": 2, "max_train_steps": 2,
        "lr_warmup_steps": 0, "report_to": "none", "eval_batch_size": 2, "output_dir": str(out),
    } | options  # fmt: skip


def test_autoencoder_keeps_the_scale_that_it_was_given(folder, tmp_path):
    """And its pictures of progress leave out what cannot be read, as the steps do."""
    with_bad = tmp_path / "pictures"
    shutil.copytree(folder, with_bad)
    (with_bad / "0.png").write_bytes(b"no picture")
    given = VAE | {"scaling_factor": 0.5}
    out = train("autoencoder", **autoencoder(with_bad, tmp_path / "run", vae=given, skip_bad_images=True))
    assert model_files.read_json(out / "vae/config.json")["scaling_factor"] == 0.5
    assert (out / "samples/00000002.png").is_file()


@pytest.mark.parametrize("given", ["neither", "both"])
def test_autoencoder_is_of_one_origin(folder, tmp_path, model, given):
    options = {"neither": {"vae": None}, "both": {"pretrained_model_name_or_path": str(model)}}[given]
    with pytest.raises(ConfigError, match="--vae"):
        train("autoencoder", **autoencoder(folder, tmp_path / "run", **options))


def test_adapters_of_another_run_are_guarded_and_deleted(shared, folder):
    train("textual_inversion", **inversion(shared, folder, max_train_steps=1))
    out = Path(shared["output_dir"])
    shutil.rmtree(out / "checkpoint-1")
    (out / "config.yaml").unlink()
    again = lora(shared, folder, max_train_steps=1)
    with pytest.raises(ConfigError, match="holds another run"):
        train("dreambooth", **again)
    train("dreambooth", **again, overwrite_output_dir=True)
    assert (out / LORA_FILE).is_file()
    assert not (out / EMBEDDINGS_FILE).exists()


def test_rank_4_is_under_2_percent_of_stable_diffusion(request, capsys):
    """By shapes alone, at full size."""
    config = request.config.rootpath / "tests/models/configs/sd15_unet.json"
    unet = FlaxUNet2DConditionModel.from_config(json.loads(config.read_text()))
    shapes = torch_shapes(unet.params_shape())
    layers = lora_layers(Lora(rank=4, alpha=4, targets=UNET_TARGETS), shapes, "unet")
    adapters = sum(4 * (rows + columns) for rows, columns in layers.values())
    full = sum(int(np.prod(shape)) for shape in shapes.values())
    with capsys.disabled():
        print(
            f"\nSD 1.5, LoRA rank 4: {adapters:,} of {full:,} parameters train ({adapters / full:.2%}); moments "
            f"{8 * adapters:,} bytes, checkpoint {12 * adapters:,} bytes"
        )
    assert adapters == 797_184  # as many as Diffusers' script trains
    assert adapters < 0.02 * full


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora_target_modules": ["to_qq"]}, "LoRA target 'to_qq' matches no layer of UNet2DConditionModel; did you"),
        ({"lora_target_modules": ["conv1"]}, "matches .*conv1 of UNet2DConditionModel, whose weight is .*linear"),
        ({"lora_rank": 99}, "--lora_rank 99 is over the size of"),
        ({"lora_rank": None}, "--lora_alpha goes with --lora_rank"),
    ],
)
@BACKENDS
def test_lora_that_does_not_fit(shared, folder, options, says, backend):
    with pytest.raises(ConfigError, match=says):
        fit(task_of(build(TASKS["dreambooth"].config_class, lora(shared, folder, **options), "test")), backend)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"placeholder_token": "dog"}, "--placeholder_token dog: is in the tokenizer's vocabulary already"),
        ({"initializer_token": "xylophone quartet"}, r"--initializer_token xylophone quartet: is \d+ tokens"),
        ({"validation_prompts": ["a photo"]}, "validation prompt 'a photo' lacks the new word <dog-toy>"),
        ({"prompt_templates": ["a photo"]}, "prompt template 'a photo': put {} into it once"),
        ({"prompt_templates": ["a photo of " * 15 + "{}"]}, "is cut off before the end of <dog-toy>, at the 40 tokens"),
        ({"initializer_token": None}, "textual_inversion needs --initializer_token"),
        ({"train_data_dir": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_inversion_that_cannot_be(shared, folder, options, says):
    with pytest.raises(UserError, match=says):
        train("textual_inversion", **inversion(shared, folder, **options))


def test_adapters_of_another_model(model, tmp_path):
    from safetensors.numpy import save_file

    save_file({"<x>": np.ones(5, np.float32)}, tmp_path / "narrow.safetensors")
    with pytest.raises(WeightsError, match="'<x>' has 5 features, this text encoder 16"):
        convert(model, tmp_path / "a", embeddings=[str(tmp_path / "narrow.safetensors")])
    half = {"unet.mid_block.nothing.to_q.lora_A.weight": np.ones((2, 16), np.float32)}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(WeightsError, match="has no second matrix"):
        convert(model, tmp_path / "b", lora=[str(tmp_path / "half.safetensors")])
    other = half | {"unet.mid_block.nothing.to_q.lora_B.weight": np.ones((16, 2), np.float32)}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"nothing\.to_q is no layer of the model"):
        convert(model, tmp_path / "c", lora=[str(tmp_path / "other.safetensors")])
