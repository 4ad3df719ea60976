"""Parsing of the command line and a YAML file to a typed config, with errors of one line.

Flags override the file, and the file overrides the defaults. argparse only splits the command line. Every value, from
either source, is checked by the same pydantic model, so that a mistake gets the same message wherever it was made.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from pydantic import BaseModel, SecretStr

from flax_diffusion.core.cli.unknown import unknown_option
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.config.recipes import recipe_file, recipes
from flax_diffusion.core.config.spellings import Given, checked, fields_by_spelling, in_file, spellings, union_members
from flax_diffusion.core.errors import ConfigError, UserError, nearest, shown
from flax_diffusion.core.io.untrusted import MAX_YAML_BYTES, parse_json, parse_yaml, read_text
from flax_diffusion.core.tasks.task import TASKS, Task

Complete = Callable[[type[Task[Any]], dict[str, Any]], dict[str, Any]]
"""Function of a task's class and the given values by field, which returns the values with others added."""


def _parse_flag(text: str, annotation: Any) -> Any:
    """Prepare one word of the command line for pydantic: `null` for optional fields, JSON or YAML for mappings."""
    members = union_members(annotation)
    if type(None) in members and text.lower() in ("null", "none"):
        return None
    if any(_takes_mapping(member) for member in members) and text.lstrip().startswith("{"):
        return _mapping(text)
    return text


def _mapping(text: str) -> Any:
    """Parse JSON, whose numbers may look like 1e-4, or YAML."""
    try:
        return parse_json(text)
    except ValueError:
        try:
            return parse_yaml(text)
        except ValueError as error:
            raise ConfigError(
                f"{text!r} is neither JSON nor YAML ({error}): quote the mapping for the shell"
            ) from error


def _takes_mapping(annotation: Any) -> bool:
    if get_origin(annotation) is list:
        return any(_takes_mapping(member) for member in get_args(annotation))
    return get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel))


def build(model: type[BaseModel], values: dict[str, Any], origin: str, given: Given | None = None) -> Any:
    """Make a config, or turn pydantic's report into an error of one line.

    Args:
        model: The config class.
        values: Values by field name or alias.
        origin: Where the values come from, for the message: a file name or "command line".
        given: The spelling and the origin of single options; None if they are as in `values`.

    Returns:
        An instance of the config class.

    Raises:
        ConfigError: For unknown names, wrong types or values, and rules between fields.
    """
    known = fields_by_spelling(model)
    for name in values:
        if name not in known:
            raise unknown_option(name, model, known, origin)
    values = {name: _without_paths(value) for name, value in values.items()}
    return checked(model, values, origin, given)


def _without_paths(value: Any) -> Any:
    """Return a path as text, also in a list, as Python may give it; anything else as it is."""
    if isinstance(value, list):
        return [_without_paths(one) for one in value]
    return str(value) if isinstance(value, os.PathLike) else value


class Recipe(dict[str, Any]):
    """Values by option, as YAML reads them.

    Attributes:
        written: The same values, with each scalar as it is written in the file.
    """

    def __init__(self, values: dict[str, Any], written: dict[str, Any]):
        super().__init__(values)
        self.written = written


def read_yaml(path: str | Path) -> Recipe:
    """Read a recipe, which is a YAML mapping of option to value.

    Args:
        path: The YAML file, or the name of an installed recipe.

    Returns:
        The values by option.

    Raises:
        ConfigError: If the file is missing, is not YAML, is larger than any recipe, or is not a mapping.
    """
    try:
        text = read_text(recipe_file(path), MAX_YAML_BYTES)
        values, written = parse_yaml(text), parse_yaml(text, words=True)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        held = "is empty" if values is None else f"holds {shown(values)}"
        raise ConfigError(f"--config {path}: {held}, must be a mapping of option: value")
    return Recipe(values, written)


