"""The task class_conditional: what it trains on and refuses, its samples, and its runs."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.numpy import load_file
from tiny import ONE_BLOCK, RUN, UNET

from flax_diffusion.core.data.sources.source import Labels
from flax_diffusion.core.errors import ConfigError, UserError, WeightsError
from flax_diffusion.core.objectives.objective import OBJECTIVES
from flax_diffusion.core.spec.pipeline import open_pipeline
from flax_diffusion.core.spec.prompts import class_number, guidance_scales
from flax_diffusion.core.tasks.class_conditional import ClassConditionalConfig, ClassConditionalTask
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig
from flax_diffusion.generate import generate
from flax_diffusion.jax_backend.backend import JaxBackend
from flax_diffusion.parity import compare
from flax_diffusion.train import train
from torch_backend import generate as torch_generate
from torch_backend.backend import TorchBackend

DIT = {"in_channels": 1, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
CLASSES = RUN | {"unet": None, "transformer": DIT, "validation_class_labels": ["seven", "3"], "report_to": "none"}
SMALL_UNET = UNET | ONE_BLOCK | {"sample_size": 8}


def config(**options):
    return ClassConditionalConfig(**CLASSES | options)


def trained(**options):
    return train("class_conditional", **CLASSES | options)


def spec_of(**options):
    task = task_of(config(**options))
    return task.make_spec(task.open_source())


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A pipeline of a UNet that knows ten classes and the null class."""
    folder = tmp_path_factory.mktemp("known")
    torch.manual_seed(0)
    DDPMPipeline(UNet2DModel(**SMALL_UNET, num_class_embeds=11), DDPMScheduler()).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    names = {str(number): f"digit {number}, number {number}" for number in range(10)}
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that trained a few steps, with samples and a checkpoint."""
    return trained(output_dir=str(tmp_path_factory.mktemp("run") / "out"), checkpointing_steps=3)


def test_new_models_have_the_classes_of_the_data_and_the_null_class():
    spec = spec_of()
    assert (spec.kind, spec.denoiser["num_embeds_ada_norm"], spec.null_class) == ("DiTPipeline", 10, 10)
    assert spec.classes[7] == "seven"
    assert (class_number(spec, "seven"), class_number(spec, "7")) == (7, 7)
    spec = spec_of(transformer=None, unet=SMALL_UNET)
    assert (spec.kind, spec.denoiser["num_class_embeds"], spec.null_class) == ("DDPMPipeline", 11, 10)
    spec = spec_of(transformer=None, unet=SMALL_UNET, class_dropout_prob=0, validation_guidance_scale=1)
    assert (spec.denoiser["num_class_embeds"], spec.null_class) == (10, None)
    sized = spec_of(transformer="SiT-S/2").denoiser
    assert [sized[key] for key in ("num_layers", "attention_head_dim", "in_channels")] == [12, 64, 3]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"unet": SMALL_UNET}, "--unet and --transformer are two models: drop one"),
        ({"transformer": None}, "nothing to train: give --pretrained_model_name_or_path, or --transformer or --unet"),
        ({"transformer": "DiT-M/2"}, "--transformer is 'DiT-M/2'.*did you mean|--transformer.*DiT-M/2"),
        ({"new_class_embedding": True}, "--new_class_embedding goes with --pretrained_model_name_or_path"),
        ({"class_dropout_prob": 0}, r"--validation_guidance_scale 4\.0 leads away from the null class, which"),
        (
            {"transformer": DIT | {"num_embeds_ada_norm": 7}},
            "num_embeds_ada_norm 7, and data of 10 classes: must be 10",
        ),
        (
            {"transformer": None, "unet": SMALL_UNET | {"num_class_embeds": 10}},
            "num_class_embeds 10, and data of 10 classes: must be 11, or left out, to have a row for the null class",
        ),
        (
            {"transformer": None, "unet": SMALL_UNET | {"class_embed_type": "timestep"}},
            "UNet with class_embed_type 'timestep': only a UNet with a table of classes can be told the class",
        ),
        ({"transformer": DIT | {"patch_size": 3}}, "--resolution 8: must be a multiple of 3"),
        (
            {"validation_class_labels": ["eleven"]},
            "--validation_class_labels: class eleven: must be a name, or a number",
        ),
        ({"label_column": "kind"}, "--dataset_name: --label_column is kind, but digits has the columns label"),
    ],
)
def test_what_is_refused(options, says):
    with pytest.raises((UserError, ValueError), match=says):
        spec_of(**options)


def test_an_unconditional_run_refuses_a_model_of_classes():
    options = UnconditionalConfig(**RUN | {"unet": SMALL_UNET | {"num_class_embeds": 4}})
    task = task_of(options)
    with pytest.raises(
        ConfigError, match="num_class_embeds 4: is told the class of each picture; train it by the task"
    ):
        task.make_spec(task.open_source())
    options = UnconditionalConfig(**RUN | {"unet": SMALL_UNET | {"class_embed_type": "identity"}})
    with pytest.raises(ConfigError, match="UNet with class_embed_type 'identity': only a UNet with a table of classes"):
        task_of(options).make_spec(task.open_source())


def test_pretrained_models(known, monkeypatch):
    """Names are those of the data; a model of another number of classes says how it is made to fit."""
    options = {"transformer": None, "pretrained_model_name_or_path": str(known)}
    spec = spec_of(**options)
    assert (spec.classes[7], spec.null_class, len(spec.classes)) == ("seven", 10, 10)
    opened = open_pipeline(str(known))
    assert (class_number(opened, "number 7"), class_number(opened, "digit 7"), opened.null_class) == (7, 7, 10)
    names = [f"digit {number}, number {number}" for number in range(10)]
    some = Labels([names[number % 3 + 2] for number in range(1797)], sorted(names[2:5], reverse=True))
    monkeypatch.setattr("flax_diffusion.core.data.sources.labels.labels_of", lambda *_: some)
    options["validation_class_labels"] = []
    task = task_of(config(**options))
    source = task.open_source()
    assert source.labels[:4].tolist() == [2, 3, 4, 2]  # numbers of the model, by name
    assert task.make_spec(source).classes == tuple(names)
    few = Labels(["cat", "dog"] * 898 + ["cat"], ["cat", "dog"])
    monkeypatch.setattr("flax_diffusion.core.data.sources.labels.labels_of", lambda *_: few)
    with pytest.raises(ConfigError, match=r"the data have 2 classes and the model knows 10: add --new_class_embedding"):
        spec_of(**options)
    new = spec_of(**options, new_class_embedding=True)
    assert (new.classes, new.null_class, new.denoiser["num_class_embeds"]) == (("cat", "dog"), 2, 3)
    numbered = Labels([0, 1] * 898 + [0], None)
    monkeypatch.setattr("flax_diffusion.core.data.sources.labels.labels_of", lambda *_: numbered)
    assert spec_of(**options).classes[1] == "digit 1, number 1"  # the numbers are those of the model
    numbered = Labels([0, 11] * 898 + [0], None)
    with pytest.raises(ConfigError, match="the data have 12 classes and the model knows 10"):
        spec_of(**options)


def test_a_new_table_is_drawn_and_the_rest_is_kept(known, monkeypatch):
    few = Labels([0, 1] * 898 + [0], ["cat", "dog"])
    monkeypatch.setattr("flax_diffusion.core.data.sources.labels.labels_of", lambda *_: few)
    options = config(
        transformer=None, pretrained_model_name_or_path=str(known), new_class_embedding=True, validation_class_labels=[]
    )
    task = task_of(options)
    spec = task.make_spec(task.open_source())
    found = []
    for backend in (JaxBackend(options, spec), TorchBackend(options, spec)):
        backend.init_state()
        found.append({name: array for name, array in backend.state_arrays().items() if name.startswith("params/")})
    before = UNet2DModel.from_pretrained(known / "unet").state_dict()
    for name, array in found[0].items():
        np.testing.assert_array_equal(array, found[1][name], err_msg=name)
        if "class_embedding" not in name:
            np.testing.assert_array_equal(array, before[name.removeprefix("params/unet/")].numpy(), err_msg=name)
    assert found[0]["params/unet/class_embedding.weight"].shape[0] == 3


def test_a_model_without_null_class(known, tmp_path):
    unet = UNet2DModel(**SMALL_UNET, num_class_embeds=10)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    options = {"transformer": None, "pretrained_model_name_or_path": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"--class_dropout_prob 0\.1: the model has 10 rows for 10 classes and none"):
        spec_of(**options)
    spec = spec_of(**options, class_dropout_prob=0, validation_guidance_scale=1)
    assert spec.null_class is None
    with pytest.raises(ConfigError, match=r"--guidance_scale 4\.0: the model has no null class, which guidance leads"):
        generate(tmp_path, class_label=["3"])
    assert generate(tmp_path, class_label="3", guidance_scale=1.0, num_inference_steps=1).shape == (1, 8, 8, 1)


def test_names_of_classes_that_the_model_does_not_have(known, tmp_path):
    DDPMPipeline(UNet2DModel(**SMALL_UNET, num_class_embeds=3), DDPMScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for names in ({"7": "seven"}, ["a", "b"]):
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
        with pytest.raises(
            WeightsError, match=r"id2label has .*, and the model has [23] classes: it must map numbers from"
        ):
            open_pipeline(str(tmp_path))


def test_a_run_and_what_it_leaves(run):
    index = json.loads((run / "model_index.json").read_text())
    assert index["id2label"]["7"] == "seven"
    grids = sorted((run / "samples").iterdir())
    assert grids
    for name in ("", "checkpoint-3"):
        ours = generate(run / name, class_label=["seven", "3"], num_images=2, num_inference_steps=2)
        theirs = torch_generate.generate(run / name, class_label=["seven", "3"], num_images=2, num_inference_steps=2)
        assert ours.shape == (4, 8, 8, 1)
        assert np.abs(ours.astype(int) - theirs).max() <= 1
        other = generate(run / name, class_label=["seven", "4"], num_images=2, num_inference_steps=2)
        assert (other[:2] == ours[:2]).all()
    (run / "classes.json").rename(run / "moved.json")
    with pytest.raises(WeightsError, match=r"classes\.json"):
        generate(run / "checkpoint-3", class_label="seven")
    (run / "moved.json").rename(run / "classes.json")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "a DiTPipeline with 0 classes: give at least one --class_label"),
        ({"prompt": "a seven"}, "--prompt: a DiTPipeline is not told one; drop it"),
        (
            {"class_label": "sevn"},
            "--class_label: class sevn: must be a name, or a number from 0 to 9; did you mean 'sev",
        ),
        ({"class_label": "10"}, "--class_label: class 10: must be a name, or a number from 0 to 9"),
        (
            {"class_label": "3", "negative_prompt": "a"},
            "--negative_prompt: a DiTPipeline is told classes, and is guided",
        ),
        ({"class_label": "3", "guidance_interval": [0.7]}, r"--guidance_interval 0\.7: give two noise levels"),
        ({"class_label": "3", "guidance_interval": [0.7, 0.2]}, "give two noise levels, the lower one first"),
        (
            {"class_label": "3", "guidance_scale": 1.0, "guidance_interval": [0, 1]},
            "--guidance_interval goes with a --gu",
        ),
    ],
)
def test_what_generate_refuses(run, options, says):
    with pytest.raises(ConfigError, match=says):
        generate(run, **options)


def test_guidance_in_an_interval(known):
    """It is that of the scale inside and none outside, on both backends."""
    spec = open_pipeline(str(known))
    steps = np.array([999, 700, 500, 100])
    np.testing.assert_array_equal(guidance_scales(spec, steps, 3.0, [0.3, 0.7]), np.float32([1, 3, 3, 1]))
    np.testing.assert_array_equal(guidance_scales(spec, steps, 3.0), np.float32([3, 3, 3, 3]))
    edm = spec_of(objective="edm")
    sigmas = np.array([80.0, 2.0, 0.5, 0.002])
    np.testing.assert_array_equal(guidance_scales(edm, np.log(sigmas) / 4, 2.0, [0.4, 2.1]), np.float32([1, 2, 2, 1]))
    options = {"class_label": ["7", "1"], "num_inference_steps": 4, "guidance_scale": 6.0}
    whole, none = generate(known, **options), generate(known, **options | {"guidance_scale": 1.0})
    assert (generate(known, **options, guidance_interval=[0, 1]) == whole).all()
    assert np.abs(generate(known, **options, guidance_interval=[1.5, 2]).astype(int) - none).max() <= 1
    part = generate(known, **options, guidance_interval=[0.4, 0.8])
    assert (part != whole).any()
    assert (part != none).any()
    theirs = torch_generate.generate(known, **options, guidance_interval=[0.4, 0.8])
    assert np.abs(part.astype(int) - theirs).max() <= 1


OWN = """
import numpy as np
from flax_diffusion.core.objectives.objective import Mixture, Objective


