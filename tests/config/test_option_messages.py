"""What a wrong option is told: its name as given, the rule, the value, the fix; and what is in vain, once."""

import json
import logging
import os

import pytest
from tiny import VAE, pictures, stable_diffusion

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.data.check import check_source
from flax_diffusion.core.data.workers import check_count
from flax_diffusion.core.errors import ConfigError, UserError
from flax_diffusion.core.run import assembly
from flax_diffusion.core.run.schedule.rates import learning_rate_schedule
from flax_diffusion.core.run.schedule.steps import make_schedule
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.train import train

TASKS = {
    "unconditional": ["--dataset_name", "digits"],
    "autoencoder": ["--dataset_name", "digits", "--vae", "{}"],
    "text_to_image": ["--pretrained_model_name_or_path", "sd", "--train_data_dir", "d"],
    "dreambooth": [
        "--pretrained_model_name_or_path", "sd", "--instance_data_dir", "d", "--instance_prompt", "a sks dog"
    ],
    "textual_inversion": [
        "--pretrained_model_name_or_path", "sd", "--train_data_dir", "d", "--placeholder_token", "<x>",
        "--initializer_token", "toy",
    ],
}  # fmt: skip


def parse(task, *words, recipe=None):
    more = [] if recipe is None else ["--config", str(recipe)]
    return command_line.parse_train([task, *TASKS.get(task, []), *words, *more], "train")[1]


@pytest.fixture
def in_a_file(tmp_path):
    """The config of a task with some lines of YAML."""

    def read(task, text):
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        return parse(task, recipe=file)

    return read


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("mixed_precision: no", "mixed_precision", "no"),
        ("mixed_precision: off", "mixed_precision", "no"),
        ("mixed_precision: false", "mixed_precision", "no"),
        ("use_ema: on", "use_ema", True),
        ("use_ema: 'yes'", "use_ema", True),
        ("gradient_checkpointing: no", "gradient_checkpointing", False),
        ("gradient_checkpointing: minimal", "gradient_checkpointing", "minimal"),
        ("output_dir: 2024-01-01", "output_dir", "2024-01-01"),
        ("output_dir: yes", "output_dir", "yes"),
        ("revision: 0123", "revision", "0123"),
        ("revision: 1e10", "revision", "1e10"),
        ("resume_from_checkpoint: 1500", "resume_from_checkpoint", "1500"),
        ("lr_scheduler: piecewise_constant\nlr_step_rules: 0.5", "lr_step_rules", "0.5"),
        ("adam_epsilon: 1e-6", "adam_epsilon", 1e-6),
        ("max_train_steps: none", "max_train_steps", None),
        ("snr_gamma: null", "snr_gamma", None),
        ("unet: {norm_eps: 1e-6, center_input_sample: no}", "unet", {"norm_eps": 1e-6, "center_input_sample": False}),
    ],
)
def test_a_word_in_a_file_is_what_it_is_on_the_command_line(in_a_file, text, name, value):
    assert getattr(in_a_file("unconditional", text), name) == value


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("validation_prompts: [7, no, 1e-4, ~]", None),
        ("validation_prompts: [7, no, 1e-4, 'a: b']", ["7", "no", "1e-4", "a: b"]),
        ("validation_prompt: a dog", ["a dog"]),
        ("validation_prompts: 7", ["7"]),
        ("x: &x 007\nvalidation_prompts: [*x]", None),
        ("validation_prompts: [&x 007, *x, >-\n  folded\n  text\n]", None),
        ("validation_prompts:\n- &x 007\n- *x\n- >-\n  folded\n  text\n", ["007", "007", "folded text"]),
    ],
)
def test_prompts_in_a_file(in_a_file, text, prompts):
    if prompts is None:
        with pytest.raises(ConfigError, match=r"got nothing|unknown option 'x'|not valid YAML"):
            in_a_file("text_to_image", text)
    else:
        assert in_a_file("text_to_image", text).validation_prompts == prompts


