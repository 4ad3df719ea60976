"""What a run says: whole lines, a bar that fits the terminal, and a line every 30 seconds where there is none."""

import contextlib
import io
import logging
import re
import threading

import pytest
from tqdm import tqdm

from flax_diffusion.core.display import block, first_line
from flax_diffusion.core.display.console import LAST, Console, Handler, duration, using
from flax_diffusion.core.display.steps import Steps
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.run import launch


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def console_of(clock, live):
    stream = io.StringIO()
    return Console(stream, live=live, clock=clock, stamp=lambda: f"[{clock.now:g}]"), stream


def screen(text):
    """The lines that a terminal shows in the end, of text that moves by carriage returns."""
    shown = []
    for line in text.split("\n"):
        cells = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        shown.append("".join(cells).rstrip())
    return shown


def test_a_file_has_a_line_every_30_seconds_and_at_events(clock):
    console, stream = console_of(clock, live=False)
    steps = Steps(console, 0, 900)
    steps.begin("compiling the first step")
    for clock.now in (10.0, 29.0, 30.0, 59.0, 61.0):
        console.refresh()
    clock.now = 70.0
    steps.step(1, 8, 1.25, 1e-4)
    for step in range(2, 101):
        clock.now += 0.5
        steps.step(step, 8, 1.25, 1e-4)
    console.say("checkpoint saved: x")
    assert stream.getvalue().splitlines() == [
        "[0] compiling the first step …",
        "[30] compiling the first step … 0:30",
        "[61] compiling the first step … 1:01",
        "[70] the first step is taken after 1:10",
        "[91] step 43 of 900 (5%), loss 1.25, learning rate 0.0001, 16 images/s, 7:08 left",
        "[119.5] checkpoint saved: x",
    ]
    assert "\r" not in stream.getvalue()


def test_time_left_knows_nothing_of_compiling_nor_of_pauses(clock):
    console, _ = console_of(clock, live=False)
    steps = Steps(console, 0, 101)
    steps.begin("compiling the first step")
    clock.now = 600.0
    steps.step(1, 8)
    assert "left" not in steps.plain()
    for step in range(2, 12):
        clock.now += 2.0
        steps.step(step, 8)
    assert steps.plain() == "step 11 of 101 (11%), 4 images/s, 3:00 left"
    clock.now += 300.0  # samples are drawn
    steps.pace.go_on()
    clock.now += 2.0
    steps.step(12, 8)
    assert steps.pace.seconds == 2.0
    assert steps.plain().endswith("2:58 left")


@pytest.mark.parametrize("width", [20, 40, 79, 200])
@pytest.mark.parametrize(
    ("step", "total", "loss", "rate"),
    [(1, 9, 0.5, 1e-4), (123_456_789, 9_876_543_210, -1.23456e-100, 9.87654e-300), (3, 4, float("nan"), 0.0)],
)
def test_the_bar_fits(clock, width, step, total, loss, rate):
    console, _ = console_of(clock, live=True)
    steps = Steps(console, 0, total)
    for _ in range(2):
        clock.now += 12345.678
        steps.step(step, 10**9, loss, rate)
    text = steps.moving(width)
    assert len(text) <= width
    assert text.isprintable()
    if width >= 40:
        assert f"{step:,}/{total:,}" in text
    if width == 200:
        assert "[" in text
        assert "img/s" in text


def test_the_bar_keeps_its_length(clock):
    """A loss of 0.24 takes as much room as one of 0.2417."""
    steps = Steps(console_of(clock, live=True)[0], 0, 100)
    places = []
    for step, loss in enumerate((0.9, 0.8, 0.2417, 0.24, 0.15), 20):  # the pace is known from the second on
        clock.now += 1.0
        steps.step(step, 10, loss, 1e-3)
        places.append(steps.moving(80).index("]"))
    assert len(set(places[2:])) == 1


def test_a_terminal_keeps_one_moving_line(clock):
    console, stream = console_of(clock, live=True)
    steps = Steps(console, 0, 10)
    steps.begin("compiling the first step")
    for step in range(1, 11):
        clock.now += 1.0
        steps.step(step, 8, 10.0**-step, 1e-4)
        if step == 5:
            console.say("checkpoint saved: x")
    with console.doing("drawing samples"):
        assert screen(stream.getvalue())[-1] == "drawing samples … 0:00"
    assert screen(stream.getvalue())[-1].startswith("100% [##")
    console.hide(steps)
    console.say("the end")
    assert screen(stream.getvalue()) == [
        "compiling the first step …", "the first step is taken after 0:01", "checkpoint saved: x", "the end", "",
    ]  # fmt: skip
    assert all(len(part) <= 79 for part in re.split("[\r\n]", stream.getvalue()))


