"""The loss on held-out pictures: its value, on both backends and any devices, and that training does not notice it."""

import json

import jax
import numpy as np
import pytest
import torch
from proofs import proof
from tiny import ONE_BLOCK, RUN, VAE, paired_pictures, pictures, shaped_pictures, stable_diffusion

from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.cli.command_line import merge
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.metrics_file import MetricsFile
from flax_diffusion.core.randomness.streams import VALIDATION_EPOCH
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.validation.held_out import HeldOut, divide
from flax_diffusion.core.validation.loss import ValidationLoss
from flax_diffusion.jax_backend.backend import JaxBackend
from flax_diffusion.jax_backend.losses import mean_losses
from flax_diffusion.parity import Row, verdict
from torch_backend.backend import TorchBackend

EIGHT = jax.devices()
BACKENDS = {"flax_diffusion": JaxBackend, "torch_backend": TorchBackend}
SMALL = RUN | {"unet": RUN["unet"] | ONE_BLOCK, "report_to": "none", "draw_samples": False, "validation_epochs": None}
SMALL |= {"save_model_epochs": None, "max_train_steps": 3, "use_ema": True}
DROPOUT = SMALL | {"unet": SMALL["unet"] | {"dropout": 0.5}}


def judge(make, batch_size=4, dtype="float32", count=None, **options):
    """A backend and the validation loss of its first weights."""
    task = task_of(merge("unconditional", {}, DROPOUT | {"validation_split": 0.25} | options, "test"))
    source = task.open_source()
    spec = task.make_spec(source)
    backend = make(task.config, spec)
    backend.init_state()
    validation = divide(task, source)[1]
    return backend, ValidationLoss(task, spec, HeldOut(validation), None, backend, batch_size, dtype), validation


def test_the_value_is_the_mean_over_the_examples():
    """Each by itself, by the loss of training without dropout."""
    backend, loss, source = judge(lambda config, spec: JaxBackend(config, spec, EIGHT[:1]), noise_offset=0.1)
    task, modules = task_of(backend.config), backend.modules
    make = task.make_example_fn(backend.spec).for_validation()
    one = jax.jit(lambda params, batch: mean_losses(modules, params, batch, None)["loss"])
    each = []
    for index in range(len(source)):
        example = make(source, 0, VALIDATION_EPOCH, index)
        batch = {name: array[None] for name, array in example.items() if name != "example_index"}
        each.append(float(one(backend.state.params, batch)))
    assert len(each) == 10
    found = loss()
    assert list(found) == ["validation_loss", "validation_loss_ema"]
    np.testing.assert_allclose(found["validation_loss"], np.mean(each), rtol=1e-6)
    assert found["validation_loss_ema"] == found["validation_loss"], "the average starts as the weights"
    assert loss() == found


def test_the_value_depends_on_neither_batch_nor_devices():
    expected = judge(lambda config, spec: JaxBackend(config, spec, EIGHT[:1]))[1]()["validation_loss"]
    for batch_size in (3, 16):
        found = judge(lambda config, spec: JaxBackend(config, spec, EIGHT[:1]), batch_size)[1]()
        np.testing.assert_allclose(found["validation_loss"], expected, rtol=1e-6)
    for options in ({}, {"fsdp_parallelism": 4}, {"fsdp_parallelism": 8, "fsdp_gather": "block"}):
        backend, loss, _ = judge(lambda config, spec: JaxBackend(config, spec, EIGHT), 8, **options)
        found = loss()
        np.testing.assert_allclose(found["validation_loss"], expected, rtol=1e-6)
        np.testing.assert_allclose(found["validation_loss_ema"], expected, rtol=1e-6)
        assert backend.program.validation_loss._cache_size() == 1, "compiled more than once"


def test_both_backends_agree_in_float64():
    """With dropout, which would be drawn differently, turned off."""
    with jax.enable_x64(True):
        theirs = judge(lambda config, spec: TorchBackend(config, spec, torch.float64), 3, "float64")[1]()
        ours = judge(lambda config, spec: JaxBackend(config, spec, EIGHT[:1], np.dtype("float64")), 4, "float64")[1]()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-9)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(backend, folder, task="unconditional", until=None, **options):
    """Trains, where asked to no further than some step."""

    def make(config, spec):
        made = BACKENDS[backend](config, spec)
        if until is not None:
            made.should_stop = lambda requested, step: step == until
        return made

    return fit(task_of(merge(task, {}, {"output_dir": str(folder)} | options, "test")), make).output_dir


