"""The PyTorch backend: Diffusers' and Transformers' models, stepped, wrapped and saved through Accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast
from torch import Tensor

from flax_diffusion.core.backend import Batch
from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.checkpoints.folders import check_same_shapes
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.spec.prompts import sampler_config
from torch_backend import options
from torch_backend.distribution import LossScale, divided_as, make_accelerator, placement_of, whole
from torch_backend.evaluation import evaluated, finished, on_device
from torch_backend.features import extractor
from torch_backend.losses import mean_losses
from torch_backend.measuring import Measured, device_memory
from torch_backend.modules import COMPUTE_DTYPES, Modules, build_modules, described, load
from torch_backend.names import file_name
from torch_backend.optimizers import OPTIMIZERS, make_optimizer
from torch_backend.sampling import Sampler, scheduler_from_config, to_uint8
from torch_backend.train_step import Loss, update_ema

EIGHT_BIT_TABLES = ("absmax", "qmap")
"""Arrays that bitsandbytes keeps beside its moments; a small parameter has none."""


class TorchBackend:
    """Implementation of `core.backend.Backend`, which documents the methods, with Diffusers' models and Accelerate.

    Args:
        config: The run's options.
        spec: The pipeline.
        dtype: Dtype of the trained weights and, without mixed precision, of all computation.

    Raises:
        ConfigError: For an option that this backend, this machine or this installation does not have.
    """

    command = "python -m torch_backend.train"
    extractor = staticmethod(extractor)
    describe = described

    def __init__(self, config: TrainConfig, spec: PipelineSpec, dtype: torch.dtype = torch.float32):
        self.check_options(config)
        self.config, self.spec, self.dtype = config, spec, dtype
        AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
        self.accelerator = make_accelerator(config)
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) and spec.trains_adapters:
            raise ConfigError(
                f"LoRA and textual inversion do not go with {kind.value}: what they train is too small to divide; use "
                "accelerate launch --multi_gpu -m torch_backend.train, or python -m torch_backend.train for one device"
            )
        self.process_index: int = self.accelerator.process_index
        self.process_count: int = self.accelerator.num_processes
        self.device_count: int = self.process_count
        self.device: torch.device = self.accelerator.device
        self._scheduler = scheduler_from_config(sampler_config(spec)) if spec.scheduler else None
        self._state_names = OPTIMIZERS[config.optimizer].state(config)
        self.count = self.steps = 0
        self.average: str | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="state")
        self._writing: Future[None] | None = None
        self._host_copy: dict[str, Tensor] = {}  # of the state, on the host
        self._hosts: Any = None  # all processes, on their CPUs
        self._released: set[str] = set()  # frozen components that wait on the host

    @staticmethod
    def check_options(config: TrainConfig) -> None:
        """Refuse options that this backend, this machine or this installation does not have."""
        options.check(config)

    def init_state(self) -> int:
        """Load or draw the weights, and wrap them as Accelerate's configuration says."""
        config = self.config
        options.set_globals(config)
        frozen = COMPUTE_DTYPES[config.mixed_precision] if config.mixed_precision != "no" else self.dtype
        self.modules = build_modules(
            self.spec, seed=config.seed, frozen_dtype=frozen, trained_dtype=self.dtype, device=self.device
        )
        loss = Loss(self.modules)
        options.apply(config, self.modules)
        trained = [(name, p) for name, p in loss.named_parameters() if p.requires_grad]
        factors = {name: part.rate_factor for name, part in self.spec.components.items()}
        optimizer = make_optimizer(config, trained, factors)
        self.loss: Any
        self.optimizer: Any
        self.loss, self.optimizer = self.accelerator.prepare(loss, optimizer)
        self.placement = placement_of(self.accelerator, self.optimizer)
        parameters = self._parameters()
        self.averages = {
            average: {name: p.detach().clone() for name, p in parameters.items()} for average in config.averages
        }
        self._measured = Measured(described(self).device, counts=not config.torch_compile)
        return sum(parameter.numel() for parameter in parameters.values())

    @property
    def ema(self) -> dict[str, Tensor] | None:
        """The moving average that samples and exports take, by portable name; None for none."""
        return self.averages[self.average or self.config.averages[0]] if self.averages else None

    def _parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters by portable name, such as unet/conv_in.weight."""
        return {self._portable(name): p for name, p in self.loss.named_parameters() if p.requires_grad}

    def _portable(self, name: str) -> str:
        """Return the portable name of a parameter: unet/conv_in.weight for unet.conv_in.weight, wrapped or not."""
        component, _, inside = name.removeprefix("module.").partition(".")
        return f"{component}/{file_name(self.spec.components[component].kind, inside)}"

    def put(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Start the copy of the micro-batches to the device."""
        count = len(batch["loss_weights"])
        return [
            {key: self._put(value[index]) for key, value in batch.items() if key != "example_index"}
            for index in range(count)
        ]

    def _put(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        kind = self.dtype if tensor.is_floating_point() else torch.int64
        return tensor.to(self.device, kind, non_blocking=True)

    def train_step(
        self, batch: list[dict[str, Tensor]], learning_rate: float, ema_decays: Mapping[str, float]
    ) -> dict[str, Any]:
        """Take one optimizer step."""
        scale = self.placement.loss_scale()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_factor"]
        # Dropout is drawn on the device. Its seed is that of the step, so that interruptions do not change it.
        entropy = np.random.SeedSequence([self.config.seed, self.steps, self.process_index])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        losses: list[dict[str, Tensor]] = []
        norm, means = torch.zeros(()), {"loss": torch.zeros(())}
        skipped = False
        for micro in batch:
            with self.accelerator.accumulate(self.loss), self._measured.counting(micro):
                made = self.loss(micro)
                losses.append({name: loss.detach() for name, loss in made.items()})
                self.accelerator.backward(made["loss"])
                if self.accelerator.sync_gradients:
                    norm = torch.as_tensor(
                        self.accelerator.clip_grad_norm_(self.loss.parameters(), self.config.max_grad_norm)
                    )
                    means = self._means(losses)
                    # Under fp16 the scaler checks the gradients itself.
                    checks = self.config.skip_nonfinite > 0 and self.accelerator.scaler is None
                    skipped = checks and not bool(torch.isfinite(norm + means["loss"]))
                if not skipped:
                    self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=self.config.set_grads_to_none)
        self.steps += 1
        if not (skipped or self.accelerator.optimizer_step_was_skipped):
            self.count += 1
            for average, weights in self.averages.items():
                update_ema(weights, self._parameters(), ema_decays[average])
        metrics = means | {"grad_norm": norm} | self._measured.peak_seconds(batch)
        if scale is not None:
            metrics["loss_scale"] = torch.tensor(scale.scale)
            self.placement.hold_loss_scale()
        return metrics

    def validation_loss(self, average: str | None) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:
        """Return the loss without dropout, with the weights or a moving average of them."""
        modules = self._evaluated(None if average is None else self.averages[average])

        def loss(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            with torch.no_grad(), self.accelerator.autocast():
                return self._means([{"loss": mean_losses(modules, micro)["loss"]} for micro in batch])

        return loss

    def _means(self, losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the means over micro-batches and processes, by name."""
        means = {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}
        return {name: self.accelerator.reduce(mean, reduction="mean") for name, mean in means.items()}

    def set_step(self, step: int) -> None:
        """Set the number of steps taken."""
        self.steps = step

    def read(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Wait for the metrics of a step."""
        return {key: float(value) for key, value in metrics.items()} | device_memory(self.device)

    def state_arrays(self) -> portable.Arrays:
        """Return the whole state as plain arrays on the host; only the first process has any."""
        arrays = {name: value.cpu().numpy().copy() for name, value in self._state() if self.process_index == 0}
        return arrays | self._scalars() if self.process_index == 0 else {}

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield whole weights, moments and averages by portable name; every process must go through all of them."""
        for name, parameter in self._parameters().items():
            yield f"params/{name}", self.placement.weight(parameter).detach()
            for key, value in self.placement.moments(parameter).items():
                yield f"{self._state_names.get(key, key)}/{name}", value.detach()
            for average, weights in self.averages.items():
                yield f"{average}/{name}", whole(weights[name])

    def _scalars(self) -> portable.Arrays:
        scalars: portable.Arrays = {"count": np.asarray(self.count, np.int32)}
        scale = self.placement.loss_scale()
        if scale is not None:
            scalars["loss_scale"] = np.asarray(scale.scale, np.float32)
            scalars["good_steps"] = np.asarray(scale.good_steps, np.int32)
        return scalars

    def _load(self, arrays: portable.Arrays, step: int) -> None:
        """Load a state on every process: the inverse of `state_arrays`."""
        self.count, self.steps = int(arrays["count"]), step
        # Every process takes the same order, because each `put` is a collective operation.
        kinds = sorted({name.partition("/")[0] for name in arrays if "/" in name} - {"params", *self.averages})
        torch_keys = {
            kind: next((key for key, short in self._state_names.items() if short == kind), kind) for kind in kinds
        }
        for name, parameter in self._parameters().items():
            moments = {
                key: torch.tensor(arrays[f"{kind}/{name}"])
                for kind, key in torch_keys.items()
                if f"{kind}/{name}" in arrays
            }
            self.placement.put(parameter, torch.tensor(arrays[f"params/{name}"]), moments, self.count)
            for average, weights in self.averages.items():
                weights[name].copy_(divided_as(weights[name], torch.tensor(arrays[f"{average}/{name}"])))
        if "loss_scale" in arrays:
            self.placement.set_loss_scale(LossScale(float(arrays["loss_scale"]), int(arrays["good_steps"])))

    def save(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Copy the state to the host, and write it in the background.

        The copy's memory is kept for the next save, because touching it for the first time takes longer than filling
        it. For a GPU it is pinned, which makes copies faster.
        """
        for name, value in self._state():
            if self.process_index == 0:
                if name not in self._host_copy:
                    self._host_copy[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._host_copy[name].copy_(value, non_blocking=value.is_cuda)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.process_index == 0:
            arrays = {name: tensor.numpy() for name, tensor in self._host_copy.items()} | self._scalars()
            self._writing = self._writer.submit(portable.write, folder, arrays, metadata)

    def state_bytes(self) -> int:
        """Return the bytes of weights, moments and averages over all processes."""
        moments = len(self._state_names) * (1 if self.config.use_8bit_adam else 4)
        kept = 1 + len(self.averages)
        return sum(p.numel() * (p.element_size() * kept + moments) for p in self._parameters().values())

    def wait(self) -> None:
        """Wait until the last save is written."""
        if self._writing is not None:
            self._writing.result()

    def all_processes(self, condition: bool) -> bool:
        """Return whether a condition is true in all processes."""
        answers = self.accelerator.gather(torch.tensor([condition], device=self.device))
        return bool(answers.all())

    def broadcast_from_first(self, value: int) -> int:
        """Return the first process's value in all processes."""
        return int(broadcast(torch.tensor([value], device=self.device))[0])  # pyright: ignore[reportArgumentType]

    def should_stop(self, requested: bool, step: int) -> bool:
        """Return whether any process is told to end; hosts exchange this without waiting for the devices."""
        if self.process_count == 1:
            return requested
        if self._hosts is None:
            self._hosts = torch.distributed.new_group(backend="gloo")
        any_request = torch.tensor(int(requested))
        torch.distributed.all_reduce(any_request, torch.distributed.ReduceOp.MAX, self._hosts)
        return bool(any_request)

    def check(self, folder: Path) -> None:
        """Compare a checkpoint of either backend with the state."""
        kinds = ["params", *self._state_names.values(), *self.averages]
        want = {f"{kind}/{name}": tuple(p.shape) for kind in kinds for name, p in self._parameters().items()}
        want |= dict.fromkeys(self._scalars(), ())
        shapes = portable.shapes(folder)
        have = {name: shape for name, shape in shapes.items() if not name.startswith(EIGHT_BIT_TABLES)}
        check_same_shapes(have, want, folder)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint of either backend."""
        self.check(folder)
        arrays, metadata = portable.read(folder)
        self._load(arrays, metadata["step"])
        return metadata

    def sample(self, **options: Any) -> np.ndarray:
        """Draw images with the moving average, or with the weights themselves where there is none."""
        return np.concatenate([*self.draw(**options)])

    def draw(self, **options: Any) -> Iterator[np.ndarray]:
        """Draw images as `sample` does, a batch at a time."""
        with self._sampling_modules() as modules:
            yield from Sampler(modules, self._scheduler, self.device).batches(**options)

    @torch.no_grad()
    def embed_prompts(self, prompts: list[str]) -> dict[str, np.ndarray]:
        """Encode prompts to float32 arrays (N, …)."""
        tokenize = self.spec.tokenize
        assert tokenize is not None
        ids = tokenize.stacked(prompts)
        made = self.modules.condition({name: torch.from_numpy(rows).to(self.device) for name, rows in ids.items()})
        wide = torch.promote_types(self.dtype, torch.float32)
        return {name: made[name].to(wide).cpu().numpy() for name in self.spec.family.prompt_arrays}

    @torch.no_grad()
    def posteriors(self, pixels: np.ndarray) -> np.ndarray:
        """Encode images to means and log variances of their latents."""
        with self.accelerator.autocast():
            posterior = self.modules.posterior(self._put(pixels))
        made = self.accelerator.gather(torch.stack([posterior.mean, posterior.logvar], dim=1))
        return made.to(torch.promote_types(self.dtype, torch.float32)).cpu().numpy()

    @contextmanager
    def profiled(self, folder: Path) -> Iterator[None]:
        """Record what is computed, on the CPU and on CUDA."""
        with torch.profiler.profile(on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder))):
            yield

    def release(self, name: str) -> None:
        """Move a frozen component to the host; samples bring it back."""
        self.modules.by_name[name].to("cpu")
        self._released.add(name)

    def trained_arrays(self) -> portable.Arrays:
        """Return the trained weights, averaged if there is an average, by component and PyTorch name."""
        return {name: value.detach().cpu().numpy() for name, value in self._whole(self.ema)}

    def encode(self, pixels: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Encode images to scaled latents."""
        with self._sampling_modules() as modules:
            return modules.encode_images(self._put(pixels), self._put(noise)).float().cpu().numpy()

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Decode scaled latents to pictures."""
        with self._sampling_modules() as modules:
            return to_uint8(modules, self._put(latents))

    def export(self, folder: Path, *, only_trained: bool = False) -> None:
        """Write the components' float32 weights."""
        for name, component in self.spec.components.items():
            if only_trained and not component.is_trained:
                continue
            trained = None
            if component.is_trained:  # of which every process may have a part
                trained = finished(name, component, self._whole(self.ema))
            if self.process_index == 0:
                module = load(component) if trained is None else trained
                module.save_pretrained(folder / name, safe_serialization=True)

    def _whole(self, ema: Mapping[str, Tensor] | None) -> Iterator[tuple[str, Tensor]]:
        """Yield whole weights, or those of an average, by portable name; every process must go through all of them."""
        for name, parameter in self._parameters().items():
            yield name, self.placement.weight(parameter) if ema is None else whole(ema[name])

    @contextmanager
    def _sampling_modules(self) -> Iterator[Modules]:
        """Yield modules with the moving average if there is one; the modules that train are not changed."""
        released = on_device(self.modules, self._released, self.device)
        with released, torch.no_grad(), self.accelerator.autocast():
            yield self._evaluated(self.ema)

    def _evaluated(self, ema: Mapping[str, Tensor] | None) -> Modules:
        """Return the modules in evaluation mode, around the weights or an average of them."""
        parameters, by_name = self._parameters(), {}
        average = {} if ema is None else {id(p): ema[full] for full, p in parameters.items()}
        for name, component in self.spec.components.items():
            if not component.is_trained:
                continue
            if self.accelerator.distributed_type == DistributedType.FSDP:  # a part of what it wraps cannot be called
                by_name[name] = finished(name, component, self._whole(ema)).to(self.device).eval()
            else:
                by_name[name] = evaluated(self.modules.by_name[name], average)
        return replace(self.modules, by_name=self.modules.by_name | by_name)