def test_concepts_in_a_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("concepts:\n- {instance_data_dir: 2024, instance_prompt: 7, repeats: 3}\n")
    words = ["dreambooth", "--pretrained_model_name_or_path", "sd", "--config", str(file)]
    (concept,) = command_line.parse_train(words, "train")[1].concepts
    assert (concept.instance_data_dir, concept.instance_prompt, concept.repeats) == ("2024", "7", 3)
    for inner, says in (
        ("instance_data_dir: d", r"--concepts\.0\.instance_prompt is required: give it$"),
        ("instance_data_dir: d, instance_promt: x", r"--concepts\.0\.instance_promt: there .*did you mean 'instance_p"),
        (
            "instance_data_dir: d, instance_prompt: x, repeats: 0",
            r"--concepts\.0\.repeats: must be at least 1, got '0'",
        ),
    ):
        file.write_text(f"concepts: [{{{inner}}}]\n")
        with pytest.raises(ConfigError, match=says):
            command_line.parse_train(words, "train")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--rank 4", "--rank adapts a model: give --pretrained_model_name_or_path$"),
        ("--unet u --text_encoder t", "--vae pretrained needs --pretrained_model_name_or_path: give a VAE's folder"),
        ("--unet u --text_encoder t --vae null", "a text encoder made from scratch must train: add --train_text_enc"),
        ("--pretrained_model_name_or_path m --text_encoder t", "--text_encoder is for training from scratch: drop it"),
    ],
)
def test_what_text_to_image_starts_from(words, says):
    with pytest.raises(ConfigError, match=says):
        command_line.parse_train(["text_to_image", "--train_data_dir", "d", *words.split()], "train")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("use_ema: maybe", r"recipe.yaml: --use_ema: must be true or false, got 'maybe'$"),
        ("train_batch_size: yes", r"recipe.yaml: --train_batch_size: must be a whole number, got 'yes'$"),
        ("seed: 10:30", r"--seed: must be a whole number, got '10:30'$"),
        ("learning_rate:", r"--learning_rate: must be a number, got nothing \(null\)$"),
        ("mixed_precision: yes", r"must be 'no', 'bf16' or 'fp16', got 'yes'"),
        ("mixed_precision: BF16", r"got 'BF16'; did you mean 'bf16'\?$"),
        ("num_epochs: 3\nnum_train_epochs: 4", r"num_epochs and num_train_epochs are one option: drop one$"),
        ("seed: 1\nuse_ema: on\nseed: 2", r"not valid YAML: it gives 'seed' twice"),
        ("lora_rank: 4", r"unknown option 'lora_rank': text_to_image and dreambooth have it, unconditional has not; d"),
    ],
)
def test_mistakes_in_a_file(in_a_file, text, says):
    with pytest.raises(ConfigError, match=says) as caught:
        in_a_file("unconditional", text)
    assert "\n" not in str(caught.value)


def test_a_mistake_is_where_it_was_made(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("num_epochs: 3\n")
    with pytest.raises(ConfigError, match=r"^command line: --seed: must be at least 0, got '-1'$"):
        parse("unconditional", "--seed", "-1", recipe=file)
    file.write_text("num_epochs: 0\n")
    with pytest.raises(ConfigError, match=r"recipe.yaml: --num_epochs: must be at least 1, got '0'$"):
        parse("unconditional", "--seed", "1", recipe=file)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("unconditional --learning_rate -1e-4", "--learning_rate: must be greater than 0, got '-1e-4'$"),
        ("unconditional --learning_rate -.5", "--learning_rate: must be greater than 0, got '-.5'$"),
        ("unconditional --learning_rate -inf", "--learning_rate: must be a finite number, got '-inf'$"),
        ("unconditional --lr_step_rules -1:3", "expected one argument; one that begins with a dash is written --lr_st"),
        (
            "unconditional --gradient_checkpointing maximal",
            r": must be true or false, or 'minimal', got 'maximal'; did you mean 'minimal'\?$",
        ),
        ("unconditional --train_batch_size 1.5", "--train_batch_size: must be a whole number, got '1.5'$"),
        ("unconditional --validation_steps 0", "--validation_steps: must be at least 1, or null, got '0'$"),
        ("unconditional --logger wandbs", "'tensorboard', 'wandb', 'csv', 'all' or 'none', got 'wandbs'; did you mean"),
        ("unconditional --report_to none csv", "--report_to none csv: none goes with no other; drop it or"),
        ("unconditional --output_dir=", "--output_dir is empty"),
        ("dreambooth --rank 0", "^command line: --rank: must be at least 1, or null, got '0'$"),
        ("dreambooth --text_encoder_lr 1e-5", "--text_encoder_lr goes with --train_text_encoder"),
        ("dreambooth --train_data_dir d", "'--train_data_dir': .* dreambooth has not; give --instance_data_dir$"),
        ("unconditional --instance_data_dir d", "dreambooth has it, unconditional has not; give --train_data_dir$"),
        ("textual_inversion --rank 4", "text_to_image and dreambooth have it, textual_inversion has not; drop it$"),
        ("unconditional --no_train_text_encoder", "text_to_image and dreambooth have it, unconditional has not; drop"),
        ("text_to_image --placeholder_token <x>", "textual_inversion has it, text_to_image has not; drop it$"),
        ("unconditional --scale_lr --global_batch_size 8", "--scale_lr multiplies by the batch a device: drop it or"),
        ("unconditional --cache_latents", "crops at random would differ .*: add --center_crop, or --resize_mode str"),
        ("unconditional --hub_model_id a/b", "--hub_model_id is for pushing to the Hub: add --push_to_hub, or drop it"),
        ("unconditional --push_to_hub --hub_token=", "--hub_token is empty: give the token, or drop the option and"),
        ("unconditional --push_to_hub 1.5", "--push_to_hub: must be true or false, got '1.5'$"),
    ],
)
def test_mistakes_on_the_command_line(words, says):
    task, *rest = words.split()
    with pytest.raises(ConfigError, match=says) as caught:
        parse(task, *rest)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("word", "near"), [("my toy", "<my-toy>"), (" toy", "<toy>"), ("a\tb", "<a-b>")])