class Sphere(Objective):
    name, schedulers = "sphere", ("FlowMatchEulerDiscreteScheduler",)

    def draw(self, rng):
        a = rng.random() * np.pi / 2
        numbers = (2000 * a / np.pi, np.cos(a), np.sin(a), -np.sin(a), np.cos(a))
        return Mixture.of(*numbers, dtype=self.dtype)


class Nameless(Objective):
    def draw(self, rng):
        return None


class Taken(Sphere):
    name = "edm"
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's, with an objective."""
    (tmp_path / "my_objectives.py").write_text(OWN)
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_objectives:Sphere"
    sys.modules.pop("my_objectives", None)
    OBJECTIVES._load().pop("sphere", None)


def test_an_objective_of_the_users_own(own, tmp_path):
    """Both backends train by it alike, and its run is gone on with and drawn from."""
    options = {"objective": own, "output_dir": str(tmp_path / "run"), "max_train_steps": 4, "checkpointing_steps": 2}
    rows = list(itertools.islice(compare(config(**options), 3), 3))
    assert max(row.loss for row in rows) < 1e-10
    assert max(row.params for row in rows) < 1e-9
    trained(**options)
    last = trained(**options | {"resume_from_checkpoint": "latest", "max_train_steps": 5})
    for name in ("", "checkpoint-4"):
        assert generate(last / name, class_label="3", num_inference_steps=2).shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("spher", "--objective"),
        ("my_objectives:Sphera", "my_objectives has no class Sphera of `Objective`'s; name one"),
        ("my_objectives:np", "my_objectives has no class np of"),
        ("my_objectives:Nameless", "Nameless has no name and no schedulers; add it"),
        ("my_objectives:Taken", "there is another objective of the name edm; rename it"),
        ("no_such_module:A", r"no_such_module cannot be imported \(ModuleNotFoundError: .*; it must lie in the folder"),
        ("broken_module:A", r"broken_module cannot be imported \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_objectives_that_are_none(own, name, says):
    with pytest.raises(ConfigError, match=says):
        spec_of(objective=name)


@pytest.mark.acceptance
def test_a_resumed_run_is_the_same(tmp_path):
    """Bit for bit, with dropped labels."""
    whole = trained(output_dir=str(tmp_path / "whole"), class_dropout_prob=0.4)
    parts = {"output_dir": str(tmp_path / "parts"), "class_dropout_prob": 0.4, "checkpointing_steps": 4}
    trained(**parts, max_train_steps=4)
    again = trained(**parts, resume_from_checkpoint="latest")
    file = "transformer/diffusion_pytorch_model.safetensors"
    first, last = (load_file(folder / file) for folder in (whole, again))
    assert first.keys() == last.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, last[name], err_msg=name)


def test_a_plan_has_as_many_classes_as_the_model():
    task = ClassConditionalTask(config(transformer=DIT | {"num_embeds_ada_norm": 33}, validation_class_labels=[]))
    source = task.described_source()
    assert len(source.classes) == 33
    assert task.make_spec(source).denoiser["num_embeds_ada_norm"] == 33
    task = ClassConditionalTask(config())
    assert len(task.described_source().classes) == 1000
    assert task.make_spec(task.described_source()).classes[0] == "seven"  # that is to be drawn
