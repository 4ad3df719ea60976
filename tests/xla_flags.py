"""How tests have programs compiled: quickly."""

QUICK = " ".join([
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
])  # fmt: skip
"""Flags for tiny programs, which run for milliseconds and compile for seconds.

They are compiled without optimizers, by the emitters that are quickest to write, and in one part.
"""
