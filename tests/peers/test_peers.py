"""Every public method of the drop-in classes gives what it gave in Diffusers 0.39 and Transformers 4.57.

`known.py` lists what is not the same, and why.
"""

import re

import model_calls  # noqa: F401
import pipeline_calls  # noqa: F401
import pytest
import scheduler_calls  # noqa: F401
import transformers_calls  # noqa: F401
from known import ABSENT, KNOWN, NOT_CALLED
from outcomes import SAME, compare, explain
from registry import CALLS

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("name", CALLS)
def test_call(name, given, figure):
    expected = KNOWN.get(name, (SAME, SAME, ""))
    found = tuple(compare(name, given, side)[0] for side in ("reference", "mended"))
    said = "".join(f"\n{side}: {compare(name, given, side)}: {explain(name, given, side)}" for side in given)
    assert found == expected[:2], said
    cls, method = re.fullmatch(r"(\w+)\.(\w+)(?:[:,].*)?", name).groups()
    figure(f"{cls:38} {method:22}", expected[2] or SAME)


def test_every_method_is_called(given, figure):
    """Every public method of 0.39's classes has a call here, or a reason why it has none."""
    called = {re.match(r"\w+\.\w+", name)[0] for name in CALLS}
    missing = set()
    for cls, methods in given["reference"]["methods"].items():
        ours = given["ours"]["methods"][cls]
        for method in set(methods) - set(ours):
            missing.add(method)
            assert method in ABSENT, f"{cls} has no {method}"
        for method in set(methods) & set(ours) - set(NOT_CALLED):
            assert f"{cls}.{method}" in called, f"no call of {cls}.{method}"
    assert missing == set(ABSENT)
    for method, why in ABSENT.items():
        figure(f"{'(classes that had it)':38} {method:22}", f"absent: {why}")


def test_known_names_are_calls():
    assert set(KNOWN) <= set(CALLS)