@pytest.mark.parametrize("backend", ["torch_backend", proof("flax_diffusion")])
def test_training_does_not_notice(backend, tmp_path):
    """Weights, moments and averages of a run are the same to the last bit; interrupted, it ends as it would have."""
    data, held_out = pictures(tmp_path / "data", 8, 16), pictures(tmp_path / "val", 5, 16)
    unet = DROPOUT["unet"] | {"in_channels": 3, "out_channels": 3}
    options = DROPOUT | {"dataset_name": None, "train_data_dir": str(data), "resolution": 16, "unet": unet}
    options |= {"max_train_steps": 6, "train_batch_size": 2, "max_train_samples": None, "random_flip": True}
    watched = options | {"validation_data_dir": str(held_out), "validation_loss_steps": 2, "report_to": "tensorboard"}
    plain = portable_state(run(backend, tmp_path / "plain", **options) / "checkpoint-6")
    folder = run(backend, tmp_path / "watched", **watched)
    for name, array in portable_state(folder / "checkpoint-6").items():
        np.testing.assert_array_equal(array, plain[name], err_msg=name)
    expected = rows(folder)
    assert [row["step"] for row in expected] == [2, 4, 6]
    assert len({row["validation_loss"] for row in expected}) == 3
    assert all(row["validation_loss"] != row["validation_loss_ema"] for row in expected)
    assert curves(folder)["validation_loss_ema"] == [(row["step"], row["validation_loss_ema"]) for row in expected]

    again = tmp_path / "again"
    run(backend, again, until=4, **watched)
    assert [row["step"] for row in rows(again)] == [2]  # it ended before those of step 4
    (again / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text())  # of steps to come, as after a kill
    run(backend, again, resume_from_checkpoint="latest", **watched)
    assert rows(again) == expected
    for name, array in portable_state(again / "checkpoint-6").items():
        np.testing.assert_array_equal(array, plain[name], err_msg=name)
    run(backend, again, resume_from_checkpoint="latest", **watched)
    assert rows(again) == expected


def portable_state(folder):
    return portable.read(folder)[0]


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(one.step, pytest.approx(one.value)) for one in events.Scalars(tag)] for tag in tags}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    stable_diffusion(folder / "base", length=48)
    pictures(folder / "data", 6, 16)
    paired_pictures(folder / "paired", 6, 16)
    pictures(folder / "classes", 2, 16)
    torch.manual_seed(0)
    from diffusers import AutoencoderKL

    AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    return folder


EVERY = {
    "report_to": "none", "draw_samples": False, "validation_epochs": None, "validation_steps": None, "resolution": 16,
    "train_batch_size": 2,
    "max_train_steps": 2, "validation_split": 0.4, "validation_loss_steps": 1, "lr_warmup_steps": 0,
    "learning_rate": 1e-3, "eval_batch_size": 1,
}  # fmt: skip


