"""Check of the examples before the first step, so that a bad one does not end the run hours later.

Captions are read in full. Of a picture only the header is read: it shows a missing or empty file, an unknown format or
an implausible size, but not a file that was cut off. Errors that only the pixels show are found when they are decoded.

Reading a header takes about a tenth of a millisecond on a local disk, so at most 262,144 examples are checked, in half
a minute. In an object store each header is a request, so at most 8,192 are. In larger datasets the checked examples are
evenly spaced.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from flax_diffusion.core.data.bad import MAX_BAD_SHARE, example_name, max_bad_examples
from flax_diffusion.core.data.captions import TokenizePrompt
from flax_diffusion.core.data.images.decoding import check_header
from flax_diffusion.core.data.sources.source import Source, first_few
from flax_diffusion.core.display import console
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.io.files import is_local

MAX_CHECKED = 2**18
MAX_CHECKED_IN_STORE = 2**13
_THREADS, _THREADS_IN_STORE = 8, 64  # threads for an object store wait for answers most of the time
_EXAMPLES_PER_TASK = 64
_BAR_DELAY = 2.0  # seconds before the progress is shown

log = logging.getLogger(__name__)


def check_source(
    source: Source,
    *,
    skip_bad_images: bool,
    all_processes: Callable[[bool], bool] = bool,
    main: bool = True,
    tokenize: TokenizePrompt | None = None,
) -> None:
    """Check captions and picture headers of the examples.

    Args:
        source: The examples.
        skip_bad_images: Whether to accept as many bad examples as a run may skip.
        all_processes: Function that returns whether its argument is true in every process of the run; all of them
            must call this function.
        main: Whether this is the first process, which logs what was found.
        tokenize: The captions' tokenizers, to log how many captions are cut off; None for no such check.

    Raises:
        DataError: If examples cannot be used, here or in another process. The message says how many, names the first
            few, and says what is wrong with the first.
    """
    checked, findings = _check(source, tokenize)
    reasons = dict(findings.reasons[index] for index in sorted(findings.reasons))
    failure = _failure(checked, len(source), reasons, skip_bad_images)
    if not all_processes(failure is None) and failure is None:
        raise DataError("another process of this run cannot use its data, and says why; it must see the same files")
    if failure is not None:
        raise failure
    if not main:
        return
    if checked < len(source):
        log.info("checked %d of %d examples before the start", checked, len(source))
    if findings.empty:
        log.warning("%d captions are empty: %s", len(findings.empty), first_few(sorted(findings.empty)))
    if tokenize is not None and findings.cut_off:
        name, rest = findings.cut_off[min(findings.cut_off)]
        log.warning(
            "the text encoder takes %d tokens, %d of %d captions are longer; of the first, %s, it does not see '%s'",
            tokenize.length, len(findings.cut_off), checked, name, rest,
        )  # fmt: skip


def _failure(checked: int, examples: int, reasons: dict[str, str], skip_bad_images: bool) -> DataError | None:
    limit = max_bad_examples(examples)
    if len(reasons) <= (limit if skip_bad_images else 0):
        return None
    first = next(iter(reasons.values()))
    if len(reasons) == 1:
        return DataError(f"{first}, or skip such examples with --skip_bad_images")
    fix = "restore or remove them"
    if skip_bad_images:
        fix += f", which are over {MAX_BAD_SHARE:.0%}"
    elif len(reasons) <= limit:
        fix += ", or skip such examples with --skip_bad_images"
    return DataError(
        f"{len(reasons)} of {checked} examples cannot be used: {first_few(list(reasons))}; {fix}. The first: {first}"
    )


def _check(source: Source, tokenize: TokenizePrompt | None) -> tuple[int, "_Findings"]:
    """Check the examples and return how many were checked, and what was found."""
    local = reads_locally(source)
    count = min(len(source), MAX_CHECKED if local else MAX_CHECKED_IN_STORE)
    indices = np.linspace(0, len(source) - 1, count).astype(int).tolist()
    findings = _Findings(source, tokenize)
    parts = [indices[first : first + _EXAMPLES_PER_TASK] for first in range(0, count, _EXAMPLES_PER_TASK)]
    pool = ThreadPoolExecutor(_THREADS if local else _THREADS_IN_STORE, thread_name_prefix="check")
    try:
        with console.current().counting("checking", count, "examples", _BAR_DELAY) as add:
            for part in pool.map(findings.check, parts):
                add(part)
    finally:
        pool.shutdown(cancel_futures=True)
    return count, findings


def reads_locally(source: Source) -> bool:
    """Return whether reading an example needs no object store; it is asked of the first one."""
    try:
        image = source[0].image
    except DataError:
        return True
    return isinstance(image, (bytes, np.ndarray, Image.Image)) or is_local(image)


class _Findings:
    """Results of the check, which several threads add to.

    Attributes:
        reasons: By index, the name of an example that cannot be used, and the reason.
        empty: Names of the examples whose caption is empty.
        cut_off: By index, the name of an example whose caption is too long, and the part that is cut off.
    """

    def __init__(self, source: Source, tokenize: TokenizePrompt | None):
        self._source = source
        self._tokenize = tokenize
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self.reasons: dict[int, tuple[str, str]] = {}
        self.empty: set[str] = set()
        self.cut_off: dict[int, tuple[str, str]] = {}

    def check(self, indices: list[int]) -> int:
        """Check some examples and return how many."""
        for index in indices:
            try:
                record = self._source[index]
                if self._is_new(record.name):  # DreamBooth has its pictures several times in an epoch
                    check_header(record)
                    if record.extra is not None:
                        check_header(record.extra)
                    if record.caption == "":
                        self.empty.add(record.name)
                    if rest := self._rest(record.caption):
                        self.cut_off[index] = (record.name, rest)
            except DataError as error:
                self.reasons[index] = (example_name(self._source, index), str(error))
        return len(indices)

    def _rest(self, caption: str | Sequence[str] | None) -> str:
        """Return what is cut off a caption; of several captions, off the first that is too long; else ""."""
        if self._tokenize is None or caption is None:
            return ""
        captions = [caption] if isinstance(caption, str) else caption
        return next(filter(None, map(self._tokenize.cut_off, captions)), "")

    def _is_new(self, name: str) -> bool:
        with self._lock:
            known = name in self._seen
            self._seen.add(name)
        return not known
