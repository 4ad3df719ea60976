"""Shared by all tests: a CPU with eight virtual devices, and tiny pipelines."""

import os

# Before jax is imported anywhere: the mesh tests need several devices, the others do not mind.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
