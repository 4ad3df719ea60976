"""The plan: what it reads from a program's text, what the TPU compiler says, and what cannot be planned."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import ONE_BLOCK, RUN, UNET, stable_diffusion, stable_diffusion_xl

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig
from flax_diffusion.jax_backend.program import Program
from flax_diffusion.jax_backend.sharding import make_mesh
from tpu import compiled, hlo, kernels, plan, sweep, topologies
from tpu.chips import CHIPS, GIB

TEXT = """HloModule jit_step

%fused (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %all-reduce.1 = bf16[8,4]{1,0} all-reduce(%p), channel_id=3, replica_groups={{0,1}}, to_apply=%add
}

%start (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %all-reduce.0 = bf16[8,4]{1,0} all-reduce(%p), channel_id=3, replica_groups={{0,1}}, to_apply=%add
}

%body (t: (s32[], f32[16])) -> (s32[], f32[16]) {
  %t = (s32[], f32[16]{0:T(8)}) parameter(0)
  ROOT %work = (s32[], f32[16]{0}) fusion(%t), kind=kLoop, calls=%inner, metadata={op_name="jit(step)/while/body/UNet/conv_in/add"}, backend_config={"estimated_cycles":"100"}
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %loop = (s32[], f32[16]{0}) while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %gather = (f32[4]{0:T(128)}, f32[16]{0:T(128)S(1)}, /*index=2*/f32[4]{0}, f32[16]{0}) all-gather-start(%x, %y), metadata={op_name="jit(step)/transpose(jvp(UNet))/conv_in/dot_general"}
  %beside = bf16[8,4]{1,0} fusion(%z), kind=kCustom, calls=%start
  %fusion.7 = bf16[8,4]{1,0} fusion(%z), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/transpose(jvp(UNet))/mid/attn1/to_q/dot_general"}, backend_config={"estimated_cycles":"7"}
  %flash_attention.3 = bf16[2,8,40,256]{3,2,1,0} custom-call(%q, %k), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[2,8,40,256]{3,2,1,0}, bf16[2,8,40,512]{3,2,1,0}}, metadata={op_name="jit(step)/attn1/flash_attention/pallas_call"}, backend_config={"custom_call_config":{"body":"","cost_estimate":{"flops":"1000","transcendentals":"8","bytes_accessed":"500","remote_bytes_transferred":"0"}}}
  %mine = f32[4]{0} custom-call(%q), custom_call_target="tpu_custom_call", operand_layout_constraints={f32[4]{0}}, backend_config={"custom_call_config":{"body":""}}
  ROOT %done = f32[16]{0} all-gather-done(%gather)
}
"""  # noqa: E501


def test_what_a_program_does():
    """Loops count their trips, fusions their own cycles, and what is exchanged inside of them."""
    assert hlo.loops(TEXT) == [3]
    found = {operation.name: operation for operation in hlo.operations(TEXT)}
    assert {name: one.cycles for name, one in found.items()} == {
        "work": 300,
        "gather": 0,
        "fusion.7": 7,
        "all-reduce.0": 0,
        "flash_attention.3": 0,
        "mine": 0,
    }
    assert found["work"].count == 3
    assert found["work"].module == "UNet/conv_in"
    assert found["fusion.7"].module == "transpose(UNet)/mid/attn1/to_q"
    assert found["gather"].bytes_exchanged == (4 + 16) * 4
    assert found["all-reduce.0"].bytes_exchanged == 8 * 4 * 2  # and the part that ends it is no other
    shapes = ((2, 8, 40, 256), (2, 8, 40, 512))
    assert found["flash_attention.3"].kernel == hlo.Kernel("flash_attention", shapes, 1000, 500)
    assert found["mine"].kernel == hlo.Kernel("mine", ((4,),), None, None)
    with pytest.raises(ValueError, match="no entry"):
        hlo.operations("HloModule nothing\n")


CONDITION = """%cond (t: (s32[], f32[16])) -> pred[] {
  %bound = s32[]{:T(128)} constant(50), backend_config={"flag_configs":[]}
  %t = (s32[], f32[16]{0:T(8)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT, metadata={op_name="jit(step)/while/cond/lt"}
}

"""


def test_a_loop_whose_trips_only_its_condition_says():
    unnoted = TEXT.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    with pytest.raises(ValueError, match="nothing says how often the loop loop runs"):
        hlo.operations(unnoted)
    found = {one.name: one for one in hlo.operations(unnoted.replace("%body (t", f"{CONDITION}%body (t"))}
    assert (found["work"].count, found["work"].cycles) == (50, 5000)
    with pytest.raises(ValueError, match="nothing says how often"):
        hlo.operations(unnoted.replace("%body (t", f"{CONDITION}%body (t").replace("direction=LT", "direction=NE"))


@pytest.mark.parametrize(
    ("kind", "size"),
    [("f32[2,3]{1,0:T(8,128)}", 24), ("(bf16[4]{0}, pred[2]{0}, s32[])", 14), ("f8e4m3fn[5]", 5), ("s4[8]", 8)],
)
def test_bytes(kind, size):
    assert hlo.array_bytes(kind) == size


def test_clocks_are_those_of_the_chips():
    clocks = {name: round(chip.clock / 1e9, 2) for name, chip in CHIPS.items()}
    assert clocks == {"v4": 1.05, "v5e": 1.50, "v5p": 1.75, "v6e": 1.75}


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("UNet2DConditionModel/mid_block/attentions_0/transformer_blocks_0/attn1/to_q", "attention"),
        ("UNet2DConditionModel/mid_block/attentions_0/transformer_blocks_0/ff/net_0/proj", "feed-forward"),
        ("UNet2DConditionModel/mid_block/attentions_0/proj_in", "attention"),
        ("transpose(FlaxUNet2DConditionModel)/up_blocks_0/resnets_1/conv1", "resnets"),
        ("FlaxCLIPTextModule/text_model/encoder/layers/0/self_attn/q_proj", "text encoder"),
        ("", "optimizer and the rest"),
    ],
)
def test_parts(module, part):
    assert plan.part_of(module) == part


def test_time_of_kernels():
    """By products as they fill the matrix units, or by traffic, whichever takes longer."""
    chip = CHIPS["v5e"]
    forward = hlo.Kernel("flash_attention", ((1, 8, 40, 4096),) * 3, 10**12, 1)
    around = 8 * 8 * 700 / 1.5e9
    assert kernels.seconds(forward, chip) == pytest.approx((128 + 48) / 80 * 1e12 / (0.95 * 197e12) + around, rel=1e-4)
    backward = hlo.Kernel("flash_attention_gradient", ((1, 8, 128, 4096),) * 6, 10**12, 1)
    assert kernels.seconds(backward, chip) == pytest.approx(1e12 / (0.95 * 197e12) + around, rel=1e-4)
    other = hlo.Kernel("other", (), 10**12, 1)
    assert kernels.seconds(other, chip) == pytest.approx(1e12 / (0.88 * 197e12))
    assert kernels.seconds(hlo.Kernel("copy", (), 0, 10**9), chip) == pytest.approx(1 / (0.8 * 819))
    assert kernels.seconds(hlo.Kernel("mine", (), None, None), chip) is None


def test_bytes_on_the_host_are_none_of_a_device():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = [jax.ShapeDtypeStruct((3, 5), np.float32, sharding=device)]
    assert compiled.bytes_per_device(shapes) == 60
    shapes += [jax.ShapeDtypeStruct((7,), np.float32, sharding=device.with_memory_kind("pinned_host"))]
    assert compiled.bytes_per_device(shapes) == 60


SLICE = topologies.Slice(CHIPS["v5e"], [None] * 4)
CONFIG = UnconditionalConfig(dataset_name="digits")


def a_plan(seconds=0.1, **changes):
    work = hlo.Operation("work", "fusion", "UNet2D/resnets_0", round(seconds * SLICE.chip.clock), 1, 0)
    values = {
        "slice": SLICE, "mesh": {"data": 4, "fsdp": 1}, "size": (8, 8), "images": 2,
        "state": {"parameters": GIB}, "arguments": GIB,
        "temporaries": GIB, "code": GIB // 4, "peak": 2 * GIB, "host": 0, "flops": 1e12, "accessed": 2e9,
        "compile_seconds": 60, "operations": [work],
    }  # fmt: skip
    return plan.Plan(**values | changes)


def test_report():
    mine = hlo.Operation("k", "custom-call", "attn1", 0, 3, 0, hlo.Kernel("mine too", (), 10**12, 1))
    silent = hlo.Operation("k2", "custom-call", "", 0, 1, 0, hlo.Kernel("mine", (), None, None))
    text = plan.report(a_plan(operations=[*a_plan().operations, mine, silent]))
    assert "100.0 ms" not in text
    assert "117.3 ms estimated" in text  # 100, and three times 1 TFLOP
    assert "17.3 of these in kernels, computed from their FLOPs and bytes" in text
    assert "not included, since their cost is not known: mine" in text
    assert "custom-call  attn1 x 3" in text
    assert "  program                   0.250\n" in text


def test_each_size_of_the_buckets_has_a_program(monkeypatch, capsys):
    """The largest is reported in full, and a table says what each costs; without buckets there is one size."""
    asked = []

    def make(config, where, text_to, size):
        asked.append((text_to, size))
        return a_plan(0.1 * size[0] * size[1] / 4096, size=size)

    monkeypatch.setattr(plan, "make_plan", make)
    monkeypatch.setattr(topologies, "set_environment", lambda: None)
    monkeypatch.setattr(topologies, "describe", lambda _: SLICE)
    words = ["unconditional", "--dataset_name", "digits", "--resolution", "64"]
    plan.main([*words, "--bucket_resolutions", "32x64", "64x64", "96x32"])
    assert asked == [(None, (64, 64)), (None, (32, 96)), (None, (64, 32))]
    said = capsys.readouterr().out
    assert "2 images of 64x64 per device and step" in said
    assert said.splitlines()[-4:] == [
        "    pictures     GiB  ms/image    MFU",
        "       64x64    2.00      50.0   5.1%",
        "       96x32    2.00      37.5   6.8%",
        "       32x64    2.00      25.0  10.2%",
    ]
    assert compiled.sizes_of(UnconditionalConfig(dataset_name="digits", resolution=24)) == [(24, 24)]
    with pytest.raises(ConfigError, match="--bucket_resolutions 32x40: 40 must be a multiple of 32"):
        compiled.sizes_of(UnconditionalConfig(dataset_name="digits", resolution=64, bucket_resolutions=["32x40"]))


CACHED = ["--cache_latents", "--center_crop", "--pre_compute_text_embeddings"]
PRIOR = ["--with_prior_preservation", "--class_data_dir", ".", "--class_prompt", "a dog"]


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
@pytest.mark.parametrize(
    ("make", "words", "texts"),
    [
        (stable_diffusion, ["text_to_image", "--train_data_dir", "."], {"text_embeddings": (8, 16)}),
        (
            stable_diffusion_xl,
            ["text_to_image", "--train_data_dir", "."],
            {"text_embeddings": (40, 40), "pooled_embeddings": (12,), "time_ids": (6,)},
        ),
        (
            stable_diffusion,
            ["dreambooth", "--instance_data_dir", ".", "--instance_prompt", "a sks dog", *PRIOR],
            {"text_embeddings": (8, 16)},
        ),
    ],
    ids=["sd", "sdxl", "dreambooth"],
)
def test_what_is_computed_before_training_needs_no_weights(tmp_path, make, words, texts, size):
    """A step with cached latents and prompts takes them, at the size of its bucket, in place of their models."""
    base = make(tmp_path / "base")
    words = [*words, *CACHED, "--resolution", "16", "--pretrained_model_name_or_path", str(base)]
    _, config = command_line.parse_train(words, "plan", plan.without_data)
    task = task_of(config)
    source = task.described_source()
    spec = task.make_spec(source)
    frozen, example = compiled.described(task, spec, source, Program(config, spec, make_mesh(1, 1)), size)
    assert not frozen
    latents = tuple(side // spec.vae_factor for side in size)
    assert example["posterior"].shape == (2, 4, *latents)
    assert example["noise"].shape == (4, *latents)
    assert "pixel_values" not in example
    assert {name: example[name].shape for name in texts} == texts


@pytest.mark.parametrize("loop", [1, 4])
def test_the_work_of_micro_batches_is_counted(monkeypatch, loop):
    """The compiler counts the body of a loop once; where there is a loop, only the FLOPs are known."""
    config = UnconditionalConfig(**RUN | {"unet": UNET | ONE_BLOCK, "gradient_accumulation_steps": 4})
    monkeypatch.setattr(compiled.hlo, "loops", lambda _: [loop, 7])
    monkeypatch.setattr(compiled.hlo, "operations", lambda _: a_plan().operations)
    made = plan.make_plan(config, topologies.Slice(CHIPS["v5e"], jax.devices()))
    whole = plan.make_plan(
        config.model_copy(update={"gradient_accumulation_steps": 1}), topologies.Slice(CHIPS["v5e"], jax.devices())
    )
    assert (made.accessed is None) == (loop == 4)
    assert ("memory accessed" in plan.report(made)) == (loop == 1)
    assert made.flops == pytest.approx((16 if loop == 4 else 4) * whole.flops, rel=0.05)  # a CPU's are written out


@pytest.mark.parametrize(
    "refused",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.25G of 15.75G hbm. Exceeded by 8.50G.",
        "Ran out of memory on HBM, the total memory required (24.25G) exceeds available HBM (15.75G).",
    ],
)
def test_what_does_not_fit(refused):
    error = compiled.refusal(RuntimeError(refused), CONFIG, 4)
    assert isinstance(error, compiled.DoesNotFit)
    assert (error.needed, error.available) == (24.25, 15.75)
    assert str(error) == (
        "does not fit: the step needs 24.25 GiB of a device's 15.75, 8.50 too many. What helps: "
        "--mixed_precision bf16, --gradient_checkpointing, --fsdp_parallelism 4, "
        "a lower --train_batch_size, with --gradient_accumulation_steps, a slice of more chips or of larger ones"
    )
    for how, helps in (("minimal", True), (True, False)):
        config = CONFIG.model_copy(update={"gradient_checkpointing": how})
        assert ("--gradient_checkpointing" in str(compiled.refusal(RuntimeError(refused), config, 4))) == helps
    other = RuntimeError("INTERNAL: something else")
    assert compiled.refusal(other, CONFIG, 4) is other


def test_what_the_compiler_refuses(monkeypatch):
    def refuse(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 24.25G of 15.75G hbm. Exceeded by 8.50G.")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    config = UnconditionalConfig(**RUN | {"unet": UNET | ONE_BLOCK})
    with pytest.raises(compiled.DoesNotFit, match=r"^does not fit: the step needs 24\.25 GiB of a device's 15\.75, 8"):
        plan.make_plan(config, topologies.Slice(CHIPS["v5e"], jax.devices()))


def test_sweep():
    """Batches double until one does not fit; the fastest image comes first, what does not fit last."""

    def plan_of(config, where):
        assert where is SLICE
        room = 4 if config.gradient_checkpointing else 2
        if config.train_batch_size > room * config.fsdp_parallelism:
            raise compiled.DoesNotFit(20, 15.75, [])
        seconds = 0.1 + 0.05 * config.train_batch_size * (2 if config.gradient_checkpointing else 1)
        return a_plan(seconds, images=config.train_batch_size)

    tried = list(sweep.trials(CONFIG, SLICE, plan_of))
    settings = [(one.fsdp, one.checkpointing, one.batch) for one in tried]
    kinds = ((False, (1, 2, 4)), ("minimal", (1, 2, 4, 8)), (True, (1, 2, 4, 8)))
    assert settings[:11] == [(1, kind, batch) for kind, batches in kinds for batch in batches]
    assert {one.fsdp for one in tried} == {1, 4}
    assert sweep.fsdp_sizes(256) == [1, 4, 16, 64]
    lines = sweep.table(tried).splitlines()
    assert lines[1].split()[:3] == ["8", "4", "no"]
    assert lines[1].split()[4:7] == ["62.5", "0.2", "64.0"]
    assert lines[-1].endswith("does not fit: 15.75 GiB")


@pytest.mark.parametrize("topology", ["v5e", "v7:2x2", "v5e:two", "tpu"])
def test_slices_that_are_not(topology):
    with pytest.raises(ConfigError, match=r"not known.*; known are v4:2x2x1"):
        topologies.describe(topology)


@pytest.mark.parametrize(
    ("error", "says"), [("INVALID: no such slice\nthe stack", "INVALID: no such slice"), ("", "RuntimeError")]
)
def test_a_slice_that_libtpu_does_not_make(monkeypatch, error, says):
    def refuse(**_):
        raise RuntimeError(error)

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with pytest.raises(ConfigError, match=f"^--topology v5e:3x3: {says}; known are v4:2x2x1, "):
        topologies.describe("v5e:3x3")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("v5e-8", "; it is v5e:2x4 here; known are"),
        ("v5litepod-16", "; it is v5e:4x4 here;"),
        ("v6e-256", "; it is v6e:16x16 here;"),
        ("v4-8", "; it is v4:2x2x1 here;"),
        ("v5p-64", "; it is v5p:2x4x4 here;"),
        ("v5e-3", "; known are"),
        ("v5e:2x", "; did you mean 'v5e:2x"),
    ],
)
def test_what_the_cloud_calls_a_slice(kind, says):
    with pytest.raises(ConfigError, match=f"--topology {kind}: not known{says}"):
        topologies.describe(kind)


SD = ["--pretrained_model_name_or_path", "sd"]


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "configs/sd15_tpu.yaml"],
        ["--config", "configs/sd15_tpu.yaml", "--dataset_name", "digits"],
        ["unconditional"],
        ["autoencoder", "--vae", "{}"],
        ["dreambooth", *SD],
        ["dreambooth", *SD, "--with_prior_preservation"],
        ["dreambooth", *SD, "--instance_prompt", "a sks dog"],
        ["textual_inversion", *SD, "--placeholder_token", "<x>", "--initializer_token", "toy"],
    ],
)
def test_a_plan_asks_for_no_data(request, monkeypatch, words):
    monkeypatch.chdir(request.config.rootpath)
    _, config = command_line.parse_train(words, "plan", plan.without_data)
    task_of(config).described_source()
    with pytest.raises(ConfigError, match=r"no data|needs --|exclude each other"):
        command_line.parse_train([*words, "--train_data_dir", "x"] if "digits" in words else words, "train")


def test_captions_that_make_a_tokenizer_are_needed():
    scratch = ["text_to_image", "--unet", "{}", "--text_encoder", "{}", "--vae", "null", "--train_text_encoder"]
    with pytest.raises(ConfigError, match="no data: give --dataset_name"):
        command_line.parse_train(scratch, "plan", plan.without_data)


def test_a_sweep_has_no_one_program():
    with pytest.raises(ConfigError, match="--hlo: not allowed with argument --sweep"):
        plan.main(["--sweep", "--hlo", "step.hlo"])


def test_a_program_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(topologies, "set_environment", lambda: None)
    monkeypatch.setattr(topologies, "describe", lambda _: SLICE)
    file = tmp_path / "missing/step.hlo"
    says = rf"^--hlo {file}: cannot be written \(No such file or directory\); name a file in a folder that exists$"
    with pytest.raises(ConfigError, match=says):
        plan.main(["--config", "configs/digits_unconditional.yaml", "--hlo", str(file)])


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(topologies, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'flax-diffusion\[tpu\]'"):
        plan.main(["--config", "configs/digits_unconditional.yaml"])


def run(request, *words):
    """Python in a process of its own: what libtpu has to know must be set before jax is there."""
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=request.config.rootpath, env=environment, capture_output=True, text=True)


PLAN = ["-m", "tpu.plan", "--config", "configs/digits_unconditional.yaml"]
CALIBRATION = """
import tpu.topologies as topologies
topologies.set_environment()
import jax, jax.numpy as jnp
from tpu import hlo
where = topologies.describe("v5e:1x1")
place = jax.sharding.SingleDeviceSharding(where.devices[0])
def seconds(function, dtype, *shapes):
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
    text = jax.jit(function).lower(*inputs).compile().as_text()
    return sum(one.cycles for one in hlo.operations(text)) / where.chip.clock
product = 2 * 8192**3 / seconds(jnp.matmul, jnp.bfloat16, (8192, 8192), (8192, 8192)) / where.chip.flops
moved = 2 * 4 * 2**29 / seconds(lambda x: x + 1, jnp.float32, (2**15, 2**14)) / where.chip.bandwidth
print(product, moved)
"""


@pytest.mark.tpu_compile
def test_the_compilers_estimates_are_near_the_chips_peaks(request):
    ran = run(request, "-c", CALIBRATION)
    assert ran.returncode == 0, ran.stderr[-2000:]
    product, moved = map(float, ran.stdout.split())
    print(f"\na product at {product:.1%} of the chip's FLOP/s, a copy at {moved:.1%} of its bandwidth")
    assert 0.85 <= product <= 1
    assert 0.75 <= moved <= 1


SCHEDULE = """
import glob, math, os, re, sys
folder = sys.argv[1]
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
import tpu.topologies as topologies
topologies.set_environment()
import jax, jax.numpy as jnp
from flax_diffusion.models import flash
from flax_diffusion.jax_backend.sharding import batch_sharding, make_mesh
from tpu import hlo, kernels
where = topologies.describe("v5e:1x1")
mesh = make_mesh(1, 1, where.devices)
def tokens(number, heads, channels):
    return jax.ShapeDtypeStruct((8, number, heads, channels), jnp.bfloat16, sharding=batch_sharding(mesh, 0))
square = [(length, length, *of) for length, *of in ((4096, 8, 40), (4096, 5, 64), (1024, 8, 80), (256, 8, 160))]
for queries, keys, *of in [*square, (4096, 77, 8, 40)]:
    q, k = tokens(queries, *of), tokens(keys, *of)
    with jax.set_mesh(mesh):
        gradient = jax.grad(lambda q, k, v: flash.flash_attention(q, k, v).sum(), (0, 1, 2))
        text = jax.jit(gradient).lower(q, k, k).compile().as_text()
    (profile,) = glob.glob(f"{folder}/*hlo-static-bundle-profile*")
    cycles = {}
    for part in open(profile).read().split("HLO: %flash")[1:]:
        cycles["flash" + part.split(".")[0]] = int(re.search(r"VECTOR_STORE: [(][0-9]+/([0-9]+)[)]", part)[1])
    for one in hlo.operations(text):
        if one.kernel:
            steps = math.prod(flash.grid_shape(*one.kernel.shapes[:2]))
            scheduled = cycles[one.kernel.name] * steps / where.chip.clock
            print(queries, keys, one.kernel.name, scheduled, kernels.seconds(one.kernel, where.chip))
    for file in glob.glob(f"{folder}/*"):
        os.remove(file)
"""


@pytest.mark.tpu_compile
def test_the_time_of_attention_is_that_of_its_schedule(request, tmp_path):
    """The compiler writes down, when asked, every cycle of a step of a kernel's grid."""
    ran = run(request, "-c", SCHEDULE, str(tmp_path))
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = [line.split() for line in ran.stdout.splitlines()]
    assert len(rows) == 10
    for queries, keys, name, scheduled, estimated in rows:
        milliseconds = [float(seconds) * 1e3 for seconds in (scheduled, estimated)]
        print("\n{}, {} queries, {} keys: {:.3f} ms, estimated {:.3f}".format(name, queries, keys, *milliseconds))
        assert milliseconds[1] == pytest.approx(milliseconds[0], rel=0.1, abs=0.02)


LONG = """
import sys
import tpu.topologies as topologies
topologies.set_environment()
import jax, jax.numpy as jnp
from flax_diffusion.models.attention import attention
from flax_diffusion.jax_backend.sharding import batch_sharding, make_mesh
where = topologies.describe(sys.argv[1])
mesh = make_mesh(1, len(where.devices), where.devices)
gradient = jax.grad(lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))
for length, heads, channels in ((16384, 8, 40), (16384, 5, 64), (9216, 5, 64), (4096, 1, 512)):
    q = jax.ShapeDtypeStruct((mesh.size, length, heads, channels), jnp.bfloat16, sharding=batch_sharding(mesh, 0))
    with jax.set_mesh(mesh):
        texts = [jax.jit(function).lower(q, q, q).compile().as_text() for function in (attention, gradient)]
    print(*("flash_attention" in text for text in texts))
"""


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("topology", "has_kernel"),
    [
        ("v4:2x2x1", [True, False, True, False]),
        ("v5e:2x2", [True, True, True, True]),
        ("v5p:2x2x1", [True, True, True, False]),
        ("v6e:2x2", [True, True, True, True]),
    ],
)
def test_long_images_compile(request, topology, has_kernel):
    """Pictures of 1,024 and 768 pixels, and a VAE's at 512: by a kernel where the chip's memory holds the keys."""
    ran = run(request, "-c", LONG, topology)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert [line.split() for line in ran.stdout.splitlines()] == [[str(has)] * 2 for has in has_kernel]


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("topology", "memory"), [("v5e:2x2", 16), ("v4:2x2x1", 32), ("v5p:2x2x1", 95), ("v6e:2x2", 32)]
)
def test_digits(request, topology, memory):
    ran = run(request, *PLAN, "--topology", topology, "--fsdp_parallelism", "2")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert (
        f"{topology[: topology.index(':')]}, 4 chips, data 2 x fsdp 2: 64 images of 8x8 per device and step"
        in ran.stdout
    )
    assert f"of {memory}: fits" in ran.stdout
    print("\n" + ran.stdout)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("flags", ["--skip_nonfinite 2", "--mixed_precision fp16 --use_8bit_adam"])
