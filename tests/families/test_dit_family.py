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
from tiny import RUN, UNET, VAE

from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.families.dit import DIT_TRANSFORMER
from flax_diffusion.core.families.family import CLASS_LABELS
from flax_diffusion.core.run.schedule import make_schedule
from flax_diffusion.core.spec import writing
from flax_diffusion.core.spec.pipeline import Component, PipelineSpec, Training, open_pipeline
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig
from flax_diffusion.jax_backend.backend import JaxBackend
from flax_diffusion.models import FlaxAutoencoderKL
from flax_diffusion.parity import difference
from torch_backend.backend import TorchBackend

DIT = {
    "in_channels": 1, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_embeds_ada_norm": 10,
}  # fmt: skip
STEPS = 4
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "epsilon": (DIT, {"gradient_accumulation_steps": 2}),
    "flow": (DIT | {"patch_size": 4}, {"objective": "flow_matching"}),
    "learned_variance": (DIT | {"out_channels": 2}, {}),
    "options": (DIT | {"qk_norm": True, "rotary": True, "rms_norm": True, "activation_fn": "swiglu"}, {}),
    "checkpointed": (DIT, {"gradient_checkpointing": True}),
}


def made(transformer: dict[str, Any], **options: Any) -> tuple[Any, Any, PipelineSpec]:
    """Options, task and pipeline of a run on digits; no task of ours trains on their classes yet."""
    config = UnconditionalConfig(**RUN | {"use_ema": True, "max_train_steps": STEPS} | options)
    task: Any = task_of(config)
    component = Component(kind=DIT_TRANSFORMER.name, config=transformer, training=Training.ALL)
    return config, task, task.pipeline("DiTPipeline", {"transformer": component})


def batches(config: Any, task: Any, spec: PipelineSpec, dtype: str = "float64", devices: int = 1) -> list[dict[str, Any]]:
    source = open_source(dataset_name="digits", caption_column=None)
    schedule = make_schedule(config, len(source), devices)
    rng = np.random.default_rng(5)
    loader = Loader(
        source, task.make_example_fn(spec, dtype=dtype), seed=0, batch_size=schedule.batch_size,
        accumulation=schedule.accumulation, num_steps=STEPS,
    )  # fmt: skip
    with loader:
        return [
            batch | {CLASS_LABELS: rng.integers(0, 11, batch["loss_weights"].shape).astype(np.int32)}
            for batch in loader
        ]


def trained(backend: Any, given: list[dict[str, Any]]) -> tuple[list[float], dict[str, np.ndarray]]:
    backend.init_state()
    losses = [backend.read(backend.train_step(backend.put(batch), 1e-2, 0.9))["loss"] for batch in given]
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
