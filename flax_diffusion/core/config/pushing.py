"""Options of pushing to the Hugging Face Hub, which training and `convert` share."""

from __future__ import annotations

from typing import Annotated, Protocol

from pydantic import Field, SecretStr

PushToHub = Annotated[
    bool, Field(description="Push the results to the Hugging Face Hub, with a model card, beside the work.")
]
HubModelId = Annotated[
    str | None,
    Field(description="Repository to push to, NAME or OWNER/NAME. None: the name of output_dir, as your own."),
]
HubPrivateRepo = Annotated[
    bool | None, Field(description="Make a new repository private. None: what its owner has as the default.")
]
HubToken = Annotated[
    SecretStr | None,
    Field(
        description="Token of the Hub, which no file keeps. None: that of the environment variable HF_TOKEN, or of "
        "`hf auth login`."
    ),
]


class Pushes(Protocol):
    """Options of a command that can push its results."""

    @property
    def push_to_hub(self) -> bool:
        """Whether results are pushed."""
        ...

    @property
    def hub_model_id(self) -> str | None:
        """Repository to push to."""
        ...

    @property
    def hub_private_repo(self) -> bool | None:
        """Whether a new repository is private."""
        ...

    @property
    def hub_token(self) -> SecretStr | None:
        """Token of the Hub."""
        ...


def token_of(options: Pushes) -> str | None:
    """Return the token that was given; None where there is none among the options."""
    return None if options.hub_token is None else options.hub_token.get_secret_value()


def check(options: Pushes) -> None:
    """Check the rules between the options of pushing.

    Args:
        options: Options of a command.

    Raises:
        ValueError: For a rule that is broken; its text is the error line.
    """
    if options.hub_token is not None and not options.hub_token.get_secret_value().strip():
        raise ValueError("--hub_token is empty: give the token, or drop the option and log in by `hf auth login`")
    if options.push_to_hub:
        return
    for name in ("hub_model_id", "hub_private_repo", "hub_token"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is for pushing to the Hub: add --push_to_hub, or drop it")