_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|-inf$|-nan$")


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, which raises `ConfigError` with the nearest right name."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self._negative_number_matcher = _NEGATIVE  # argparse's own has no exponents, and takes -1e-4 for an option

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage and exiting.

        Args:
            message: argparse's message.
        """
        if message.endswith("expected one argument"):
            option = message.removeprefix("argument ").split(":")[0].split("/")[0]
            message += f"; one that begins with a dash is written {option}=-…"
        raise ConfigError(f"command line: {message}")

    def parse(self, argv: Sequence[str], model: type[BaseModel] | None = None) -> dict[str, Any]:
        """Parse the words of a command line.

        Args:
            argv: The words.
            model: The config class that has the options, for messages; None for none.

        Returns:
            Values by field, of the options that were given.

        Raises:
            ConfigError: For an unknown option or a word that belongs to none.
        """
        known = [option for action in self._actions for option in action.option_strings]
        values, extra = self.parse_known_args(argv)
        for word in extra:
            if word.startswith("--"):
                raise unknown_option(word.split("=")[0], model, known, "command line")
            raise ConfigError(f"command line: unexpected word '{word}': quote values that hold spaces")
        return vars(values)


def add_fields(parser: argparse.ArgumentParser, model: type[BaseModel], *, defaults: bool = True) -> None:
    """Add a flag to a parser for every field of a config class; values stay words until `build` checks them.

    Args:
        parser: The parser.
        model: The config class.
        defaults: Whether the help shows the class's defaults. It does not where a task may have others.
    """
    for name, field in model.model_fields.items():
        flags = [f"--{spelling}" for spelling in spellings(name, field)]
        kind = field.annotation
        if bool in union_members(kind):
            how: dict[str, Any] = {"action": _Switch, "nargs": "?", "metavar": _metavar(kind)}
        else:
            how = {"type": functools.partial(_parse_flag, annotation=kind), "metavar": _metavar(kind)}
            if get_origin(kind) is list:
                how |= {"nargs": "+", "action": "extend"}  # --prompt A B, or --prompt A --prompt B
        default = "required" if field.is_required() else f"default: {field.get_default(call_default_factory=True)}"
        text = f"{field.description} ({default})" if defaults else str(field.description)
        text = text.replace("%", "%%")
        parser.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=text, **how)


class _Switch(argparse.Action):
    """Boolean flag: `--use_ema`, `--no_use_ema` or `--use_ema false`."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any):
        negative = [f"--no_{option[2:]}" for option in option_strings]
        super().__init__(option_strings + negative, dest, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        negative = bool(option_string and option_string.startswith("--no_"))
        if values is not None and negative:
            raise ConfigError(f"command line: {option_string} takes no value, got {values!r}")
        setattr(namespace, self.dest, (not negative) if values is None else values)


def _metavar(annotation: Any) -> str:
    words = []
    for member in union_members(annotation):
        if member is type(None):
            continue
        if get_origin(member) is typing.Literal:
            words.append("{" + ",".join(str(choice) for choice in get_args(member)) + "}")
        elif _takes_mapping(member):
            words.append("MAPPING")
        elif get_origin(member) is list:
            words.append(_metavar(get_args(member)[0]))
        else:
            words.append(getattr(member, "__name__", "str").upper().replace("SECRETSTR", "TOKEN"))
    return "|".join(words)


def parse_train(argv: Sequence[str], prog: str, complete: Complete | None = None) -> tuple[str, TrainConfig]:
    """Parse `[TASK] [--config FILE.yaml] [flags]`.

    The file may name the task instead (`task: unconditional`).

    Args:
        argv: The words of the command line.
        prog: Name of the program, for its help.
        complete: Adds options that the user need not give; None for none.

    Returns:
        The task's name and its config.

    Raises:
        ConfigError: For unknown options and wrong values, before any long work.
        SystemExit: After `--help`.
    """
    first = Parser(prog=prog, add_help=False)
    first.add_argument("task", nargs="?")
    first.add_argument("--config", nargs="?", const="")
    leading, _ = first.parse_known_args(_leading_words(argv))
    if leading.config == "":
        raise ConfigError(f"--config: name a file, or one of the recipes {', '.join(recipes())}")
    from_file = read_yaml(leading.config) if leading.config else {}
    task = leading.task or from_file.get("task")
    if leading.task and from_file.get("task", leading.task) != leading.task:
        raise ConfigError(f"task {leading.task} on the command line, {from_file['task']} in {leading.config}: drop one")

    parser = Parser(prog=prog, description=_description(), usage=f"{prog} TASK [--config FILE.yaml] [flags]")
    parser.add_argument("task", nargs="?", metavar="TASK", help="one of: " + ", ".join(TASKS))
    parser.add_argument("--config", metavar="FILE.yaml", help="Recipe: a file or a name; flags override it.")
    if task is None and not {"-h", "--help"} & set(argv):
        raise ConfigError(f"no task: name one of {', '.join(TASKS)}, e.g. `{prog} unconditional --dataset_name digits`")
    model = _task_config(str(task)) if task else TrainConfig
    add_fields(parser, model, defaults=task is not None)
    flags = parser.parse(argv, model)
    if flags["task"] not in (None, task):
        raise ConfigError(f"tasks {task} and {flags['task']}: drop one, here or in {leading.config}")
    del flags["task"], flags["config"]
    words = [word[2:].split("=")[0] for word in argv if word.startswith("--")]
    fields = fields_by_spelling(model)
    spelt = {fields[word]: word for word in words if word in fields}
    return str(task), merge(str(task), from_file, flags, str(leading.config), spelt, complete)


def _task_config(task: str) -> type[TrainConfig]:
    """Return the config class of a task.

    Raises:
        ConfigError: If there is no such task.
    """
    if task not in TASKS:
        raise ConfigError(f"unknown task '{task}'{nearest(task, TASKS)}; the tasks are {', '.join(TASKS)}")
    return TASKS[task].config_class


def _leading_words(argv: Sequence[str]) -> list[str]:
    """Return the task, which is the first word or follows `--config FILE`, and `--config FILE` itself."""
    words, places = [], [0]
    for position, word in enumerate(argv):
        if word == "--config":
            words += list(argv[position : position + 2])
            places.append(position + 2)
        elif word.startswith("--config="):
            words.append(word)
            places.append(position + 1)
    tasks = [argv[place] for place in places if place < len(argv) and not argv[place].startswith("-")]
    return tasks[:1] + words


def merge(
    task: str,
    from_file: dict[str, Any],
    flags: dict[str, Any],
    file_name: str,
    spelt: dict[str, str] | None = None,
    complete: Complete | None = None,
) -> TrainConfig:
    """Merge flags, file and defaults into one checked config; the former override the latter.

    Args:
        task: Name of the task.
        from_file: Values by option, from a file. The words of a `Recipe` are taken as they are written there.
        flags: Values by option, given directly.
        file_name: Name of the file, for messages.
        spelt: Spellings by field, of flags that were given under another name than the field's.
        complete: As in `parse_train`.

    Returns:
        The config.

    Raises:
        ConfigError: For unknown options and wrong values.
    """
    model = _task_config(task)
    fields = fields_by_spelling(model)
    written = from_file.written if isinstance(from_file, Recipe) else from_file
    values: dict[str, Any] = {}
    given: dict[str, tuple[str, str]] = {}
    for key, value in from_file.items():
        if key == "task":
            continue
        if key not in fields:
            raise unknown_option(key, model, fields, file_name)
        name = fields[key]
        if name in given:
            raise ConfigError(f"{file_name}: {given[name][0]} and {key} are one option: drop one")
        if value is not None and SecretStr in union_members(model.model_fields[name].annotation):
            raise ConfigError(
                f"{file_name}: {key}: a file is there for others to read: take it out, and set the environment "
                f"variable HF_TOKEN, log in by `hf auth login`, or give --{key} on the command line"
            )
        values[name] = in_file(value, written[key], model.model_fields[name].annotation)
        given[name] = (key, file_name)
    values |= {fields.get(key, key): value for key, value in flags.items()}
    given |= {fields.get(key, key): ((spelt or {}).get(key, key), "command line") for key in flags}
    if complete is not None:
        values = complete(TASKS[task], values)
    origin = f"{file_name} and command line" if from_file and flags else file_name if from_file else "command line"
    return build(model, {first_spelling(model, key): value for key, value in values.items()}, origin, given)


def first_spelling(model: type[BaseModel], name: str) -> str:
    """Return the spelling of a field that pydantic accepts."""
    return spellings(name, model.model_fields[name])[0] if name in model.model_fields else name


def main_guard(main: Callable[[], None]) -> None:
    """Run a command, and turn its errors for users into one line on stderr.

    Args:
        main: The command.

    Raises:
        SystemExit: With the exit status of a `UserError`, or 130 after Ctrl-C.
    """
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_status) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None


def _description() -> str:
    tasks = "\n".join(f"  {name:16} {str(task.config_class.__doc__).splitlines()[0]}" for name, task in TASKS.items())
    return f"Train a diffusion model.\n\n{tasks}\n\n`TASK --help` lists a task's own options and defaults."
