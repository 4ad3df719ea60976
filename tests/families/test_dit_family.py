"""Training and drawing by the class-conditional families on both backends, and the pipeline folders that result."""

import json
from dataclasses import replace
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import torch
from eight_devices import EIGHT
from safetensors.numpy import load_file
from tiny import RUN, UNET, VAE

from flax_diffusion.convert import convert
from flax_diffusion.core.data.batches import CLASS_LABELS
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.families.dit import DIT_TRANSFORMER
from flax_diffusion.core.run import assembly
from flax_diffusion.core.run.schedule.steps import make_schedule
from flax_diffusion.core.spec import writing
from flax_diffusion.core.spec.pipeline import Component, PipelineSpec, Training, open_pipeline
from flax_diffusion.core.tasks.class_conditional import ClassConditionalConfig
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.jax_backend.backend import JaxBackend
from flax_diffusion.jax_backend.modules import load_pretrained
from flax_diffusion.models.weights import to_torch
from flax_diffusion.parity import NO_GRADIENT, difference
from torch_backend.backend import TorchBackend
from torch_backend.modules import load
from torch_backend.names import file_name

DIT = {
    "in_channels": 1, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_embeds_ada_norm": 10,
}  # fmt: skip
STEPS = 4
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "epsilon": (DIT, {"gradient_accumulation_steps": 2}),
    "flow": (DIT | {"patch_size": 4}, {"objective": "flow_matching"}),
    "learned_variance": (DIT | {"out_channels": 2}, {"variance_loss_weight": 0.001}),
    "options": (DIT | {"qk_norm": True, "rotary": True, "rms_norm": True, "activation_fn": "swiglu"}, {}),
    "checkpointed": (DIT, {"gradient_checkpointing": True}),
}


def made(transformer: dict[str, Any] | None, **options: Any) -> tuple[Any, Any, PipelineSpec]:
    """Options, task and pipeline of a run on digits."""
    given = RUN | {"unet": None, "transformer": transformer, "use_ema": True, "max_train_steps": STEPS}
    config = ClassConditionalConfig(**given | {"class_dropout_prob": 0.3} | options)
    task: Any = task_of(config)
    return config, task, task.make_spec(task.open_source())


def batches(
    config: Any, task: Any, spec: PipelineSpec, dtype: str = "float64", devices: int = 1
) -> list[dict[str, Any]]:
    source = task.open_source()
    schedule = make_schedule(config, len(source), devices)
    with assembly.make_loader(task, spec, source, schedule, num_steps=STEPS, dtype=dtype) as loader:
        return list(loader)


def trained(backend: Any, given: list[dict[str, Any]]) -> tuple[list[float], dict[str, np.ndarray]]:
    backend.init_state()
    losses = [backend.read(backend.train_step(backend.put(batch), 1e-2, {"ema": 0.9}))["loss"] for batch in given]
    return losses, backend.state_arrays()


@pytest.mark.parametrize("name", VARIANTS)
def test_backends_agree(name: str) -> None:
    transformer, options = VARIANTS[name]
    with jax.enable_x64(True):
        config, task, spec = made(transformer, **options)
        given = batches(config, task, spec)
        ours, state = trained(JaxBackend(config, spec, jax.devices()[:1], np.float64), given)
        theirs, other = trained(TorchBackend(config, spec, torch.float64), given)
    np.testing.assert_allclose(theirs, ours, rtol=1e-10)
    assert state.keys() == other.keys()
    assert [key for key in state if "norm1.emb.class_embedder" in key and key.startswith("params")] == [
        "params/transformer/transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    ]
    for kind in ("params", "ema", "mu", "nu"):
        assert difference(state, other, kind) < 1e-9
    assert ours[-1] != ours[0]


@pytest.mark.parametrize("gather", ["step", "block"])
def test_eight_devices_equal_one(gather: str) -> None:
    wide = DIT | {"num_attention_heads": 8, "qk_norm": True}
    config, task, spec = made(wide, global_batch_size=16, fsdp_parallelism=4, data_parallelism=2, fsdp_gather=gather)
    given = batches(config, task, spec, "float32", 8)
    losses, state = trained(JaxBackend(config, spec, EIGHT), given)
    alone, other = trained(JaxBackend(made(wide, global_batch_size=16)[0], spec, EIGHT[:1]), given)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    assert difference(state, other, "params", NO_GRADIENT) < 1e-4


@pytest.mark.parametrize("objective", ["ddpm", "edm"])
def test_class_conditional_unets_agree(objective: str) -> None:
    with jax.enable_x64(True):
        config, task, spec = made(None, unet=UNET, objective=objective)
        assert (spec.denoiser["num_class_embeds"], spec.null_class) == (11, 10)
        given = batches(config, task, spec)
        ours, state = trained(JaxBackend(config, spec, jax.devices()[:1], np.float64), given)
        theirs, other = trained(TorchBackend(config, spec, torch.float64), given)
    np.testing.assert_allclose(theirs, ours, rtol=1e-10)
    assert difference(state, other, "params") < 1e-9
    table = state["params/unet/class_embedding.weight"]
    assert np.abs(table - state["ema/unet/class_embedding.weight"]).max() > 0


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, PipelineSpec]:
    """A run in the latents of a small autoencoder, of a model with learned variance."""
    folder = tmp_path_factory.mktemp("vae")
    config = VAE | {"in_channels": 1, "out_channels": 1}
    diffusers.AutoencoderKL(**config).save_pretrained(folder)  # pyright: ignore[reportPrivateImportUsage]
    options, task, _ = made(DIT, resolution=16)
    parts = {
        "transformer": Component(
            kind=DIT_TRANSFORMER.name, config=DIT | {"in_channels": 4, "out_channels": 8}, training=Training.ALL
        ),
        "vae": Component(kind="AutoencoderKL", config=config, weights=str(folder)),
    }
    spec = replace(task.pipeline("DiTPipeline", parts), classes=("zero, nought", "one", *"23456789"))
    return options, spec


