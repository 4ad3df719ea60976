"""What can be seen of a run: of its loop with a backend that only records, of the JAX program, of PyTorch's state."""

import copy
import hashlib
import io
import json
import logging
import re
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import fake_wandb
import jax
import numpy as np
import torch
from recorder import Idle

from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.config.options import ONCE
from flax_diffusion.core.data import loader
from flax_diffusion.core.display import console
from flax_diffusion.core.errors import UserError
from flax_diffusion.core.io import publishing
from flax_diffusion.core.report.files import DATA, PAGE
from flax_diffusion.core.run import assembly, launch
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.run.schedule.steps import make_schedule
from flax_diffusion.core.spec.adapters import NEW_ROWS
from flax_diffusion.core.spec.pipeline import Training
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.jax_backend.backend import JaxBackend
from torch_backend import distribution
from torch_backend import options as torch_options
from torch_backend.backend import TorchBackend
from torch_backend.features import PixelFeatures

DEVICES = jax.devices()
"""All eight; tests see the first of them only."""

LAYERS = (
    "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "text_encoder/text_model.encoder.layers.0.self_attn.q_proj",
)


def digest(*arrays):
    found = hashlib.sha256()
    for array in arrays:
        found.update(repr((array.shape, array.dtype)).encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:12]


class Recorder(Idle):
    """Remembers what the loop asked for."""

    def __init__(self, config, spec):
        self.config, self.spec, self.steps = config, spec, 0
        self.batches, self.rates, self.sampled, self.exported = [], [], [], []

    @staticmethod
    def check_options(config):
        pass

    def put(self, batch):
        self.batches.append({key: digest(value) for key, value in batch.items()})
        return batch

    def train_step(self, batch, learning_rate, ema_decays):
        self.steps += 1
        self.rates.append((learning_rate, ema_decays))
        return {"loss": 1.0, "grad_norm": 1.0}

    def set_step(self, step):
        self.steps = step

    def save(self, folder, metadata):
        portable.write(folder, {"count": np.asarray(self.steps)}, metadata)

    def restore(self, folder):
        arrays, metadata = portable.read(folder)
        self.steps = int(arrays["count"])
        return metadata

    def embed_prompts(self, prompts):
        return {"text_embeddings": np.stack([np.full((8, 16), len(prompt) + 0.1, np.float32) for prompt in prompts])}

    def posteriors(self, pixels):
        _, height, width = self.spec.sample_shape
        small = pixels.mean(axis=1, keepdims=True)[:, :, :height, :width]
        return np.stack([np.repeat(small, 4, axis=1)] * 2, axis=1)

    def trained_arrays(self):
        self.exported.append(self.steps)
        rows = {f"text_encoder/{NEW_ROWS}": np.zeros((2, 16), np.float32)}
        names = [f"{layer}.lora_{side}.weight" for layer in LAYERS for side in "AB"]
        return rows | {name: np.ones((4, 4), np.float32) for name in names}

    def encode(self, pixels, noise):
        return noise + pixels.mean()

    def decode(self, latents):
        side = self.spec.resolution
        return np.zeros((len(latents), side, side, self.spec.image_channels), np.uint8)

    def sample(self, **asked):
        told = {name: digest(array) for name, array in (asked.get("extra") or {}).items()}
        self.sampled.append(asked | {"extra": told})
        count = asked["num_images"] * max(1, len(asked["prompts"]))
        return np.zeros((count, 16, 16, 3), np.uint8)

    def draw(self, **asked):
        yield self.sample(**asked)

    def extractor(self, feature, inception, batch_size):
        return PixelFeatures()

    def export(self, folder, *, only_trained=False):
        self.exported.append(self.steps)
        for name, component in self.spec.components.items():
            if component.training is Training.ALL or not only_trained:
                (folder / name).mkdir(exist_ok=True, parents=True)
                (folder / name / "config.json").write_text(json.dumps(component.config))


MODELS = ("said", "mesh", "exchanges", "jax", "torch", "torch_built", "torch_sums", "jax_says", "torch_says")
"""Channels that make a backend, each a method of `Observer`; the others come from one run of the loop."""


