"""What a run's data hold, before it starts: `python -m flax_diffusion.data inspect [flags of train]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.inspection import command
from flax_diffusion.core.inspection.report import Report, as_text
from flax_diffusion.core.tasks.task import task_of

_SHOWN = 24
_HELP = f"""usage: python -m flax_diffusion.data inspect [TASK] [--config FILE.yaml] [flags of train]
                                             [--report_dir DIR] [--limit N] [--sheet N]

{__doc__}
It decodes every picture and tokenizes every caption, and prints counts, sizes, what is broken, equal, small or cut off,
and the sizes at which the pictures would be trained. Nothing is trained, and no weights are read.

  --report_dir DIR  Write {command.JSON_FILE}, {command.PAGE_FILE} and {command.SHEET_FILE} into this folder.
  --limit N         Look at no more than N examples, which are evenly spaced (default: all).
  --sheet N         Number of pictures that the page and the contact sheet show as the model is given them
                    (default: {_SHOWN}).

It exits with status 1 where a run would not take the data as they are.
"""


def inspect(
    task: str,
    config: str | Path | None = None,
    *,
    report_dir: str | None = None,
    limit: int | None = None,
    sheet: int = _SHOWN,
    **options: Any,
) -> Report:
    """Look at the data of a run, and train nothing.

    Args:
        task: As of `train`.
        config: Path of a YAML recipe; None for none.
        report_dir: Folder to write the report to, as JSON and as a page, with a contact sheet; None to write nothing.
        limit: Largest number of examples to look at, which are evenly spaced; None for all.
        sheet: Number of pictures that the page shows as the model is given them.
        options: Values of the flags of `train` by name; they override the recipe.

    Raises:
        UserError: For input that cannot be used; its message is one line with the fix.
    """
    values = command_line.merge(task, command_line.read_yaml(config) if config else {}, options, str(config))
    return command.inspect(task_of(values), report_dir=report_dir, limit=limit, sheet=sheet)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with the words of `argv`, or of this process for None.

    Raises:
        UserError: For input that cannot be used.
        SystemExit: With status 1 where a run would not take the data as they are.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        sys.stdout.write(_HELP)
        return
    if words[:1] != ["inspect"]:
        raise ConfigError(
            "python -m flax_diffusion.data: the first word must be inspect, as in `data inspect --config …`"
        )
    own = command_line.Parser(prog="python -m flax_diffusion.data inspect", add_help=False)
    own.add_argument("--report_dir")
    own.add_argument("--limit", type=int)
    own.add_argument("--sheet", type=int, default=_SHOWN)
    given, rest = own.parse_known_args(words[1:])
    _, config = command_line.parse_train(rest, own.prog)
    report = command.inspect(task_of(config), report_dir=given.report_dir, limit=given.limit, sheet=given.sheet)
    sys.stdout.write(as_text(report))
    if not report.usable:
        raise SystemExit(1)


if __name__ == "__main__":
    command_line.main_guard(main)
