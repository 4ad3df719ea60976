"""The steps of a run as a bar in a terminal, or as a plain line."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from flax_diffusion.core.display.console import Console, Doing, duration

_WINDOW = 200  # steps whose mean time is the pace
_BAR = range(8, 31)  # characters of a bar


class Pace:
    """Seconds of a step, the mean of the latest ones. What is between steps, and the first one, which compiles, is out.

    Args:
        clock: Seconds that only grow.
        window: Steps whose mean is taken.
    """

    def __init__(self, clock: Callable[[], float], window: int = _WINDOW):
        self._clock = clock
        self._last: float | None = None
        self._spans: deque[float] = deque(maxlen=window)

    def step(self) -> None:
        """Count a step."""
        now = self._clock()
        if self._last is not None:
            self._spans.append(now - self._last)
        self._last = now

    def go_on(self) -> None:
        """Leave out the time since the last step, in which something else went on."""
        if self._last is not None:
            self._last = self._clock()

    @property
    def seconds(self) -> float | None:
        """Seconds of a step; None where that is not known yet."""
        return sum(self._spans) / len(self._spans) if self._spans else None


class Steps:
    """What goes on in training. Until the first step is done, that is what this step waits for.

    Args:
        console: Where it is shown.
        first_step: Steps taken before this start of the run.
        total: Steps of the whole run.
    """

    def __init__(self, console: Console, first_step: int, total: int):
        self._console, self._step, self._total = console, first_step, total
        self._beginning: Doing | None = None  # until the first step is done
        self.pace = Pace(console.clock)
        self._values: list[tuple[str, str]] = []  # short and long text, the most important one first
        self._images: int | None = None

    def begin(self, what: str) -> None:
        """Begin to show the steps.

        Args:
            what: What the first step does that takes long, such as "compiling the first step".
        """
        self._beginning = Doing(self._console, what)
        self._console.say(f"{what} …")
        self._console.show(self)

    def step(self, step: int, images: int, loss: float | None = None, rate: float | None = None) -> None:
        """Count a step that is done.

        Args:
            step: Its number, from 1.
            images: Images in it.
            loss: Its loss; None where there is none to tell.
            rate: Its learning rate; None likewise.
        """
        beginning, self._beginning = self._beginning, None
        self.pace.step()
        self._step, self._images = step, images
        if loss is not None and rate is not None:
            self._values = [
                (f"loss {_padded(loss, 4)}", f"loss {loss:.4g}"),
                (f"lr {_padded(rate, 3)}", f"learning rate {rate:.3g}"),
            ]
        if beginning is not None:
            self._console.say(f"the first step is taken after {duration(beginning.seconds)}")
        self._console.refresh()

    def _known(self) -> tuple[str, str]:
        """Return images a second and the time left; "" for what is not known."""
        seconds = self.pace.seconds
        if seconds is None or self._images is None:
            return "", ""
        speed = f"{self._images / max(seconds, 1e-9):.4g}"
        return speed, f"{duration(seconds * (self._total - self._step))} left" if self._step < self._total else ""

    @property
    def _share(self) -> float:
        return min(1.0, self._step / max(1, self._total))

    def plain(self) -> str:
        """Return how far the run is, as a line."""
        if self._beginning is not None:
            return self._beginning.plain()
        speed, left = self._known()
        parts = [f"step {self._step:,} of {self._total:,} ({self._share:.0%})", *(long for _, long in self._values)]
        parts += [f"{speed} images/s"] * bool(speed) + [left] * bool(left)
        return ", ".join(parts)

    def moving(self, width: int) -> str:
        """Return the same as a bar. Where it does not fit, the least important parts are left out."""
        if self._beginning is not None:
            return self._beginning.moving(width)
        speed, left = self._known()
        head = f"{self._share:4.0%} "
        parts = [f"{self._step:,}/{self._total:,}", left, *(short for short, _ in self._values)]
        parts.insert(3, f"{speed} img/s" if speed else "")
        parts = [part for part in parts if part]
        while len(parts) > 1 and len(head + "  ".join(parts)) > width:
            parts.pop()
        text = "  ".join(parts)
        room = min(width - len(head) - len(text) - 3, _BAR.stop - 1)  # of the bar, between two brackets and a space
        if room in _BAR:
            done = int(room * self._share)
            head += f"[{'#' * done}{'.' * (room - done)}] "
        return (head + text)[:width]


def _padded(value: float, digits: int) -> str:
    """Return a number with so many digits, zeros at the end among them: the bar beside it keeps its length."""
    return f"{value:#.{digits}g}".rstrip(".")