def test_threads_do_not_tear_lines(clock):
    console, stream = console_of(clock, live=True)
    steps = Steps(console, 0, 1000)
    steps.begin("compiling the first step")

    def save(name):
        for number in range(50):
            console.say(f"{name} {number} is saved")

    threads = [threading.Thread(target=save, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for step in range(1, 200):
        clock.now += 1.0
        steps.step(step, 8, 1.0, 1e-4)
    for thread in threads:
        thread.join()
    console.hide(steps)
    said = [line for line in screen(stream.getvalue()) if "saved" in line]
    assert sorted(said) == sorted(f"{name} {number} is saved" for name in ("first", "second") for number in range(50))


def test_counting(clock):
    console, stream = console_of(clock, live=False)
    with console.counting("checking", 400, "examples", delay=2.0) as add:
        add(100)
        clock.now = 30.0
        add(100)
    assert stream.getvalue() == "[30] checking: 200 of 400 examples, 0:30, 0:30 left\n"


def test_what_is_not_shown_yet_hides_nothing(clock):
    console, stream = console_of(clock, live=True)
    with console.doing("training"), console.counting("checking", 4, "examples", delay=2.0) as add:
        clock.now = 1.0
        add(1)
        assert screen(stream.getvalue()) == ["training … 0:01"]
        clock.now = 3.0
        add(1)
        assert screen(stream.getvalue()) == ["checking: 2 of 4 examples, 0:03, 0:03 left"]


@pytest.mark.parametrize(
    ("level", "main", "said"),
    [
        (logging.INFO, True, ["info", "warning: bad", "error: worse", "end"]),
        (logging.WARNING, True, ["warning: bad", "error: worse", "end"]),
        (logging.ERROR, True, ["error: worse", "end"]),
        (logging.INFO, False, ["error: worse"]),
    ],
)
def test_levels(clock, level, main, said):
    console, stream = console_of(clock, live=True)
    console.level, console.main = level, main
    log, handler = logging.Logger("flax_diffusion.core.somewhere"), Handler()
    log.addHandler(handler)
    with using(console):
        log.info("info")
        log.warning("bad")
        log.error("worse")
        log.info("end", extra=LAST)
    assert stream.getvalue().splitlines() == said


def test_lines_of_libraries_bear_their_name(clock):
    console, stream = console_of(clock, live=True)
    with using(console):
        log = logging.Logger("somelibrary.part")
        log.addHandler(Handler())
        log.warning("a %s", "word")
    assert stream.getvalue() == "warning: somelibrary.part: a word\n"


def test_the_bar_of_a_library_is_left_alone(clock):
    """A download shows its own; the moving line waits, and lines go above it."""
    console, stream = console_of(clock, live=True)
    with contextlib.closing(tqdm(total=10, file=stream)), console.doing("opening data and models"):
        console.say("a line")
        assert "opening" not in stream.getvalue()
    with console.doing("opening data and models"):
        assert "opening" in screen(stream.getvalue())[-1]
    assert "a line" in screen(stream.getvalue())


def test_a_terminal_that_was_closed_ends_no_run(clock):
    class Closed(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    console = Console(Closed(), live=True, clock=clock)
    steps = Steps(console, 0, 3)
    steps.begin("compiling the first step")
    steps.step(1, 8, 1.0, 1e-4)
    assert steps.plain().startswith("step 1 of 3")


@pytest.mark.parametrize(
    ("words", "silent"),
    [
        (["unconditional"], False),
        (["unconditional", "--quiet"], True),
        (["unconditional", "--quiet", "true", "--seed", "1"], True),
        (["unconditional", "--quiet=true"], True),
        (["unconditional", "--quiet", "false"], False),
        (["unconditional", "--no_quiet"], False),
        (["--log_level", "error"], True),
        (["--log_level=warning"], True),
        (["--log_level", "debug"], False),
        (["--output_dir", "quiet"], False),
        (["--config", "RECIPE"], True),
    ],
)
def test_who_asks_for_silence_gets_no_first_line(words, silent, tmp_path, clock):
    (tmp_path / "recipe.yaml").write_text("task: unconditional\nquiet: true  # at night\n")
    words = [word.replace("RECIPE", str(tmp_path / "recipe.yaml")) for word in words]
    console, stream = console_of(clock, live=True)
    with using(console):
        first_line.say("training", "JAX", words)
        first_line.say("training", "JAX", [*words, "--help"])
    assert stream.getvalue() == ("" if silent else "flax-diffusion: training with JAX; reading the options …\n")


def test_no_first_line_in_a_file_or_another_process(clock, monkeypatch):
    for live, rank in ((False, "0"), (True, "1")):
        monkeypatch.setenv("RANK", rank)
        console, stream = console_of(clock, live=live)
        with using(console):
            first_line.say("training", "JAX", ["unconditional"])
        assert not stream.getvalue()


@pytest.mark.parametrize(
    ("step", "total", "every", "count"), [(0, 30, 10, 3), (0, 31, 10, 4), (10, 30, 10, 2), (5, 8, 10, 1), (9, 9, 2, 0)]
)
def test_how_many_checkpoints(step, total, every, count):
    saved = {one for one in range(step + 1, total + 1) if one % every == 0 or one == total}
    assert block.checkpoints(step, total, every) == count == len(saved)


def test_words_for_sizes_and_times():
    assert [block.size(count) for count in (0, 999, 1000, 3_440_000_000, 5 * 10**15)] == [
        "0 bytes", "999 bytes", "1.0 kB", "3.4 GB", "5000.0 TB",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (-1, 7.4, 192, 93700)] == ["0:00", "0:07", "3:12", "26:01:40"]


def test_what_one_run_is_told_holds_for_no_other(clock, monkeypatch, tmp_path):
    """Also where it fails: here, because PyTorch is said to be missing."""
    console, stream = console_of(clock, live=True)

    def refuse():
        logging.getLogger("flax_diffusion").warning("is said")
        raise ConfigError("not installed")

    options = {"dataset_name": "digits", "output_dir": str(tmp_path)}
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a program that logs nothing
    for quiet in (True, False):
        with using(console), pytest.raises(ConfigError, match="not installed"):
            launch.train(refuse, "unconditional", None, options | {"quiet": quiet}, generate=print)
    assert (console.level, console.moves, console.main) == (logging.INFO, True, True)
    lines = screen(stream.getvalue())
    assert lines[:2] == ["warning: is said", "task        unconditional"]
    assert lines[-2:] == ["warning: is said", ""]
    assert not logging.getLogger().handlers
