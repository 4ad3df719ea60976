"""The account of examples that cannot be used and are passed over, and when there are too many of them."""

import logging

from flax_diffusion.core.data.sources.source import Source, first_few
from flax_diffusion.core.errors import DataError

logger = logging.getLogger(__name__)

MAX_BAD_SHARE = 0.01
"""Of the examples. A dataset with more bad ones was cut off on its way, or is not what it was taken for."""


def most_bad(examples: int) -> int:
    """How many bad examples a dataset may have: one in any, however small."""
    return max(1, int(MAX_BAD_SHARE * examples))


class BadExamples:
    """The examples that could not be used so far.

    Args:
        examples: In the dataset.
    """

    def __init__(self, examples: int):
        self._examples = examples
        self._limit = most_bad(examples)
        self.reasons: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        """Counts one, once however often it is met.

        Args:
            name: Of the example.
            reason: The message of its error.

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
    """What messages call an example, of which the record itself may be what is bad."""
    try:
        return source[index].name
    except DataError as error:
        return error.example or f"example {index}"
