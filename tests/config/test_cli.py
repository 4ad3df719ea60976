import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig

RECIPES = Path(__file__).parents[2] / "configs"


def parse(*argv):
    return command_line.parse_train(list(argv), "train")[1]


def test_flags_over_file_over_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: unconditional\ndataset_name: digits\nlearning_rate: 3.0e-4\nnum_epochs: 7\n")
    config = parse("--config", str(recipe), "--learning_rate", "5e-5", "--use_ema", "--vae", "null")
    assert (config.learning_rate, config.num_train_epochs, config.train_batch_size) == (5e-5, 7, 16)
    assert config.use_ema is True
    assert config.vae is None


def test_booleans_can_be_turned_off_on_the_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset_name: digits\nuse_ema: true\ncenter_crop: true\n")
    config = parse("unconditional", f"--config={recipe}", "--no_use_ema", "--center_crop", "false")
    assert (config.use_ema, config.center_crop) == (False, False)


@pytest.mark.parametrize(("words", "how"), [([], True), (["minimal"], "minimal"), (["false"], False), (["true"], True)])
def test_a_switch_of_several_positions(words, how):
    config = parse("unconditional", "--dataset_name", "digits", "--gradient_checkpointing", *words)
    assert config.gradient_checkpointing == how


def test_a_list_in_one_flag_or_in_several():
    prompts = ["--validation_prompts", "a", "b", "--validation_prompts", "c"]
    config = parse("text_to_image", "--dataset_name", "digits", "--pretrained_model_name_or_path", "sd", *prompts)
    assert config.validation_prompts == ["a", "b", "c"]


def test_a_saved_config_reads_back_as_itself(tmp_path):
    config = parse("unconditional", "--dataset_name", "digits", "--unet", '{"block_out_channels": [32, 64]}')
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump({"task": "unconditional"} | config.model_dump(mode="json")))
    assert parse("--config", str(saved)) == config


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_recipes_are_of_options_that_exist(recipe):
    values = yaml.safe_load((RECIPES / recipe).read_text())
    folder = "--instance_data_dir" if values["task"] == "dreambooth" else "--train_data_dir"
    data = () if "dataset_name" in values else (folder, "pictures")
    config = parse("--config", str(RECIPES / recipe), *data)
    assert config.output_dir == values["output_dir"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "no task: name one of unconditional, class_conditional, text_to_image"),
        (["uncondtional"], "did you mean 'unconditional'?"),
        (["unconditional", "--dataset_name", "digits", "--learning_rat", "1"], "did you mean '--learning_rate'?"),
        (["unconditional", "--dataset_name", "digits", "--learning_rate=abc"], "--learning_rate: .*got 'abc'"),
        (["unconditional", "--dataset_name", "digits", "--train_batch_size", "0"], "must be at least 1, got '0'"),
        (["unconditional", "--dataset_name", "digits", "--mixed_precision", "fp8"], "'bf16' or 'fp16', got 'fp8'"),
        (["unconditional", "--dataset_name", "digits", "--learning_rate"], "expected one argument"),
        (["unconditional", "--dataset_name", "digits", "--no_use_ema", "yes"], "takes no value"),
        (["unconditional", "--dataset_name", "digits", "--gradient_checkpointing", "most"], "'minimal', got 'most'"),
        (["unconditional", "--dataset_name", "digits", "stray"], "unexpected word 'stray'"),
        (["unconditional", "--dataset_name", "digits", "--unet", "{bad"], "is neither JSON nor YAML"),
        (["unconditional"], "no data: give --dataset_name"),
        (["unconditional", "--dataset_name", "digits", "--train_data_dir", "x"], "exclude each other"),
        (["unconditional", "--dataset_name", "digits", "--lr_scheduler", "piecewise_constant"], "--lr_step_rules"),
        (["unconditional", "--dataset_name", "digits", "--lr_step_rules", "1"], "goes with piecewise_constant"),
        (["unconditional", "--dataset_name", "digits", "--config", "/nowhere.yaml"], "No such file"),
        (["unconditional", "--dataset_name", "digits", "--data_parallelism", "0"], "or -1 for what is left"),
        (["text_to_image", "--dataset_name", "digits"], "nothing to train"),
        (["text_to_image", "--dataset_name", "digits", "--unet", "{}", "--text_encoder", "{}"], "--vae pretrained"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_with_the_fix(argv, says):
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert re.search(says, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rat: 1\n", r"recipe.yaml: unknown option 'learning_rat'; did you mean 'learning_rate'\?"),
        ("dataset_name: digits\nlearning_rate: fast\n", r"recipe.yaml: --learning_rate: .*got 'fast'"),
        ("- a\n- b\n", r"holds \['a', 'b'\], must be a mapping of option: value$"),
        ("", "is empty, must be a mapping of option: value$"),
        ("a: [\n", "not valid YAML: expected the node content, but found '<stream end>', line 2, column 1$"),
        ("a: !!bool x\n", "not valid YAML: a value is not of the type that its tag says$"),
        ("task: text_to_image\ndataset_name: digits\n", "task unconditional on the command line, text_to_image in"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path, text, says):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=says):
        parse("unconditional", "--config", str(recipe))


def test_exit_status_and_stream(request):
    command = [sys.executable, "-m", "flax_diffusion.train", "unconditional", "--learning_rat", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=request.config.rootpath)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: command line: unknown option '--learning_rat'; did you mean '--learning_rate'?\n"


@pytest.mark.parametrize("module", ["train", "generate", "evaluate"])
def test_help_is_quick(module, request):
    command = [sys.executable, "-m", f"flax_diffusion.{module}", "--help"]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=request.config.rootpath, check=True)
        times.append(time.perf_counter() - start)
    assert "--seed" in done.stdout
    assert min(times) < 2.0, times


def test_config_classes_are_frozen():
    config = UnconditionalConfig(dataset_name="digits")
    with pytest.raises(ValueError, match="frozen"):
        config.learning_rate = 1.0
    assert issubclass(UnconditionalConfig, TrainConfig)
