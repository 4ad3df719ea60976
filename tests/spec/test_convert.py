"""Between formats: checkpoints into pipelines, msgpack and back, LoRA under every name, what does not fit."""

import json

import numpy as np
import pytest
from fake_hub import Hub
from safetensors.numpy import save_file
from tiny import pictures, stable_diffusion

from flax_diffusion.convert import convert, main
from flax_diffusion.core.checkpoints import folders, portable
from flax_diffusion.core.errors import CheckpointError, ConfigError, WeightsError
from flax_diffusion.core.families.stable_diffusion import STABLE_DIFFUSION
from flax_diffusion.core.io import model_files
from flax_diffusion.core.spec.adapters import LORA_FILE, KohyaNames
from flax_diffusion.core.spec.lora_files import read_lora_layers
from flax_diffusion.models import FlaxUNet2DConditionModel
from torch_backend.train import train

NAMES = KohyaNames(STABLE_DIFFUSION.lora_prefixes)
TWO_LEVELS = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("model"), unet=TWO_LEVELS)


def unet(folder):
    return {name: tensor.array() for name, tensor in model_files.read_safetensors(unet_file(folder)).items()}


def unet_file(folder):
    return folder / "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("use_ema", [False, True])
def test_a_checkpoint_becomes_the_pipeline_of_its_step(model, tmp_path, use_ema):
    out = train(
        "text_to_image", pretrained_model_name_or_path=str(model), train_data_dir=str(pictures(tmp_path / "data")),
        resolution=16, train_batch_size=2, max_train_steps=2, learning_rate=1e-2, lr_warmup_steps=0, report_to="none",
        draw_samples=False,
        use_ema=use_ema, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    made = convert(model, tmp_path / "made", checkpoint=str(out / "checkpoint-2"))
    expected = unet(out)  # what the run itself exported: the average, if there is one
    assert np.abs(expected["conv_in.weight"] - unet(model)["conv_in.weight"]).max() > 1e-3
    for name, array in unet(made).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_flax_and_back_changes_nothing(model, tmp_path):
    flax = convert(model, tmp_path / "flax", format="flax")
    assert not list(flax.rglob("*.safetensors"))
    FlaxUNet2DConditionModel.from_pretrained(flax, subfolder="unet")
    again = convert(flax, tmp_path / "again")
    for name, array in unet(model).items():
        np.testing.assert_array_equal(unet(again)[name], array, err_msg=name)


def test_half_precision_is_written_as_such(model, tmp_path):
    half = unet(convert(model, tmp_path / "half", dtype="float16"))
    assert {array.dtype for array in half.values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora.down", "lora.up")])
def test_what_a_lora_adds_whatever_its_names(model, tmp_path, names):
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((2, 16), np.float32), rng.standard_normal((16, 2), np.float32)
    save_file({f"unet.{LAYER}.{names[0]}.weight": down, f"unet.{LAYER}.{names[1]}.weight": up}, tmp_path / LORA_FILE)
    made = convert(model, tmp_path / "made", lora=[str(tmp_path)], lora_scale=0.5)
    before, after = unet(model), unet(made)
    np.testing.assert_allclose(after[f"{LAYER}.weight"], before[f"{LAYER}.weight"] + 0.5 * up @ down, atol=1e-6)
    assert all((after[name] == before[name]).all() for name in before if name != f"{LAYER}.weight")


def test_ranks_that_differ_and_broken_headers(tmp_path):
    shapes = {"unet": {f"{name}.weight": (16, 16) for name in "ab"}}
    arrays = {}
    for name, rank in (("a", 2), ("b", 3)):
        arrays[f"unet.{name}.lora_A.weight"] = np.ones((rank, 16), np.float32)
        arrays[f"unet.{name}.lora_B.weight"] = np.ones((16, rank), np.float32)
    save_file(arrays, tmp_path / "ranks.safetensors")
    found = read_lora_layers(tmp_path / "ranks.safetensors", shapes, NAMES)["unet"]
    assert {name: (layer.rank, layer.alpha) for name, layer in found.items()} == {"a": (2, 2.0), "b": (3, 3.0)}
    for header, says in (("{", "is not JSON"), ("[1]", "must be a JSON object")):
        save_file(arrays, tmp_path / "header.safetensors", metadata={"lora_adapter_metadata": header})
        with pytest.raises(WeightsError, match=says):
            read_lora_layers(tmp_path / "header.safetensors", shapes, NAMES)
    save_file({"x.alpha": np.ones(1, np.float32)}, tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="holds no LoRA weights"):
        read_lora_layers(tmp_path / "none.safetensors", shapes, NAMES)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])  # of Stable Diffusion 1 (OpenAI's CLIP) and 2 (OpenCLIP)