def test_steps_whose_moments_are_on_the_host(request, flags):
    """Of a divided state, where a step may be skipped."""
    offload = ["--topology", "v5e:2x2", "--fsdp_parallelism", "2", "--offload_optimizer"]
    ran = run(request, *PLAN, *offload, *flags.split())
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert re.search(r"optimizer +0\.000\n", ran.stdout)
    assert re.search(r"on the host +0\.00[45]\n", ran.stdout)


@pytest.mark.tpu_compile
def test_layers_that_gather_their_weights_need_less_memory(request):
    """Of 98 MB of weights in bfloat16, more than half are never whole."""
    unet = {
        "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [256, 256, 512],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }  # fmt: skip
    words = ["-m", "tpu.plan", "unconditional", "--dataset_name", "digits", "--resolution", "16", "--unet"]
    words += [json.dumps(unet), "--mixed_precision", "bf16", "--topology", "v5e:2x4", "--fsdp_parallelism", "8"]
    needed = []
    for how in ("step", "block"):
        ran = run(request, *words, "--train_batch_size", "1", "--fsdp_gather", how)
        assert ran.returncode == 0, ran.stderr[-2000:]
        needed.append(float(re.search(r"gradients, activations +([\d.]+)", ran.stdout)[1]) * GIB / 1e6)
    assert needed[1] < needed[0] - 98 / 2


OFFLOAD = """
import json, sys
import tpu.topologies as topologies
topologies.set_environment()
import jax, jax.numpy as jnp, optax
from flax_diffusion.jax_backend.optimizers import offload
from flax_diffusion.jax_backend.optimizers.eight_bit import scale_by_8bit_adam
from flax_diffusion.jax_backend.program import COMPILER_OPTIONS, OFFLOADING
from flax_diffusion.jax_backend.sharding import make_mesh, state_shardings
bits, topology, shapes = sys.argv[1:]
mesh = make_mesh(-1, 1, topologies.describe(topology).devices)
adam = {"8": scale_by_8bit_adam, "32": optax.scale_by_adam}[bits](b1=0.9, b2=0.999, eps=1e-8)
shapes = [{"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for shape in json.loads(shapes)]
tree = {"opt_state": jax.eval_shape(adam.init, shapes), "ema": shapes}
tree = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree, state_shardings(tree, mesh),
)
grads, state = tree["ema"], offload.on_host(tree["opt_state"])
step = jax.jit(
    offload.from_host(adam).update, donate_argnums=(0, 1),
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, (grads, state)),
    compiler_options=COMPILER_OPTIONS["tpu"] | OFFLOADING["tpu"],
)
memory = step.lower(grads, state).compile().memory_analysis()
weights = sum(leaf.size for leaf in jax.tree.leaves(grads)) / mesh.size
print(memory.host_argument_size_in_bytes / weights, memory.temp_size_in_bytes / weights)
"""


@pytest.mark.tpu_compile
def test_8bit_moments_go_to_the_host(request):
    """Of convolutions too."""
    ran = run(request, "-c", OFFLOAD, "8", "v5e:1x1", "[[3, 3, 128, 128], [320, 1280], [320]]")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert 2 <= float(ran.stdout.split()[0]) < 2.1


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:2x2"])
@pytest.mark.parametrize(("bits", "bytes_held"), [(8, 2), (32, 8)])
def test_moments_visit_from_the_host(request, bits, bytes_held, topology):
    """They take as much there as they should, and the devices never hold half of them."""
    ran = run(request, "-c", OFFLOAD, str(bits), topology, str([[2560, 2560], [2560]] * 24))
    assert ran.returncode == 0, ran.stderr[-2000:]
    on_host, on_device = map(float, ran.stdout.split())
    assert bytes_held <= on_host < 1.05 * bytes_held
    print(f"\n{on_host:.2f} and {on_device:.2f} bytes a weight")
    assert on_device < on_host / 2


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--topology", "v5e:3x7"], "--topology v5e:3x7: "),
        (["--hlo", "nowhere/step.hlo"], "--hlo nowhere/step.hlo: cannot be written: No such file or directory"),
        (["--fsdp_parallelism", "3"], "a mesh of fsdp 3 does not fit 4 devices"),
        (["--global_batch_size", "6"], "--global_batch_size 6: not divisible over 4 devices"),
    ],
)
def test_what_cannot_be_planned(request, words, says):
    ran = run(request, *PLAN, *words)
    assert ran.returncode == 2, ran.stderr[-2000:]
    assert says in ran.stderr.splitlines()[-1]