def test_a_new_word_is_one_word(word, near):
    with pytest.raises(ConfigError, match=f"holds spaces, must be one word, such as {near}"):
        parse("textual_inversion", "--placeholder_token", word)


def test_processes_that_load_data_are_bounded(tmp_path, monkeypatch):
    options = {"dataset_name": "digits", "resolution": 8, "output_dir": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=r"--dataloader_num_workers 5000: at most .* processes here"):
        train("unconditional", dataloader_num_workers=5000, **options)
    assert not (tmp_path / "run").exists()
    for cpus, most in ((1, 16), (4, 16), (32, 128)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: set(range(cpus)))
        check_count(most)
        with pytest.raises(ConfigError, match=f"at most {most} processes here, four for each of {cpus} CPUs or 16"):
            check_count(most + 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("model") / "sd", length=8)


LONG = "a photo of a dog " * 3
SHORT = "a dog"


def warned(caplog, config, device_count=1):
    """What is said before a run of a config, and of its captions."""
    source = task_of(config).open_source()
    spec = task_of(config).make_spec(source)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        schedule = make_schedule(config, len(source), device_count)
        assembly.warn_of_vain_options(task_of(config), spec, schedule, device_count)
    return [record.getMessage() for record in caplog.records]


def test_prompts_that_are_cut_off_are_said_once(caplog, model, tmp_path):
    folder = str(pictures(tmp_path / "data"))
    start = ["--pretrained_model_name_or_path", str(model), "--resolution", "16"]
    data = ["--instance_data_dir", folder, "--instance_prompt"]
    config = command_line.parse_train(["dreambooth", *start, *data, SHORT, "--validation_prompt", SHORT], "train")[1]
    assert warned(caplog, config) == []
    config = command_line.parse_train(
        ["dreambooth", *start, *data, LONG, "--validation_prompts", SHORT, f"{LONG} b", LONG], "train"
    )[1]
    first, second = warned(caplog, config)
    assert first.startswith(f"--instance_prompt '{LONG}': the text encoder takes 8 tokens; it does not see '")
    assert second.startswith(f"--validation_prompts '{LONG} b': the text encoder takes 8 tokens, and 2 of 3 prompts")


def test_captions_that_are_cut_off_are_counted(caplog, model, tmp_path):
    folder = pictures(tmp_path / "data")
    for number in range(6):
        (folder / f"{number}.txt").write_text(LONG if number in (2, 4) else SHORT)
    (folder / "metadata.jsonl").unlink()
    words = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(folder), "--resolution", "16"]
    config = command_line.parse_train(["text_to_image", *words], "train")[1]
    source = task_of(config).open_source()
    tokenize = task_of(config).make_spec(source).tokenize
    with caplog.at_level(logging.WARNING):
        check_source(source, skip_bad_images=False, tokenize=tokenize)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("the text encoder takes 8 tokens, 2 of 6 captions are longer; of the first, ")
    assert "2.png, it does not see '" in said
    assert LONG.strip().endswith(said.removesuffix("'").rsplit("'", 1)[1])


@pytest.mark.parametrize(
    ("scheduler", "steps", "says"),
    [("cosine", 5, True), ("cosine", 11, False), ("constant", 5, False), ("constant_with_warmup", 10, True)],
)
def test_a_warm_up_that_does_not_end(caplog, scheduler, steps, says):
    config = parse(
        "unconditional", "--lr_scheduler", scheduler, "--lr_warmup_steps", "10", "--max_train_steps", str(steps),
        "--resolution", "32",
    )  # fmt: skip
    said = warned(caplog, config)
    assert [text.split(",")[0] for text in said] == [f"--lr_warmup_steps 10: the run ends after {steps} steps"] * says


def test_sums_over_one_device(caplog):
    config = parse("unconditional", "--reduce_dtype", "bf16", "--resolution", "32")
    assert warned(caplog, config) == ["--reduce_dtype bf16: one device sums nothing over devices; drop it"]
    assert warned(caplog, config, 8) == []


