"""The PyTorch backend: Diffusers' and Transformers' models, stepped, wrapped and saved through Accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

from flax_diffusion.core import portable
from flax_diffusion.core.backend import Batch
from flax_diffusion.core.checkpoints import check_same_shapes
from flax_diffusion.core.config import TrainConfig
from flax_diffusion.core.pipeline import PipelineSpec
from torch_backend import options
from torch_backend.modules import COMPUTE_DTYPES, build_modules, file_name, load
from torch_backend.sampling import Sampler, scheduler_from_config
from torch_backend.train_step import DiffusionLoss, update_ema

MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq"}
"""AdamW's moments, by the portable name and by PyTorch's."""

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class TorchBackend:
    """Implements `core.backend.Backend`.

    Args:
        config: The run's options.
        spec: The pipeline.
        dtype: Of the trained weights and, without mixed precision, of all computation.

    Raises:
        ConfigError: For an option that this backend, this machine or this installation does not have.
    """

    def __init__(self, config: TrainConfig, spec: PipelineSpec, dtype: torch.dtype = torch.float32):
        options.check(config)
        self.config, self.spec, self.dtype = config, spec, dtype
        AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
        self.accelerator: Any = Accelerator(
            mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.gradient_accumulation_steps
        )
        options.check_distribution(self.accelerator)
        self.process_index: int = self.accelerator.process_index
        self.process_count: int = self.accelerator.num_processes
        self.device_count: int = self.process_count
        self.device: torch.device = self.accelerator.device
        self._scheduler = scheduler_from_config(spec.scheduler)
        self.count = self.steps = 0

    def init_state(self) -> int:
        """Loads or draws the weights and wraps them as Accelerate's configuration says."""
        config = self.config
        options.set_globals(config)
        frozen = COMPUTE_DTYPES[config.mixed_precision] if config.mixed_precision != "no" else self.dtype
        self.modules = build_modules(
            self.spec, seed=config.seed, frozen_dtype=frozen, trained_dtype=self.dtype, device=self.device
        )
        loss = DiffusionLoss(self.modules)
        options.apply(config, self.modules)
        optimizer = options.make_optimizer(config, [p for p in loss.parameters() if p.requires_grad])
        self.loss: Any
        self.optimizer: Any
        self.loss, self.optimizer = self.accelerator.prepare(loss, optimizer)
        self.ema: dict[str, Tensor] | None = None
        if config.use_ema:
            self.ema = {name: p.detach().clone() for name, p in self._parameters().items()}
        return sum(parameter.numel() for parameter in self._parameters().values())

    def _parameters(self) -> dict[str, Tensor]:
        """Trained parameters by portable name, such as unet/conv_in.weight."""
        return {self._portable(name): p for name, p in self.loss.named_parameters() if p.requires_grad}

    def _portable(self, name: str) -> str:
        """`unet.conv_in.weight`, however wrapped, to `unet/conv_in.weight`."""
        component, _, inside = name.removeprefix("module.").partition(".")
        return f"{component}/{file_name(self.spec.components[component].kind, inside)}"

    def put(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Starts the copy of the micro-batches to the device."""
        count = len(batch["timesteps"])
        return [
            {key: self._put(value[index]) for key, value in batch.items() if key != "example_index"}
            for index in range(count)
        ]

    def _put(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        kind = self.dtype if tensor.is_floating_point() else torch.int64
        return tensor.to(self.device, kind, non_blocking=True)

    def train_step(self, batch: list[dict[str, Tensor]], learning_rate: float, ema_decay: float) -> dict[str, Tensor]:
        """Takes one optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # Dropout is drawn on the device; seeded by the step, it does not depend on where the run was interrupted.
        entropy = np.random.SeedSequence([self.config.seed, self.steps, self.process_index])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        losses, norm = [], torch.zeros(())
        for micro in batch:
            with self.accelerator.accumulate(self.loss):
                loss = self.loss(micro)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.loss.parameters(), self.config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=self.config.set_grads_to_none)
            losses.append(loss.detach())
        self.steps += 1
        if not self.accelerator.optimizer_step_was_skipped:
            self.count += 1
            if self.ema is not None:
                update_ema(self.ema, self._parameters(), ema_decay)
        mean = self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
        metrics = {"loss": mean, "grad_norm": norm}
        if self.accelerator.scaler is not None:
            metrics["loss_scale"] = torch.tensor(self.accelerator.scaler.get_scale())
        return metrics

    def read(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Waits for a step's numbers."""
        return {key: float(value) for key, value in metrics.items()}

    def state_arrays(self) -> portable.Arrays:
        """The whole state as plain arrays on the host; nothing on processes other than the first."""
        weights, optimizer = get_state_dict(self.loss, self.optimizer.optimizer, options=WHOLE)
        if self.process_index != 0:
            return {}
        arrays = {f"params/{self._portable(name)}": value for name, value in weights.items()}
        for name, values in cast("dict[str, Any]", optimizer)["state"].items():
            for short, key in MOMENTS.items():
                arrays[f"{short}/{self._portable(name)}"] = values[key]
        if self.ema is not None:
            arrays |= {f"ema/{name}": value for name, value in self.ema.items()}
        host = {name: cast("Tensor", value).detach().cpu().numpy().copy() for name, value in arrays.items()}
        return host | self._scalars()

    def _scalars(self) -> portable.Arrays:
        scalars: portable.Arrays = {"count": np.asarray(self.count, np.int32)}
        if self.accelerator.scaler is not None:
            scale = self.accelerator.scaler.state_dict()
            scalars["loss_scale"] = np.asarray(scale["scale"], np.float32)
            scalars["good_steps"] = np.asarray(scale["_growth_tracker"], np.int32)
        return scalars

    def _load(self, arrays: portable.Arrays, step: int) -> None:
        """Takes over a state: the inverse of `state_arrays`, on every process."""
        count = torch.tensor(float(arrays["count"]))
        weights, moments = {}, {}
        for wrapped, parameter in self.loss.named_parameters():
            if parameter.requires_grad:
                name, short = wrapped.removeprefix("module."), self._portable(wrapped)
                weights[name] = torch.tensor(arrays[f"params/{short}"])
                moments[name] = {key: torch.tensor(arrays[f"{kind}/{short}"]) for kind, key in MOMENTS.items()}
                moments[name]["step"] = count.clone()
        groups = get_optimizer_state_dict(self.loss, self.optimizer.optimizer)["param_groups"]
        set_state_dict(
            self.loss,
            self.optimizer.optimizer,
            model_state_dict=weights,
            optim_state_dict=cast("Any", {"state": moments, "param_groups": groups}),
            options=StateDictOptions(full_state_dict=True),
        )
        if self.ema is not None:
            for name, average in self.ema.items():
                average.copy_(torch.tensor(arrays[f"ema/{name}"]))
        if self.accelerator.scaler is not None:
            scaler = self.accelerator.scaler
            values = {"scale": float(arrays["loss_scale"]), "_growth_tracker": int(arrays["good_steps"])}
            scaler.load_state_dict(scaler.state_dict() | values)
        self.count, self.steps = int(arrays["count"]), step

    def save(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Writes the state; the folder gets its name only when it is complete."""
        arrays = self.state_arrays()
        if self.process_index == 0:
            portable.write(folder, arrays, metadata)

    def wait(self) -> None:
        """Waits until every process has come here: the last save is then complete."""
        self.accelerator.wait_for_everyone()

    def restore(self, folder: Path) -> dict[str, Any]:
        """Loads a checkpoint of either backend."""
        arrays, metadata = portable.read(folder)
        kinds = ["params", *MOMENTS, *(["ema"] if self.ema is not None else [])]
        want = {f"{kind}/{name}": tuple(p.shape) for kind in kinds for name, p in self._parameters().items()}
        want |= dict.fromkeys(self._scalars(), ())
        check_same_shapes({name: tuple(array.shape) for name, array in arrays.items()}, want, folder)
        self._load(arrays, metadata["step"])
        return metadata

    def sample(
        self, *, prompts: list[str], num_images: int, num_inference_steps: int, guidance_scale: float, seed: int
    ) -> np.ndarray:
        """Draws images with the moving average, or with the weights themselves where there is none."""
        with self._averaged():
            return Sampler(self.modules, self._scheduler, self.device)(
                prompts=prompts,
                num_images=num_images,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                seed=seed,
            )

    def export(self, folder: Path) -> None:
        """Writes every component's float32 weights."""
        with self._averaged():
            for name, component in self.spec.components.items():
                if self.process_index == 0:
                    module = self.modules.by_name[name] if component.train else load(component)
                    module.save_pretrained(folder / name, safe_serialization=True)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The trained modules hold the moving average meanwhile, if there is one."""
        parameters = self._parameters() if self.ema is not None else {}
        kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        modes = {name: module.training for name, module in self.modules.by_name.items()}
        with torch.no_grad(), self.accelerator.autocast():
            for name, parameter in parameters.items():
                parameter.copy_((self.ema or {})[name])
            for module in self.modules.by_name.values():
                module.eval()
            try:
                yield
            finally:
                for name, parameter in parameters.items():
                    parameter.copy_(kept[name])
                for name, module in self.modules.by_name.items():
                    module.train(modes[name])
