import pytest

from flax_diffusion.core import checkpoints
from flax_diffusion.core.errors import CheckpointError


@pytest.fixture
def run(tmp_path):
    for name in ("checkpoint-5", "checkpoint-40", "checkpoint-100", "checkpoint-x", "samples"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-200.orbax-checkpoint-tmp-1").mkdir()
    (tmp_path / "checkpoint-300").write_text("a file, not a checkpoint")
    return tmp_path


def test_only_complete_folders_count_in_order_of_steps(run):
    assert [path.name for path in checkpoints.committed(run)] == ["checkpoint-5", "checkpoint-40", "checkpoint-100"]


def test_what_to_resume(run, tmp_path_factory):
    assert checkpoints.to_resume(run, None) is None
    assert checkpoints.to_resume(run, "latest") == run / "checkpoint-100"
    assert checkpoints.to_resume(run, "checkpoint-40") == run / "checkpoint-40"
    assert checkpoints.to_resume(run, str(run / "checkpoint-5")) == run / "checkpoint-5"
    assert checkpoints.to_resume(tmp_path_factory.mktemp("empty"), "latest") is None
    with pytest.raises(CheckpointError, match=r"checkpoint-41: not in .*checkpoint-40"):
        checkpoints.to_resume(run, "checkpoint-41")


def test_rotation_keeps_the_newest(run):
    checkpoints.rotate(run, None)
    assert len(checkpoints.committed(run)) == 3
    checkpoints.rotate(run, 2)
    assert [path.name for path in checkpoints.committed(run)] == ["checkpoint-40", "checkpoint-100"]


def test_leftovers_of_a_killed_save_go(run):
    checkpoints.clear_leftovers(run)
    assert not (run / "checkpoint-200.orbax-checkpoint-tmp-1").exists()
    assert len(checkpoints.committed(run)) == 3
