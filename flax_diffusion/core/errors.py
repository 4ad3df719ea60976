"""Errors that are the user's to fix. The command line prints their one line and exits with status 2."""


class UserError(Exception):
    """Something in the input is wrong. The message is one line: the value, the rule and the fix."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class ConfigError(UserError):
    """An option, a config file or a combination of options that cannot be run."""


class DataError(UserError):
    """A dataset, an image or a caption that cannot be used."""


class WeightsError(UserError):
    """A model folder or weights file that does not fit the model."""


class CheckpointError(UserError):
    """A training checkpoint that cannot be resumed from."""


class NonFiniteError(UserError):
    """Training produced a loss that is not a number or infinite."""