def test_pipelines_are_opened_by_diffusers(latent: Any, tmp_path: Any) -> None:
    config, spec = latent
    assert (spec.sample_shape, spec.size_factor, spec.denoiser["sample_size"]) == ((4, 8, 8), 4, 8)
    written = {}
    for name, backend in (("jax", JaxBackend(config, spec)), ("torch", TorchBackend(config, spec))):
        backend.init_state()
        backend.export(tmp_path / name)
        writing.write_index(spec, tmp_path / name)
        pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / name)  # pyright: ignore[reportPrivateImportUsage]
        assert pipeline.labels == {"nought": 0, "one": 1, "zero": 0} | {str(number): number for number in range(2, 10)}
        assert pipeline.transformer.config.out_channels == 8
        written[name] = pipeline.transformer.state_dict()
        made_here = pipeline(class_labels=[1], num_inference_steps=1, guidance_scale=1.0, output_type="np").images
        assert made_here.shape == (1, 16, 16, 1)
        again = open_pipeline(str(tmp_path / name))
        assert (again.sample_shape, again.classes, again.vae_factor) == (spec.sample_shape, spec.classes, 2)
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    assert written["jax"].keys() == written["torch"].keys()
    for key, value in written["jax"].items():
        np.testing.assert_array_equal(written["torch"][key].numpy(), value.numpy())


@pytest.mark.parametrize("weight", [0.0, 0.001])
def test_a_variance_is_trained_where_asked(weight: float) -> None:
    config, task, spec = made(DIT | {"out_channels": 2}, variance_loss_weight=weight)
    backend = JaxBackend(config, spec, jax.devices()[:1])
    given = batches(config, task, spec, "float32")
    assert ("variance_weights" in given[0]) == bool(weight)
    _, state = trained(backend, given)
    bias = state["params/transformer/proj_out_2.bias"].reshape(2, 2, 2)  # a patch of 2 by 2 pixels
    assert np.all(bias[..., 0] != 0)
    assert np.all(bias[..., 1] != 0) == bool(weight)


def test_pictures_are_drawn_with_the_learnt_variance() -> None:
    """Which is guided on neither backend."""
    pictures = {}
    for kind in ("learned_range", "fixed_small"):
        scheduler = {"_class_name": "DDPMScheduler", "variance_type": kind, "timestep_spacing": "trailing"}
        config, _, spec = made(DIT | {"out_channels": 2}, noise_scheduler=scheduler)
        ours, theirs = JaxBackend(config, spec, jax.devices()[:1]), TorchBackend(config, spec)
        for backend in (ours, theirs):
            backend.init_state()
        rng = np.random.default_rng(5)
        weights = {
            "transformer": jax.tree.map(
                lambda leaf, rng=rng: np.asarray(rng.normal(size=leaf.shape), np.float32) * 0.2,
                ours.state.params["transformer"],
            )
        }
        ours.state = ours.state.replace(params=weights)
        module = theirs.modules.by_name["transformer"]
        arrays = _by_memory_name(weights["transformer"], module)
        module.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
        options = {"prompts": ["3"], "num_images": 2, "num_inference_steps": 6, "guidance_scale": 2.0, "seed": 1}
        pictures[kind] = ours.sample(**options)
        assert np.abs(pictures[kind].astype(int) - theirs.sample(**options)).max() <= 1
    assert np.any(pictures["learned_range"] != pictures["fixed_small"])