def test_single_file_in_plain_diffusers_and_back(tmp_path, act):
    """Diffusers reads every model from what is written, by names of its own; what is read back is what was written."""
    from diffusers import StableDiffusionPipeline

    model = stable_diffusion(tmp_path / "model", text_encoder={"hidden_act": act}, unet=TWO_LEVELS)
    out = convert(model, tmp_path / "single", format="single_file")
    file = out / "model.safetensors"
    theirs = StableDiffusionPipeline.from_single_file(str(file), config=str(model), safety_checker=None)
    whole = StableDiffusionPipeline.from_pretrained(model)
    for name in ("unet", "vae", "text_encoder"):
        expected = getattr(whole, name).state_dict()
        for key, tensor in getattr(theirs, name).state_dict().items():
            np.testing.assert_array_equal(tensor.numpy(), expected[key].numpy(), err_msg=f"{name}/{key}")
    for path in model.rglob("*.safetensors"):
        path.unlink()  # configs and tokenizer are all that is taken from there
    again = StableDiffusionPipeline.from_pretrained(convert(model, tmp_path / "again", checkpoint=str(file)))
    for name in ("unet", "vae", "text_encoder"):
        expected = getattr(whole, name).state_dict()
        for key, tensor in getattr(again, name).state_dict().items():
            np.testing.assert_array_equal(tensor.numpy(), expected[key].numpy(), err_msg=f"{name}/{key}")