class Observer:
    """Looks at runs of a task that differ in their options.

    Args:
        world: The folders that options name; see `world.py`.
        monkeypatch: That sets the outer bounds of what is run: no downloads, no processes.
    """

    def __init__(self, world, monkeypatch):
        self.world, self.count = world, 0
        self._asked = []
        monkeypatch.setattr("datasets.load_dataset", self._load_dataset)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self._snapshot_download)
        monkeypatch.setattr(loader, "Workers", self._workers)
        monkeypatch.setattr(publishing, "check_repository", self._check_repository)
        monkeypatch.setattr(publishing, "push_folder", self._push_folder)
        monkeypatch.setitem(sys.modules, "wandb", fake_wandb.module(lambda options: self._asked.append(options)))
        self.seen = {}

    def _load_dataset(self, *arguments, **options):
        self._asked.append(("dataset", arguments, options))
        return copy.copy(self.world.table)

    def _snapshot_download(self, name, *, revision=None, allow_patterns=(), dry_run=False, cache_dir=None):
        self._asked.append(("model", name, revision))
        folder = self.world.folder / name.partition("/")[2]
        if not dry_run:
            return str(folder)
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        return [SimpleNamespace(filename=one) for one in names if one.startswith(allow_patterns[0].rstrip("*"))]

    def _check_repository(self, name, **options):
        self._asked.append(("repository", name, options))
        return name

    def _push_folder(self, folder, name, **options):
        self._asked.append(("push", name, options, sorted(files(folder))))
        return "address"

    def _workers(self, make, count):
        self._asked.append(("processes", count))
        return make(slice(None))

    def look(self, channel, task, options, before=None):
        """What a channel shows of a run with some options, or "error: …"; computed once.

        Args:
            channel: One of `run`'s, or the name of a method.
            task: Its name.
            options: Of the run.
            before: Options of a run that the same folder holds already; None for none.
        """
        kind = channel if channel in MODELS else "run"
        key = repr((kind, task, sorted(options.items()), before))
        if key not in self.seen:
            try:
                self.seen[key] = (
                    self.run(task, options, before) if kind == "run" else getattr(self, kind)(task, options)
                )
            except UserError as error:
                self.seen[key] = f"error: {error}"
        seen = self.seen[key]
        return seen[channel] if kind == "run" and isinstance(seen, dict) else seen

    def config(self, task, options):
        return command_line.merge(task, {}, options, "")

    def run(self, task, options, before):
        """Everything that the loop asks of a backend and writes, but for the recipe, which repeats the options."""
        self.count += 1
        folder = self.world.folder / "runs" / str(self.count) / "out"
        try:
            if before is not None:
                without = {name: value for name, value in options.items() if name not in ONCE}
                fit(task_of(self.config(task, {"output_dir": str(folder)} | without | before)), Recorder)
            self._asked, made, records = [], [], []
            handler = logging.Handler()
            handler.emit = lambda record: records.append(record.getMessage())

            def make(config, spec):
                made.append(Recorder(config, spec))
                return made[-1]

            logger = logging.getLogger("flax_diffusion")
            with ExitStack() as stack:
                stack.callback(logger.removeHandler, handler)
                logger.addHandler(handler)
                left = fit(task_of(self.config(task, {"output_dir": str(folder)} | options)), make).output_dir
            (backend,) = made
            return {
                "batch": backend.batches, "rates": backend.rates, "samples": backend.sampled,
                "exports": backend.exported, "files": files(left), "asked": self._asked,
                "spec": described(backend.spec), "where": left.name,
                "kept": files(options["precomputed_dir"]) if options.get("precomputed_dir") else {},
                "log": [text.replace(str(folder), "OUT") for text in records],
            }  # fmt: skip
        finally:
            shutil.rmtree(folder.parent, ignore_errors=True)
            shutil.rmtree(self.world.unfilled, ignore_errors=True)

    def opened(self, task, options):
        config = self.config(task, {"output_dir": "out"} | options)
        source = task_of(config).open_source()
        return config, source, task_of(config).make_spec(source)

    def mesh(self, task, options):
        """How four devices are arranged."""
        config, _, spec = self.opened(task, options)
        return dict(JaxBackend(config, spec, DEVICES[:4]).mesh.shape)

    def exchanges(self, task, options):
        """What four devices exchange in a step: kinds, shapes and dtypes."""
        config, source, spec = self.opened(task, options)
        program = JaxBackend(config, spec, DEVICES[:4]).program
        batch = program.batch(task_of(config).make_example_fn(spec)(source, 0, 0, 0), 1, 4)
        text = program.step.lower(program.state, program.frozen, batch, program.rates).as_text()
        return re.findall(r"stablehlo.(?:all_gather|reduce_scatter|all_reduce).*?\) : \(tensor<[^>]*>", text, re.DOTALL)

    def torch_sums(self, task, options):
        """How PyTorch sums gradients over processes."""
        return distribution.make_accelerator(self.config(task, {"output_dir": "out"} | options)).ddp_handler.comm_hook

    def jax(self, task, options):
        """The program of the JAX step, and what its state is made of."""
        config, source, spec = self.opened(task, options)
        program = JaxBackend(config, spec, DEVICES[:1]).program
        example = task_of(config).make_example_fn(spec)(source, 0, 0, 0)
        batch = program.batch(example, 1, 1)
        traced = program.step.trace(program.state, program.frozen, batch, program.rates)
        kept = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding.memory_kind), program.state)
        return hashlib.sha256(str(traced.jaxpr).encode()).hexdigest(), str(jax.tree_util.tree_flatten_with_path(kept))

    def torch_built(self, task, options):
        """PyTorch's optimizer and models before the first step."""
        return self._built(task, options)[1]

    def _built(self, task, options):
        config, source, spec = self.opened(task, options)
        kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        backend = TorchBackend(config, spec)
        backend.init_state()
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept
        optimizer = backend.optimizer.optimizer
        flags = {}
        for name, module in backend.modules.by_name.items():
            weights = [p for p in module.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
            flags[name] = {
                "again": sum(bool(getattr(part, "gradient_checkpointing", False)) for part in module.modules()),
                "last": any(p.is_contiguous(memory_format=torch.channels_last) for p in weights),
                "compiled": module._compiled_call_impl is not None,
                "trains": sum(p.requires_grad for p in module.parameters()),
            }
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        return (backend, config, source, spec), (type(optimizer).__name__, groups, flags)

    def torch(self, task, options):
        """PyTorch's numbers and state after two steps, and after one that is not finite."""
        (backend, config, source, spec), _ = self._built(task, options)
        schedule = make_schedule(config, len(source), 1)
        seen = []
        with assembly.make_loader(task_of(config), spec, source, schedule, num_steps=3) as batches:
            for step, batch in enumerate(batches):
                if step == 2:
                    batch["loss_weights"] = batch["loss_weights"] * np.float32(np.nan)
                decays = dict.fromkeys(config.averages, 0.5)
                metrics = backend.read(backend.train_step(backend.put(batch), 1e-3, decays))
                arrays = backend.state_arrays()
                seen.append((str(metrics), {name: digest(array) for name, array in sorted(arrays.items())}))
        return seen, [parameter.grad is None for parameter in backend.loss.parameters() if parameter.requires_grad]

    def jax_says(self, task, options):
        """What the JAX backend logs when it is made."""
        config, _, spec = self.opened(task, options)
        with mock.patch("flax_diffusion.jax_backend.backend.log.info") as info:
            JaxBackend(config, spec, DEVICES[:1])
        return str(info.call_args_list)

    def said(self, task, options):
        """What a whole run says, where there is no terminal, but for the time."""
        folder = self.world.folder / "said" / "out"
        stream = io.StringIO()
        here = console.Console(stream, live=False, stamp=lambda: "", clock=lambda: 0.0)
        log = logging.getLogger("flax_diffusion")
        try:
            with console.using(here), ExitStack() as stack:
                handler = console.Handler()
                stack.callback(log.removeHandler, handler)
                log.addHandler(handler)
                launch.train(lambda: Recorder, task, None, options | {"output_dir": str(folder)}, generate=print)
        finally:
            shutil.rmtree(folder.parent, ignore_errors=True)
        return re.sub(r"[0-9.]+ .B are free", "free", stream.getvalue())

    def torch_says(self, task, options):
        """Whether PyTorch takes the options."""
        torch_options.check(self.config(task, {"output_dir": "out"} | options))
        return "taken"


def files(folder):
    """Names and contents of what a run left, but for its recipe, contents that tell the time, and manifests."""
    seen = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.name.startswith("events.out"):
            seen[str(Path(name).parent / "events")] = ""
        elif path.name in (PAGE, DATA):
            seen[name] = ""
        elif path.is_file() and path.name not in ("config.yaml", "manifest.json"):
            seen[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return seen


def described(spec):
    """A pipeline, as text."""
    parts = {name: repr(part) for name, part in spec.components.items()}
    return spec.kind, parts, spec.scheduler, repr(spec.autoencoder_loss), spec.classes