@pytest.mark.parametrize("backend", [JaxBackend, TorchBackend])
def test_a_variance_that_is_not_learnt(backend: Any) -> None:
    with pytest.raises(ConfigError, match=r"--variance_loss_weight 0.001: the transformer learns no variance"):
        made(DIT, variance_loss_weight=0.001)
    config, _, spec = made(DIT, noise_scheduler={"_class_name": "DDPMScheduler", "variance_type": "learned_range"})
    with pytest.raises(ConfigError, match="variance_type learned_range takes a variance, and this model predicts none"):
        backend(config, spec)


def test_predictions_are_of_the_sample_alone(latent: Any) -> None:
    """What is predicted of the variance is left out."""
    config, spec = latent
    ours, theirs = JaxBackend(config, spec), TorchBackend(config, spec)
    rng = np.random.default_rng(3)
    sample, times = rng.standard_normal((2, 4, 8, 8)).astype(np.float32), np.array([3, 700])
    batch = {CLASS_LABELS: np.array([1, 10], np.int32)}
    for backend in (ours, theirs):
        backend.init_state()
    random = {
        "transformer": jax.tree.map(lambda leaf: np.asarray(rng.normal(size=leaf.shape), np.float32) * 0.1,
                                    ours.state.params["transformer"])
    }  # fmt: skip
    told = ours.modules.condition(random, batch)
    here = np.asarray(ours.modules.predict(random, sample, times, told))
    assert here.shape == sample.shape
    module = theirs.modules.by_name["transformer"]
    arrays = _by_memory_name(random["transformer"], module)
    module.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    with torch.no_grad():
        given = theirs.modules.condition({name: torch.from_numpy(array) for name, array in batch.items()})
        there = theirs.modules.predict(torch.from_numpy(sample), torch.from_numpy(times), given).numpy()
    assert np.linalg.norm(here - there) < 1e-5 * np.linalg.norm(there)


def _by_memory_name(params: Any, module: Any) -> dict[str, np.ndarray]:
    arrays = dict(to_torch(params))
    return {name: arrays[file_name(DIT_TRANSFORMER.name, name)] for name, _ in module.named_parameters()}


@pytest.mark.parametrize(
    ("transformer", "options", "message"),
    [
        (DIT | {"out_channels": 3}, {}, "transformer with in_channels 1 and out_channels 3"),
        (DIT | {"patch_size": 3}, {}, "--resolution 8: must be a multiple of 3"),
        (DIT | {"norm_type": "ada_norm_single"}, {}, "norm_type 'ada_norm_single'"),
        (DIT | {"in_channels": 2}, {}, r"1 \(grey\) or 3"),
        (DIT | {"num_layers": "two"}, {}, "num_layers is 'two'"),
        (DIT | {"qk_norm": 1}, {}, "qk_norm is 1; it must be a valid boolean"),
    ],
)
def test_models_that_are_refused(transformer: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(transformer, **options)


def test_options_are_told_of_before_the_run(caplog: pytest.LogCaptureFixture) -> None:
    made(DIT | {"qk_norm": True, "rotary": True})
    assert (
        "qk_norm, rotary: Diffusers has no such option; the pipeline that this run writes is opened here" in caplog.text
    )


def test_published_pipelines_of_the_old_class(latent: Any, tmp_path: Any) -> None:
    """The folders of DiT-XL/2 name the transformer's former class, in both files."""
    config, spec = latent
    backend = JaxBackend(config, spec)
    backend.init_state()
    backend.export(tmp_path)
    writing.write_index(spec, tmp_path)
    for file, change in (
        ("model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]}),
        ("transformer/config.json", {"_class_name": "Transformer2DModel", "num_vector_embeds": None}),
    ):
        values = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(values | change))
    again = open_pipeline(str(tmp_path))
    assert again.denoiser.kind == "DiTTransformer2DModel"
    own = dict(load(again.denoiser).named_parameters())
    for name, array in to_torch(load_pretrained(again.denoiser)):
        memory = name.replace("transformer_blocks.0.norm1.emb.", "emb.")
        np.testing.assert_array_equal(own[memory].detach().numpy(), array)


def test_pipelines_are_converted(latent: Any, tmp_path: Any) -> None:
    """To the form of a Flax release and back, and with the weights of a checkpoint put in."""
    config, spec = latent
    backend = JaxBackend(config, spec)
    backend.init_state()
    backend.export(tmp_path / "one")
    writing.write_index(spec, tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "two", format="flax")
    convert(tmp_path / "two", tmp_path / "three", format="diffusers")
    file = "transformer/diffusion_pytorch_model.safetensors"
    first, last = (load_file(tmp_path / name / file) for name in ("one", "three"))
    assert first.keys() == last.keys()
    for key, array in first.items():
        np.testing.assert_array_equal(last[key], array)
    index = json.loads((tmp_path / "three/model_index.json").read_text())
    assert index["id2label"] == {str(number): name for number, name in enumerate(spec.classes)}
