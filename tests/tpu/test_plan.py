"""The plan: what it reads from a program's text, what the TPU compiler says, and what cannot be planned."""

import os
import subprocess
import sys

import pytest

from flax_diffusion.core.errors import ConfigError
from tpu import hlo, plan, topologies
from tpu.chips import CHIPS

TEXT = """HloModule jit_step

%fused (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %all-reduce.1 = bf16[8,4]{1,0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

%body (t: (s32[], f32[16])) -> (s32[], f32[16]) {
  %t = (s32[], f32[16]{0:T(8)}) parameter(0)
  ROOT %work = (s32[], f32[16]{0}) fusion(%t), kind=kLoop, calls=%inner, metadata={op_name="jit(step)/while/body/UNet/conv_in/add"}, backend_config={"estimated_cycles":"100"}
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %loop = (s32[], f32[16]{0}) while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %gather = (f32[4]{0:T(128)}, f32[16]{0:T(128)S(1)}, /*index=2*/f32[4]{0}, f32[16]{0}) all-gather-start(%x, %y), metadata={op_name="jit(step)/transpose(jvp(UNet))/conv_in/dot_general"}
  %fusion.7 = bf16[8,4]{1,0} fusion(%z), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/transpose(jvp(UNet))/mid/attn1/to_q/dot_general"}, backend_config={"estimated_cycles":"7"}
  ROOT %done = f32[16]{0} all-gather-done(%gather)
}
"""  # noqa: E501


def test_what_a_program_does():
    """Loops count their trips, fusions their own cycles, and what is exchanged inside of them."""
    found = {operation.name: operation for operation in hlo.operations(TEXT)}
    assert {name: one.cycles for name, one in found.items()} == {
        "work": 300,
        "gather": 0,
        "fusion.7": 7,
        "all-reduce.1": 0,
    }
    assert found["work"].count == 3
    assert found["work"].module == "UNet/conv_in"
    assert found["fusion.7"].module == "transpose(UNet)/mid/attn1/to_q"
    assert found["gather"].bytes_exchanged == (4 + 16) * 4
    assert found["all-reduce.1"].bytes_exchanged == 8 * 4 * 2
    with pytest.raises(ValueError, match="no entry"):
        hlo.operations("HloModule nothing\n")


@pytest.mark.parametrize(
    ("kind", "size"),
    [("f32[2,3]{1,0:T(8,128)}", 24), ("(bf16[4]{0}, pred[2]{0}, s32[])", 14), ("f8e4m3fn[5]", 5), ("s4[8]", 8)],
)
def test_bytes(kind, size):
    assert hlo.bytes_of(kind) == size


def test_clocks_are_those_of_the_chips():
    clocks = {name: round(chip.clock / 1e9, 2) for name, chip in CHIPS.items()}
    assert clocks == {"v4": 1.05, "v5e": 1.50, "v5p": 1.75, "v6e": 1.75}


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("UNet2DConditionModel/mid_block/attentions_0/transformer_blocks_0/attn1/to_q", "attention"),
        ("transpose(FlaxUNet2DConditionModel)/up_blocks_0/resnets_1/conv1", "resnets"),
        ("FlaxCLIPTextModel/text_model/encoder/layers_0/self_attn/q_proj", "text encoder"),
        ("", "optimizer and the rest"),
    ],
)
def test_parts(module, part):
    assert plan.part_of(module) == part


@pytest.mark.parametrize("topology", ["v5e", "v7:2x2", "v5e:two", "tpu"])
def test_slices_that_are_not(topology):
    with pytest.raises(ConfigError, match=r"not known.*; known are v4:2x2x1"):
        topologies.describe(topology)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(topologies, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'flax-diffusion\[tpu\]'"):
        plan.main(["--config", "configs/digits_unconditional.yaml"])


def run(request, *words):
    """In a process of its own: what libtpu has to know must be set before jax is there."""
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-m", "tpu.plan", *words]
    return subprocess.run(command, cwd=request.config.rootpath, env=environment, capture_output=True, text=True)


@pytest.mark.tpu_compile
def test_digits(request):
    ran = run(
        request, "--config", "configs/digits_unconditional.yaml", "--topology", "v5e:2x2", "--fsdp_parallelism", "2"
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "v5e, 4 chips, data 2 x fsdp 2: 64 images a device and step" in ran.stdout
    assert "of 16: fits" in ran.stdout
    print("\n" + ran.stdout)


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--topology", "v5e:3x7"], "--topology v5e:3x7: "),
        (["--fsdp_parallelism", "3"], "a mesh of fsdp 3 does not fit 4 devices"),
        (["--global_batch_size", "6"], "--global_batch_size 6: not divisible over 4 devices"),
    ],
)
def test_what_cannot_be_planned(request, words, says):
    ran = run(request, "--config", "configs/digits_unconditional.yaml", *words)
    assert ran.returncode == 2, ran.stderr[-2000:]
    assert says in ran.stderr.splitlines()[-1]
