"""The page of a run, and a page that compares runs: `python -m flax_diffusion.report RUN [RUN …]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.report import command
from flax_diffusion.core.report.files import COMPARISON, PAGE

_HELP = f"""usage: python -m flax_diffusion.report RUN [RUN …] [--output_file FILE]

{__doc__}
A run keeps {PAGE} in its output folder up to date by itself. This makes it again, also for runs of older versions, from
what is in the folder: curves, values, samples and options. Of several runs it makes one page: curves over each other,
the options by which they differ, last values, and samples side by side.

  --output_file FILE  The page to write (default: {PAGE} in the folder of the run; of several runs, {COMPARISON} in the
                      present folder).
"""


def report(*runs: str | Path, output_file: str | Path | None = None) -> Path:
    """Make the page of a run again, or a page that compares several, and return its path.

    Args:
        runs: Output folders of the runs.
        output_file: The page to write; None for `report.html` in the folder of the run, or of several runs for
            `comparison.html` in the present folder.

    Raises:
        UserError: For a folder that holds no run, or a file that cannot be written; its message is one line with the
            fix.
    """
    return command.report([str(run) for run in runs], None if output_file is None else str(output_file))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with the words of `argv`, or of this process for None.

    Raises:
        UserError: For input that cannot be used.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        sys.stdout.write(_HELP)
        return
    parser = command_line.Parser(prog="python -m flax_diffusion.report", add_help=False)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--output_file")
    given = parser.parse(words)
    sys.stdout.write(f"{report(*given['runs'], output_file=given['output_file'])}\n")


if __name__ == "__main__":
    command_line.main_guard(main)
