"""Opening of the model that a user names: a pipeline, a run that trained part of one, or a checkpoint of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flax_diffusion.core.checkpoints import folders
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.config.options import CONFIG_FILE, TrainConfig
from flax_diffusion.core.errors import CheckpointError, WeightsError
from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.spec.adapters import EMBEDDINGS_FILE, LORA_FILE, file_names
from flax_diffusion.core.spec.merging import Shapes, with_adapters, with_checkpoint, with_learnt_word
from flax_diffusion.core.spec.pipeline import PipelineSpec, Training, open_pipeline
from flax_diffusion.core.tasks.task import TASKS, task_of


def open_model(source: str, shapes: Shapes, revision: str | None = None, variant: str | None = None) -> PipelineSpec:
    """Open a model, to draw from it or to write it in another format.

    Args:
        source: Folder or Hub id of a pipeline; or folder of a run of LoRA or textual inversion, or of a checkpoint in
            a run, which stand for the pipeline that the run's config.yaml names, with what was trained.
        shapes: Gives the shapes of a pipeline's parameters.
        revision: Branch, tag or commit of a Hub id.
        variant: Variant of the weight files of a pipeline.

    Returns:
        The pipeline.

    Raises:
        UserError: If it is none of these.
    """
    folder = as_path(source)
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return open_pipeline(source, revision, variant)
    if _is_checkpoint(folder):
        return _open_run(folder.parent, folder, shapes)
    if (folder / CONFIG_FILE).is_file():
        return _open_run(folder, None, shapes)
    for file, option in ((LORA_FILE, "--lora"), (EMBEDDINGS_FILE, "--embeddings")):
        if (folder / file).is_file():
            raise WeightsError(f"{source}: holds {file} and no model: give it by {option}, and its model by --model")
    return open_pipeline(source, revision, variant)


def _is_checkpoint(folder: Path) -> bool:
    try:
        folders.step_of(folder)
    except CheckpointError:
        return False
    return True


def _open_run(run: Path, checkpoint: Path | None, shapes: Shapes) -> PipelineSpec:
    """Open the pipeline that a run trains, with the weights of one of its checkpoints, or of its end."""
    if not (run / CONFIG_FILE).is_file():
        raise WeightsError(
            f"{checkpoint}: is a checkpoint without its run, whose {CONFIG_FILE} names the model: give that model by "
            "`convert --model MODEL --checkpoint`"
        )
    trained = task_of(_read_config(run)).reopen_spec(run)
    if checkpoint is not None:
        spec = with_checkpoint(trained, checkpoint)
    else:
        spec = _with_results(run, trained, shapes)
    done = {
        name: replace(part, training=Training.NOTHING, lora=None, new_tokens=None)
        for name, part in spec.components.items()
    }
    return replace(spec, components=done)


def _with_results(run: Path, trained: PipelineSpec, shapes: Shapes) -> PipelineSpec:
    files = file_names(trained.adapters_name)
    if not any((run / file).is_file() for file in files):
        saved = [str(folder) for folder in folders.committed(run)]
        fix = f"give one of its checkpoints: {', '.join(saved)}" if saved else "it has no checkpoint either; train on"
        raise WeightsError(f"{run}: is a run that has written no model yet: {fix}")
    encoder = trained.text_encoder
    if encoder is not None and encoder.new_tokens is not None:
        return with_learnt_word(trained, run / files.embeddings)
    return with_adapters(trained, shapes, [str(run / files.lora)], 1.0, [])


def _read_config(run: Path) -> TrainConfig:
    file = run / CONFIG_FILE
    values = command_line.read_yaml(file)
    task = str(values.pop("task", None))
    if task not in TASKS:
        raise WeightsError(f"{file}: names the task {task}, must be one of {', '.join(TASKS)}")
    return command_line.merge(task, values, {}, str(file))
