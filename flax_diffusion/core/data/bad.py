"""Record of the bad examples that a run skips, with a limit on their number."""

import logging

from flax_diffusion.core.data.sources.source import Source, first_few
from flax_diffusion.core.errors import DataError

logger = logging.getLogger(__name__)

MAX_BAD_SHARE = 0.01
"""Largest share of bad examples. A dataset with more was cut off while it was copied, or is not the expected one."""


def max_bad_examples(examples: int) -> int:
    """Return how many bad examples a dataset of a given size may have: at least one."""
    return max(1, int(MAX_BAD_SHARE * examples))


class BadExamples:
    """The bad examples found so far.

    Args:
        examples: Number of examples in the dataset.
    """

    def __init__(self, examples: int):
        self._examples = examples
        self._limit = max_bad_examples(examples)
        self.reasons: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        """Record a bad example; the same one is counted only once.

        Args:
            name: Name of the example.
            reason: Message of its error.

        Raises:
            DataError: If there are too many now.
        """
        if name in self.reasons:
            return
        logger.warning("skipped: %s", reason)
        self.reasons[name] = reason
        if len(self.reasons) > self._limit:
            raise DataError(
                f"{len(self.reasons)} of {self._examples} examples cannot be used, over {MAX_BAD_SHARE:.0%} of them: "
                f"{first_few(list(self.reasons))}; restore or remove them. The last one: {reason}"
            )


def example_name(source: Source, index: int) -> str:
    """Return an example's name for messages, even if its record cannot be read."""
    try:
        return source[index].name
    except DataError as error:
        return error.example or f"example {index}"