def test_a_run_says_what_is_in_vain(caplog, model, tmp_path):
    folder = pictures(tmp_path / "data", 2)
    for number in range(2):
        (folder / f"{number}.txt").write_text(LONG)
    (folder / "metadata.jsonl").unlink()
    with caplog.at_level(logging.WARNING, "flax_diffusion"):
        train(
            "text_to_image", pretrained_model_name_or_path=str(model), train_data_dir=str(folder), resolution=16,
            output_dir=str(tmp_path / "run"), max_train_steps=1, train_batch_size=1, report_to="none",
            draw_samples=False,
            lr_scheduler="cosine", lr_warmup_steps=3,
        )  # fmt: skip
    said = " | ".join(record.getMessage() for record in caplog.records)
    assert said.count("2 of 2 captions are longer") == 1
    assert said.count("--lr_warmup_steps 3: the run ends after 1 steps") == 1


def test_step_rules_are_read_before_models(tmp_path, monkeypatch):
    from flax_diffusion.jax_backend.backend import JaxBackend

    monkeypatch.setattr(JaxBackend, "init_state", lambda self: pytest.fail("models were loaded"))
    with pytest.raises(ConfigError, match="--lr_step_rules '1:10': write factor:step pairs"):
        train(
            "unconditional", dataset_name="digits", resolution=8, output_dir=str(tmp_path / "run"),
            lr_scheduler="piecewise_constant", lr_step_rules="1:10", unet={"block_out_channels": [8],
            "norm_num_groups": 4, "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
        )  # fmt: skip


@pytest.mark.parametrize("rules", ["-1:10,0.1", "nan:10,0.1", "1:10,inf", "1:10,-0.5", "1:10", "a"])
def test_step_rules_that_are_no_rates(rules):
    config = parse("unconditional", "--lr_scheduler", "piecewise_constant", f"--lr_step_rules={rules}")
    with pytest.raises(ConfigError, match=r"--lr_step_rules '.*': write factor:step pairs and a last factor from 0"):
        learning_rate_schedule(config, 100, 1e-4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("text_to_image --vae nowhere", "^--vae: nowhere is neither a folder"),
        ("text_to_image --tokenizer_name nowhere", "^--tokenizer_name: nowhere is neither a folder"),
        ("text_to_image --tokenizer_name MODEL", "^--tokenizer_name .*: is a whole pipeline; give its folder .*/token"),
        ("text_to_image --vae MODEL", "^--vae .*: is a whole pipeline; give its folder .*/vae$"),
        (
            "text_to_image --vae MODEL/unet",
            "^--vae: .*/unet: holds a UNet2DConditionModel, must hold the AutoencoderKL",
        ),
        (
            "text_to_image --pretrained_model_name_or_path no",
            "^--pretrained_model_name_or_path: no is neither a folder",
        ),
        (
            "text_to_image --pretrained_model_name_or_path DATA",
            "^--pretrained_.*: .* has no folder 'text_encoder', as a",
        ),
        ("text_to_image --resolution 15", "^--resolution 15: must be a multiple of 2, by .* divides it: 14 or 16$"),
        ("autoencoder --vae MODEL", "^--vae .*: is a whole pipeline; give its folder .*/vae$"),
        ("text_to_image --vae WIDE", "the VAE has 8 latent channels, the UNet takes 4: use a pair made for each other"),
        ("unconditional --cache_latents --center_crop --resolution 64", "--cache_latents: the model trains on pixels"),
        ("unconditional --unet MODEL", "^--unet .*: is a whole pipeline; give its folder .*/unet$"),
        ("dreambooth --instance_data_dir nowhere", "^--instance_data_dir: nowhere does not exist"),
        ("textual_inversion --train_data_dir nowhere", "^--train_data_dir: nowhere does not exist"),
    ],
)
def test_what_is_wrong_with_a_path_names_the_option(model, tmp_path, monkeypatch, words, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = pictures(tmp_path / "data", 1)
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide/config.json").write_text(json.dumps(VAE | {"latent_channels": 8}))
    places = {"MODEL": model, "DATA": folder, "WIDE": tmp_path / "wide"}
    for name, place in places.items():
        words = words.replace(name, str(place))
    task, *rest = words.split()
    start = [] if task in ("unconditional", "autoencoder") else ["--pretrained_model_name_or_path", str(model)]
    data = "--instance_data_dir" if task == "dreambooth" else "--train_data_dir"
    config = command_line.parse_train(
        [task, *start, data, str(folder), *_OWN.get(task, []), "--resolution", "16", *rest], "train"
    )[1]
    with pytest.raises(UserError, match=says):
        task_of(config).make_spec(task_of(config).open_source())


_OWN = {
    "dreambooth": ["--instance_prompt", "a dog"],
    "textual_inversion": ["--placeholder_token", "<x>", "--initializer_token", "a"],
}
