"""Shared by all tests: a CPU with eight virtual devices, and tiny pipelines."""

import gc
import os
from collections import Counter

import pytest
from xla_flags import QUICK

# Before jax is imported anywhere: the mesh tests need several devices, the others do not mind.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = f" --xla_force_host_platform_device_count=8 {QUICK}"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: PyTorch's threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def figure(record_property):
    """Puts a line into the table that the tests end with: what was measured, and what came out."""
    return lambda name, text: record_property("figure", (f"{name:>3}", text))


def pytest_terminal_summary(terminalreporter):
    """Prints the table."""
    passed = terminalreporter.getreports("passed")
    rows = Counter(tuple(row) for report in passed for name, row in report.user_properties if name == "figure")
    if rows:
        terminalreporter.section("figures")
        for (name, text), times in sorted(rows.items()):
            terminalreporter.write_line(f"{name}  {text}" + (f" ({times} times)" if times > 1 else ""))


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Programs that several tests compile are compiled once a session, by whichever worker or process comes first."""
    import jax

    session = tmp_path_factory.getbasetemp()
    session = session.parent if "PYTEST_XDIST_WORKER" in os.environ else session
    settings = {"compilation_cache_dir": str(session / "xla"), "persistent_cache_min_compile_time_secs": 0.2}
    for name, value in settings.items():
        jax.config.update(f"jax_{name}", value)
        os.environ[f"JAX_{name.upper()}"] = str(value)


@pytest.fixture(scope="module", autouse=True)
def _do_not_look_again():
    """What a module has imported and compiled stays: the garbage collector need not go through it in every test."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_device():
    """Runs use one of the virtual devices; the mesh tests, which ask before this is set up, name theirs."""
    import jax

    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: first)
        yield
