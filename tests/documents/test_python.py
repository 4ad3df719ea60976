"""The Python of the documents runs as it stands there."""

import re

import pytest
from tiny import ONE_BLOCK, UNET

from flax_diffusion.core.checkpoints import folders


@pytest.fixture
def section(request, tmp_path, monkeypatch):
    """The blocks of Python in a section of configs/README.md; the recipes are where they expect them."""
    text = (request.config.rootpath / "configs/README.md").read_text()
    (tmp_path / "configs").symlink_to(request.config.rootpath / "configs")
    monkeypatch.chdir(tmp_path)
    found = re.search(r"^## From Python\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return re.findall(r"```python\n(.*?)```", found[1], re.DOTALL)


def test_a_loop_of_ones_own(section, tmp_path, capsys):
    from diffusers import DDPMPipeline

    block, batch = section[-1], '"train_batch_size": 8'
    assert len([line for line in block.splitlines() if line]) == 20
    assert batch in block
    names: dict = {"UNET": UNET | ONE_BLOCK}
    exec(block.replace(batch, f'{batch}, "unet": UNET'), names)  # noqa: S102
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == [str(step) for step in range(1, 11)]
    losses = [float(re.search(r"'loss': ([0-9.]+)", line)[1]) for line in said]
    assert losses[-1] < losses[0]
    assert names["pictures"].shape == (4, 8, 8, 1)
    DDPMPipeline.from_pretrained(tmp_path / "runs/own_loop")


def test_training(section, tmp_path, capsys):
    """With fewer steps, and as many callbacks as before."""
    block = section[0]
    for long, short in (('"max_train_steps": 500', '"max_train_steps": 2, "train_batch_size": 8'), ("% 50", "% 2"),
                        ("num_inference_steps=50", "num_inference_steps=2")):  # fmt: skip
        assert long in block
        block = block.replace(long, short)
    names: dict = {"UNET": UNET | ONE_BLOCK}
    exec(block.replace("**options", "**options, unet=UNET, validation_num_inference_steps=2, eval_batch_size=4"), names)  # noqa: S102
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"2 {names['run'].metrics['loss']}"
    assert said[-1].endswith("runs/python/samples/00000002.png runs/python/checkpoint-2")
    assert [picture.size for picture in names["pictures"]] == [(8, 8)] * 16
    assert [path.name for path in folders.committed(tmp_path / "runs/python")] == ["checkpoint-2"]