def of_task(case, world):
    """A task and its options."""
    base, data = {"pretrained_model_name_or_path": str(world / "base")}, {"train_data_dir": str(world / "data")}
    dit = {"in_channels": 3, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4, "patch_size": 4}
    latent = {"vae": str(world / "vae"), "unet": SMALL["unet"] | {"in_channels": 4, "out_channels": 4}}
    thing = {"instance_data_dir": str(world / "data"), "instance_prompt": "a photo of sks dog"}
    prior = {"with_prior_preservation": True, "class_data_dir": str(world / "classes"), "num_class_images": 2}
    word = {"placeholder_token": "<new>", "initializer_token": "dog", "repeats": 3, "learning_rate": 1.0}
    quick = {"validation_num_inference_steps": 1}
    return {
        "unconditional": ("unconditional", data | latent | quick),
        "class_conditional": ("class_conditional", data | quick | {"transformer": dit, "class_dropout_prob": 0.5}),
        "text_to_image": ("text_to_image", base | data | {"proportion_empty_prompts": 0.5}),
        "lora": ("text_to_image", base | data | {"lora_rank": 2, "lora_dropout": 0.5, "train_text_encoder": True}),
        "dreambooth": ("dreambooth", base | thing | prior | {"class_prompt": "a dog"}),
        "textual_inversion": ("textual_inversion", base | data | word),
        "controlnet": ("controlnet", base | {"train_data_dir": str(world / "paired")}),
        "inpainting": ("text_to_image", base | data | {"inpainting": True}),
        "autoencoder": ("autoencoder", data | {"vae": VAE}),
    }[case]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        "unconditional", "class_conditional", "textual_inversion", "autoencoder",
        *(
            pytest.param(case, marks=pytest.mark.acceptance)
            for case in ("text_to_image", "lora", "dreambooth", "controlnet", "inpainting")
        ),
    ],
)  # fmt: skip
def test_every_task_has_it_on_both_backends(case, world, tmp_path):
    task, options = of_task(case, world)
    found = {}
    for backend in BACKENDS:
        found[backend] = rows(run(backend, tmp_path / backend, task, **EVERY | options))
        assert [row["step"] for row in found[backend]] == [1, 2]
        assert found[backend][0]["validation_loss"] != found[backend][1]["validation_loss"]
    for ours, theirs in zip(*found.values(), strict=True):
        np.testing.assert_allclose(ours["validation_loss"], theirs["validation_loss"], rtol=1e-3)


def test_what_is_computed_before_training_gives_the_same(world, tmp_path):
    """Also of pictures that are flipped at random in training."""
    options = EVERY | of_task("text_to_image", world)[1] | {"center_crop": True, "random_flip": True}
    options |= {"max_train_steps": 1}
    found = rows(run("torch_backend", tmp_path / "each", "text_to_image", **options))
    once = {"cache_latents": True, "pre_compute_text_embeddings": True}
    cached = rows(run("torch_backend", tmp_path / "once", "text_to_image", **options | once))
    np.testing.assert_allclose(cached[0]["validation_loss"], found[0]["validation_loss"], rtol=1e-5)


def test_buckets(world, tmp_path, monkeypatch):
    """Every picture has the bucket of the nearest shape, and whether its latents are cached makes no difference."""
    data = shaped_pictures(tmp_path / "data", [(32, 16), (34, 16), (16, 32), (16, 33), (20, 20), (21, 20)] * 2)
    options = EVERY | of_task("unconditional", world)[1] | {"train_data_dir": str(data), "center_crop": True}
    options |= {"max_train_steps": 1, "bucket_resolutions": ["16x16", "24x8", "8x24"]}
    shapes = []
    put = TorchBackend.put

    def seen(self, batch):
        shapes.append(batch["noise"].shape[-2:])
        return put(self, batch)

    monkeypatch.setattr(TorchBackend, "put", seen)
    found = rows(run("torch_backend", tmp_path / "each", **options))
    held_out, shapes[:] = shapes[-3:], []
    assert set(held_out) == {(8, 8), (4, 12), (12, 4)}
    cached = rows(run("torch_backend", tmp_path / "once", **options | {"cache_latents": True}))
    assert shapes[-3:] == held_out
    np.testing.assert_allclose(cached[0]["validation_loss"], found[0]["validation_loss"], rtol=1e-5)


def test_a_damaged_file_of_metrics_is_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "validation_loss": 1.0}\n{"step": 2')
    with pytest.raises(ConfigError, match=r"metrics.jsonl line 2: is no JSON object with a step"):
        MetricsFile(path, 2, writes=True)
    MetricsFile(path, 0, writes=True).add(1, {"validation_loss": float("nan")})  # of a new run
    assert path.read_text() == '{"step": 1, "validation_loss": null}\n'


@pytest.mark.parametrize(("apart", "equal"), [(0.0, True), (1e-8, False), (float("nan"), False), (None, True)])
def test_parity_judges_it(apart, equal):
    found, line = verdict([Row(1, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, apart)], "float64")
    assert found == equal
    assert ("validation losses within" in line) == (apart is not None)


@pytest.mark.parametrize(("apart", "equal"), [(1e-11, True), (1e-9, False), (float("nan"), False)])
def test_parity_judges_the_parts_of_the_loss(apart, equal):
    assert verdict([Row(1, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, parts=apart)], "float64")[0] == equal
