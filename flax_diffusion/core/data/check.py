"""A look at all examples before the first step, so that none of them ends a run hours later.

Captions are read in full; of a picture only its header, which tells a missing, empty or foreign file and an implausible
size, and not one that was cut off. What the pixels alone show is found when they are decoded.

A header takes about a tenth of a millisecond on a local disk, so of 262,144 examples at most: half a minute. In an
object store each is a request, so of 8,192. Of larger datasets, so many are taken at even distances.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from flax_diffusion.core.data.bad import MAX_BAD_SHARE, example_name, most_bad
from flax_diffusion.core.data.captions import Tokenize
from flax_diffusion.core.data.images.decoding import check_header
from flax_diffusion.core.data.sources.source import Source, first_few
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.io.files import is_local

MAX_CHECKED = 2**18
MAX_CHECKED_IN_STORE = 2**13
_THREADS, _THREADS_IN_STORE = 8, 64  # the latter wait for answers
_AT_A_TIME = 64  # examples a task
_BAR_AFTER = 2.0  # seconds

log = logging.getLogger(__name__)


def check_source(
    source: Source,
    *,
    skip_bad_images: bool,
    everywhere: Callable[[bool], bool] = bool,
    main: bool = True,
    tokenize: Tokenize | None = None,
) -> None:
    """Read every example's caption and every picture's header.

    Args:
        source: Of the examples.
        skip_bad_images: Bear as many bad examples as a run bears.
        everywhere: Tells whether something holds in every process of the run, all of which must call this.
        main: Shows the bar, if it takes over two seconds.
        tokenize: For captions; how many of them are cut off is said once.

    Raises:
        DataError: Examples cannot be used, here or in another process: how many, the first few, and what is wrong
            with the first.
    """
    looked_at, look = _look(source, main, tokenize)
    reasons = dict(look.reasons[index] for index in sorted(look.reasons))
    failure = _failure(looked_at, len(source), reasons, skip_bad_images)
    if not everywhere(failure is None) and failure is None:
        raise DataError("another process of this run cannot use its data, and says why; it must see the same files")
    if failure is not None:
        raise failure
    if not main:
        return
    if looked_at < len(source):
        log.info("looked at %d of %d examples before the start", looked_at, len(source))
    if look.empty:
        log.warning("%d captions are empty: %s", len(look.empty), first_few(sorted(look.empty)))
    if tokenize is not None and look.cut_off:
        name, rest = look.cut_off[min(look.cut_off)]
        log.warning(
            "the text encoder takes %d tokens, %d of %d captions are longer; of the first, %s, it does not see '%s'",
            tokenize.length, len(look.cut_off), looked_at, name, rest,
        )  # fmt: skip


def _failure(looked_at: int, examples: int, reasons: dict[str, str], skip_bad_images: bool) -> DataError | None:
    most = most_bad(examples)
    if len(reasons) <= (most if skip_bad_images else 0):
        return None
    first = next(iter(reasons.values()))
    if len(reasons) == 1:
        return DataError(f"{first}, or pass over such by --skip_bad_images")
    fix = "restore or remove them"
    if skip_bad_images:
        fix += f", which are over {MAX_BAD_SHARE:.0%}"
    elif len(reasons) <= most:
        fix += ", or pass over such by --skip_bad_images"
    return DataError(
        f"{len(reasons)} of {looked_at} examples cannot be used: {first_few(list(reasons))}; {fix}. The first: {first}"
    )


def _look(source: Source, main: bool, tokenize: Tokenize | None) -> tuple[int, "_Look"]:
    """How many examples were looked at, and what was found."""
    local = _is_local(source)
    most = min(len(source), MAX_CHECKED if local else MAX_CHECKED_IN_STORE)
    indices = np.linspace(0, len(source) - 1, most).astype(int).tolist()
    look = _Look(source, tokenize)
    parts = [indices[first : first + _AT_A_TIME] for first in range(0, most, _AT_A_TIME)]
    pool = ThreadPoolExecutor(_THREADS if local else _THREADS_IN_STORE, thread_name_prefix="check")
    try:
        with tqdm(total=most, desc="checking", unit="example", delay=_BAR_AFTER, disable=not main) as bar:
            for part in pool.map(look.some, parts):
                bar.update(part)
    finally:
        pool.shutdown(cancel_futures=True)
    return most, look


def _is_local(source: Source) -> bool:
    """Whether reading an example asks no object store."""
    try:
        image = source[0].image
    except DataError:
        return True
    return isinstance(image, (bytes, np.ndarray, Image.Image)) or is_local(image)


class _Look:
    """What several threads find.

    Attributes:
        reasons: By index, the name of an example that cannot be used, and why.
        empty: The names of those whose caption is empty.
        cut_off: By index, the name of an example whose caption is too long, and what is too much of it.
    """

    def __init__(self, source: Source, tokenize: Tokenize | None):
        self._source = source
        self._tokenize = tokenize
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self.reasons: dict[int, tuple[str, str]] = {}
        self.empty: set[str] = set()
        self.cut_off: dict[int, tuple[str, str]] = {}

    def some(self, indices: list[int]) -> int:
        """Looks at some examples and returns how many."""
        for index in indices:
            try:
                record = self._source[index]
                if self._is_new(record.name):  # DreamBooth's pictures stand in an epoch several times
                    check_header(record)
                    if record.caption == "":
                        self.empty.add(record.name)
                    if rest := self._rest(record.caption):
                        self.cut_off[index] = (record.name, rest)
            except DataError as error:
                self.reasons[index] = (example_name(self._source, index), str(error))
        return len(indices)

    def _rest(self, caption: str | Sequence[str] | None) -> str:
        """What is cut off of a caption, or of the first that is cut off of several."""
        if self._tokenize is None or caption is None:
            return ""
        captions = [caption] if isinstance(caption, str) else caption
        return next(filter(None, map(self._tokenize.cut_off, captions)), "")

    def _is_new(self, name: str) -> bool:
        with self._lock:
            known = name in self._seen
            self._seen.add(name)
        return not known
