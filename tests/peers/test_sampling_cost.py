"""What drawing costs on a TPU, beside 0.39: `python -m pytest -m "peers and tpu_compile" -s tests/peers`.

Both pipelines are compiled by the TPU's compiler, one after the other: half an hour, and up to 14 GB.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sampling_cost import IMAGES

from tpu import hlo, kernels
from tpu.chips import CHIPS

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


def test_half_the_time_and_less(compiled, figure):
    chip, spent = CHIPS["v5e"], {}
    for side, operations in compiled.items():
        seconds = sum(operation.cycles / chip.clock for operation in operations if operation.kernel is None)
        for operation in operations:
            if operation.kernel is not None:
                one = kernels.seconds(operation.kernel, chip)
                assert one is not None, operation.kernel
                seconds += operation.count * one
        spent[side] = seconds / IMAGES
    ratio = spent["ours"] / spent["0.39"]
    figure("20", f"50 steps of SD 1.5 at 512 pixels on v5e: {spent['ours']:.3f} s an image, {ratio:.2f} of 0.39's")
    assert ratio <= 0.4