def test_single_files_that_do_not_fit(model, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"pickled")
    with pytest.raises(WeightsError, match="pickled can run code: convert it to safetensors first"):
        convert(model, tmp_path / "a", checkpoint=str(tmp_path / "model.ckpt"))
    save_file({"conv.weight": np.ones((3, 4), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="no single-file checkpoint of Stable Diffusion"):
        convert(model, tmp_path / "b", checkpoint=str(tmp_path / "other.safetensors"))
    file = convert(model, tmp_path / "c", format="single_file") / "model.safetensors"
    deeper = stable_diffusion(tmp_path / "deeper", vae={"layers_per_block": 2}, unet=TWO_LEVELS)
    with pytest.raises(WeightsError, match=r"model\.safetensors does not fit .* missing decoder\.up_blocks"):
        convert(deeper, tmp_path / "d", checkpoint=str(file))


def test_pipelines_that_no_single_file_holds(model, tmp_path):
    odd = stable_diffusion(tmp_path / "odd", unet=TWO_LEVELS | {"layers_per_block": [1, 1]})
    with pytest.raises(
        ConfigError, match=r"^single files hold UNets with one layers_per_block, this one has \[1, 1\]$"
    ):
        convert(odd, tmp_path / "a", format="single_file")
    index = json.loads((odd / "model_index.json").read_text())
    (odd / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    with pytest.raises(
        ConfigError, match=r"^single files hold a Stable Diffusion pipeline with an autoencoder, this is"
    ):
        convert(odd, tmp_path / "b", format="single_file")


def test_what_cannot_be_converted(model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    with pytest.raises(ConfigError, match="full: is there already"):
        convert(model, tmp_path / "full")
    with pytest.raises(ConfigError, match="--format kohya writes one LoRA file anew"):
        convert(model, tmp_path / "a", format="kohya")
    with pytest.raises(CheckpointError, match=r"--checkpoint .*nowhere: there is no such file or folder: check"):
        convert(model, tmp_path / "a", checkpoint=str(tmp_path / "nowhere"))
    folder = tmp_path / "checkpoint-1"
    for name, says in (
        ("unet/conv_in.weight", r"is of another model: unet/conv_in\.weight is \(3, 4\) there"),
        ("unet/x.lora_A.weight", "holds adapters: give it by --model, or its file by --lora"),
    ):
        arrays = {f"params/{name}": np.ones((3, 4), np.float32)}
        portable.write(folders.unsealed(folder), arrays, {"step": 1})
        folders.seal(folder)
        with pytest.raises(WeightsError, match=says):
            convert(model, tmp_path / "b", checkpoint=str(folder))
    with pytest.raises(CheckpointError, match="is a run; name one of its checkpoints: checkpoint-1"):
        convert(model, tmp_path / "b", checkpoint=str(tmp_path))
    (folder / "state.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"checkpoint-1: state\.safetensors is not what was written; use another"):
        convert(model, tmp_path / "b", checkpoint=str(folder))


def test_command_line(model, tmp_path, capsys):
    main(["--model", str(model), "--output_dir", str(tmp_path / "out")])
    assert "written to" in capsys.readouterr().err
    assert (tmp_path / "out/model_index.json").is_file()


@pytest.mark.filterwarnings("ignore:Use 'content=")  # by the Hub's client, of its own calls
def test_the_result_is_pushed(model, tmp_path, monkeypatch, capsys):
    with Hub() as hub:
        hub.use(monkeypatch)
        words = ["--model", str(model), "--push_to_hub"]
        main([*words, "--output_dir", str(tmp_path / "mine"), "--hub_private_repo"])
        assert "written to" in (said := capsys.readouterr().err)
        assert "and pushed to the Hub" in said
        assert hub.private == {"me/mine": True}
        assert {"README.md", "model_index.json", "unet/config.json"} <= hub.files["me/mine"].keys()
        assert "StableDiffusionPipeline, converted from" in hub.files["me/mine"]["README.md"].decode()
        with pytest.raises(ConfigError, match=r"^--push_to_hub: the Hub does not take the token"):
            main([*words, "--output_dir", str(tmp_path / "other"), "--hub_token", "wrong"])
        assert not (tmp_path / "other").exists()
        hub.failures = [(403, "full")]
        with pytest.raises(WeightsError, match=r"is written, and not pushed .*HTTP 403: full.*: hf upload me/other "):
            main([*words, "--output_dir", str(tmp_path / "other")])
        hub.broken = True
        with pytest.raises(ConfigError, match=r"cannot be reached .* drop --push_to_hub, and push later$"):
            main([*words, "--output_dir", str(tmp_path / "third")])


def test_what_is_no_checkpoint(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"--checkpoint .*nowhere: there is no such file or folder: check the pa"):
        convert(model, tmp_path / "a", checkpoint=str(tmp_path / "nowhere"))
    run = tmp_path / "run"
    for step in (1, 2):
        portable.write(folders.unsealed(run / f"checkpoint-{step}"), {}, {"step": step})
        folders.seal(run / f"checkpoint-{step}")
    with pytest.raises(CheckpointError, match="run: is a run; name one of its checkpoints: checkpoint-1, checkpoint-2"):
        convert(model, tmp_path / "a", checkpoint=str(run))
    with pytest.raises(
        CheckpointError, match=r"is no checkpoint, it has no manifest\.json: name a folder such as RUN/ch"
    ):
        convert(model, tmp_path / "a", checkpoint=str(model))


@pytest.mark.parametrize("lacks", ["level", "vae", "text_encoder"])
def test_single_files_of_other_programs(model, tmp_path, lacks, caplog):
    """Transformers 5 leaves the level `text_model` out; files for a UI may lack what the UI has."""
    from safetensors.numpy import load_file

    tensors = load_file(convert(model, tmp_path / "single", format="single_file") / "model.safetensors")
    prefix = {"vae": "first_stage_model.", "text_encoder": "cond_stage_model.", "level": None}[lacks]
    if prefix is None:
        tensors = {key.replace("transformer.text_model.", "transformer."): value for key, value in tensors.items()}
    else:
        tensors = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
    tensors = {key: value + 1 for key, value in tensors.items()}
    save_file(tensors, tmp_path / "other.safetensors")
    made = convert(model, tmp_path / "made", checkpoint=str(tmp_path / "other.safetensors"))
    files = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    for part, file in files.items():
        before, after = (load_file(at / part / f"{file}.safetensors") for at in (model, made))
        names = {name.removeprefix("text_model."): name for name in before}
        for name, array in after.items():
            expected = before[names[name.removeprefix("text_model.")]] + (part != lacks)
            np.testing.assert_array_equal(array, expected, err_msg=f"{part}/{name}")
    assert caplog.text.count(f"other.safetensors holds no {lacks}: that of --model is taken") == (prefix is not None)


def test_a_single_file_of_sdxl(model, tmp_path):
    names = ("model.diffusion_model.a", "conditioner.embedders.0")
    tensors = {f"{name}.weight": np.ones(1, np.float32) for name in names}
    save_file(tensors, tmp_path / "xl.safetensors")
    with pytest.raises(WeightsError, match="is a checkpoint of Stable Diffusion XL: give a StableDiffusionXLPi"):
        convert(model, tmp_path / "a", checkpoint=str(tmp_path / "xl.safetensors"))
