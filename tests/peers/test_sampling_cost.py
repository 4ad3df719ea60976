"""What drawing costs on a TPU, beside 0.39: `python -m pytest -m "peers and tpu_compile" -s tests/peers`.

Both pipelines are compiled by the TPU's compiler, one after the other: half an hour, and up to 14 GB.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sampling_cost import IMAGES

from tpu import hlo, kernels
from tpu.chips import CHIPS

CHIP = CHIPS["v5e"]
pytestmark = [pytest.mark.peers, pytest.mark.tpu_compile]
HERE = Path(__file__).parent


@pytest.fixture
def compiled(request, reference_python, tmp_path):
    """The scheduled operations of the sampling, by side."""
    import libtpu

    # Of our environment the other one gets the compiler alone.
    (tmp_path / "libtpu").symlink_to(Path(libtpu.__file__).parent)
    bare = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    found = {}
    for side, python, root in (("ours", sys.executable, request.config.rootpath), ("0.39", reference_python, "")):
        path = os.pathsep.join(filter(None, (str(root), str(tmp_path))))
        out = tmp_path / f"{side}.hlo"
        name = "ours" if side == "ours" else "reference"
        command = [python, HERE / "sampling_cost.py", name, request.config.rootpath / "tests/models/configs", out]
        subprocess.run(command, check=True, env=bare | {"PYTHONPATH": path})
        found[side] = hlo.operations(out.read_text())
    return found


def seconds(operation):
    """The time of an operation by the compiler's cycles, or of a kernel by `tpu.kernels`.

    The compiler puts kernels of its own into 0.39's attention, and says nothing of their cost. They take at least the
    time to read their operands, bfloat16.
    """
    if operation.kernel is None:
        return operation.cycles / CHIP.clock
    one = kernels.seconds(operation.kernel, CHIP)
    if one is None:
        assert operation.kernel.name == "online-softmax", operation.kernel
        read = 2 * sum(map(math.prod, operation.kernel.shapes))
        one = read / (kernels.COPY_EFFICIENCY * CHIP.bandwidth)
    return operation.count * one


def test_it_takes_less_than_half_of_the_time(compiled, figure):
    """Half of ours are convolutions and feed-forward layers, which both have alike."""
    ours, theirs = (sum(map(seconds, operations)) / IMAGES for operations in compiled.values())
    figure("20", f"50 steps of SD 1.5 at 512 pixels on v5e: {ours:.2f} s an image, 0.39 takes {theirs:.2f}")
    assert ours <= 0.5 * theirs
