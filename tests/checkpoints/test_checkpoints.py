import json
import shutil
from pathlib import Path

import pytest

from flax_diffusion.core.checkpoints import folders, portable
from flax_diffusion.core.errors import CheckpointError


def save(output_dir, step, text="state"):
    folder = folders.checkpoint_folder(output_dir, step)
    folders.make_room(folder)
    (folders.unsealed(folder) / "deep").mkdir(parents=True)
    for name in ("state", "deep/part"):
        (folders.unsealed(folder) / name).write_text(f"{text} of {step}")
    folders.seal(folder)
    return folder


@pytest.fixture
def run(tmp_path):
    for step in (5, 100, 40):
        save(tmp_path, step)
    for name in ("checkpoint-x", "samples", "checkpoint-200.partial", "checkpoint-7.partial.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-300").write_text("a file, not a checkpoint")
    return tmp_path


def names(folders):
    return [folder.name for folder in folders]


def test_only_sealed_folders_count_in_order_of_steps(run):
    assert names(folders.committed(run)) == ["checkpoint-5", "checkpoint-40", "checkpoint-100"]


def test_a_checkpoint_by_name_and_path(run):
    assert folders.find(run, "checkpoint-40") == run / "checkpoint-40"
    assert folders.find(run, str(run / "checkpoint-5")) == run / "checkpoint-5"
    with pytest.raises(CheckpointError, match=r"checkpoint-41: not in .*checkpoint-40"):
        folders.find(run, "checkpoint-41")
    with pytest.raises(CheckpointError, match="has no checkpoint's name"):
        folders.find(run, "samples")


def test_rotation_keeps_the_newest(run):
    folders.rotate(run, None, run / "checkpoint-100")
    assert len(folders.committed(run)) == 3
    folders.rotate(run, 2, run / "checkpoint-100")
    assert names(folders.committed(run)) == ["checkpoint-40", "checkpoint-100"]


def test_leftovers_of_a_killed_save_go(run):
    folders.clear_leftovers(run)
    assert not [*run.glob("*.partial*")]
    assert len(folders.committed(run)) == 3


def text_of(folder):
    assert folders.find_damage(folder) is None
    return (folder / "state").read_text()


def test_a_checkpoint_does_not_delete_one_of_its_name(run):
    first, second = (save(run, 40, text) for text in ("second", "third"))
    assert first == second
    assert text_of(first) == "third of 40"
    assert [text_of(folder) for folder in folders.abandoned(run)] == ["state of 40", "second of 40"]
    assert names(folders.abandoned(run)) == ["checkpoint-40.abandoned", "checkpoint-40.abandoned.2"]


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_while_it_takes_its_name(run, monkeypatch, renames):
    """Whichever of its renames is the last one, both the new one and the one of its name are there after a restart."""
    real, left = Path.rename, renames

    def rename(path, target):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr(shutil, "move", rename)
        with pytest.raises(KeyboardInterrupt):
            save(run, 40, "new")
    folders.finish_seals(run)
    here = text_of(run / "checkpoint-40")
    folders.clear_leftovers(run)
    assert here == ("new of 40" if renames else "state of 40")
    assert text_of(run / "checkpoint-40") == here
    assert len(folders.abandoned(run)) == renames


def test_rotation_keeps_what_was_just_sealed(run):
    folders.rotate(run, 2, save(run, 7))
    assert names(folders.committed(run)) == ["checkpoint-7", "checkpoint-100"]
    folders.rotate(run, 1, save(run, 3))
    assert names(folders.committed(run)) == ["checkpoint-3"]


def test_a_checkpoint_knows_its_parent(run):
    first = folders.identity_of(run / "checkpoint-5")
    folder = folders.checkpoint_folder(run, 8)
    folders.unsealed(folder).mkdir()
    folders.seal(folder, first)
    parents = [json.loads((one / "manifest.json").read_text())["parent"] for one in (folder, run / "checkpoint-5")]
    assert parents == [first, None]
    assert first.startswith("checkpoint-5@")
    assert first != folders.identity_of(save(run, 5, "another"))


DAMAGES = {
    "state is missing": lambda folder: (folder / "state").unlink(),
    "deep/part is missing": lambda folder: shutil.rmtree(folder / "deep"),
    "state is not what was written": lambda folder: (folder / "state").write_text("State of 100"),
    "deep/part is not what was written": lambda folder: (folder / "deep/part").write_text(""),
    "manifest.json is missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda folder: (folder / "manifest.json").write_text('{"sha256": ['),
    "state cannot be read": lambda folder: ((folder / "state").unlink(), (folder / "state").mkdir()),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_the_one_before_a_damaged_one_is_used(run, caplog, what):
    DAMAGES[what](run / "checkpoint-100")
    with pytest.raises(CheckpointError, match=f"checkpoint-100: {what}.*; use another checkpoint"):
        folders.require_whole(run / "checkpoint-100")
    assert folders.newest_whole(run) == run / "checkpoint-40"
    assert f"checkpoint-100: {what}" in caplog.text
    assert "set aside as checkpoint-100.damaged" in caplog.text
    assert names(folders.committed(run)) == ["checkpoint-5", "checkpoint-40"]
    assert folders.newest_whole(run) == run / "checkpoint-40"


def test_a_run_with_damaged_ones_alone_does_not_start_anew(run, tmp_path_factory):
    assert folders.newest_whole(tmp_path_factory.mktemp("empty")) is None
    for folder in folders.committed(run):
        (folder / "state").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint is whole \(checkpoint-100: state is missing; check"):
            folders.newest_whole(run)
    assert len(folders.committed(run)) == 3
    (run / "checkpoint-100").rename(run / "checkpoint-100.damaged")
    for folder in folders.committed(run):
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole \(checkpoint-100.damaged was set aside\)"):
        folders.newest_whole(run)


def test_a_folder_that_holds_no_arrays(run):
    for read in (portable.read, portable.shapes):
        with pytest.raises(
            CheckpointError, match=r"checkpoint-5: not a complete checkpoint \(.*\); resume from anothe"
        ):
            read(run / "checkpoint-5")
