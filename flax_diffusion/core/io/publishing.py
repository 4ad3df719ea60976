"""Uploads of folders to the Hugging Face Hub."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flax_diffusion.core.errors import WeightsError

HIDDEN = (".*", "*/.*")
"""Patterns of hidden files, such as those that are half written. `*` stands for slashes too, as on the Hub."""

_TRY_AGAIN = (408, 409, 412, 425, 429)
"""Answers of the Hub that may be another one soon: timeouts, too many calls, and commits at the same time."""
_MIN_TOKEN_LENGTH = 8
"""Length from which a text can be a token; a shorter one would hide parts of words."""


class PushError(WeightsError):
    """A folder that could not be pushed.

    Args:
        message: The message, as of every user error.
        passing: Whether the same call may succeed later: the Hub could not be reached, or was busy.
    """

    def __init__(self, message: str, *, passing: bool):
        super().__init__(message)
        self.passing = passing


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    path_in_repo: str | None = None,
    ignore_patterns: Sequence[str] = (),
) -> str:
    """Upload a folder to the Hub, in a repository that is made if it does not exist.

    Args:
        folder: Folder to upload.
        repo_id: Repository, `name` or `owner/name`; without an owner it is the user's own.
        token: Token of the Hub; None for the one of the log-in.
        private: Make a new repository private; None for the owner's default.
        create_pr: Open a pull request in place of a commit.
        commit_message: Message of the commit; None for a plain one.
        path_in_repo: Folder in the repository; None for its root.
        ignore_patterns: Patterns of files that stay at home, as of `fnmatch`; none for the whole folder.

    Returns:
        Address of the commit.

    Raises:
        PushError: If the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=commit_message or f"Upload {folder.name}",
            create_pr=create_pr,
            ignore_patterns=list(ignore_patterns) or None,
        )
    except LocalTokenNotFoundError as error:
        raise PushError(
            f"cannot push to {repo_id}: log in with `hf auth login`, or give token=…", passing=False
        ) from error
    except _hub_errors() as error:
        raise PushError(
            f"cannot push {folder} to {repo_id} ({reason(error, token)}): the folder is whole on this machine, check "
            "the name of the repository and your rights, and push again",
            passing=is_passing(error),
        ) from error
    return str(commit)


def check_repository(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Make a repository if it does not exist, and make sure that one may write to it.

    Args:
        repo_id: Repository, `name` or `owner/name`; without an owner it is the user's own.
        token: Token of the Hub; None for the one of the environment or the log-in.
        private: Make a new repository private; None for the owner's default.

    Returns:
        The repository with its owner.

    Raises:
        PushError: If there is no token, the Hub does not take it, or one may not write there; `passing` if the Hub
            cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(
            f"{repo_id!r} is no name of a repository: give --hub_model_id NAME or OWNER/NAME, of letters, digits, "
            "'-', '_' and '.'",
            passing=False,
        ) from error
    if token is None and get_token() is None:
        raise PushError(
            "there is no token of the Hub: log in by `hf auth login`, set the environment variable HF_TOKEN, or give "
            "--hub_token",
            passing=False,
        )
    api, new = HfApi(token=token), "make one with write access at https://huggingface.co/settings/tokens"
    user = "this user"
    try:
        me = api.whoami()
        user = str(me.get("name"))
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise PushError(f"the token of {user} may only read: {new}", passing=False)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(name, write=True)
    except _hub_errors() as error:
        if is_passing(error):
            raise PushError(f"the Hub cannot be reached ({reason(error, token)})", passing=True) from error
        if _status(error) == 401:
            raise PushError(
                f"the Hub does not take the token: {new}, or log in again by `hf auth login`", passing=False
            ) from error
        raise PushError(
            f"{user} may not write to {repo_id} ({reason(error, token)}): give --hub_model_id NAME of a repository "
            "of your own, or a token that has the right",
            passing=False,
        ) from error
    return str(name)


def upload_command(folder: Path, repo_id: str, *, private: bool | None, ignore_patterns: Sequence[str]) -> str:
    """Return the command that pushes a folder.

    Args:
        folder: The folder.
        repo_id: Repository, `owner/name` or `name`.
        private: As of `push_folder`.
        ignore_patterns: Likewise.
    """
    words = ["hf", "upload", repo_id, str(folder), "."] + ["--private"] * bool(private)
    for pattern in ignore_patterns:
        words += ["--exclude", pattern]
    return shlex.join(words)


def _hub_errors() -> tuple[type[Exception], ...]:
    """Return what the Hub's client raises: errors of its own, of HTTP, of the network, and of its threads."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    http = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    return http, HFValidationError, OSError, ValueError, RuntimeError


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and those that led to it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error is about; None if it is about none."""
    answers: Iterator[Any] = (getattr(one, "response", None) for one in _chain(error))
    return next((answer.status_code for answer in answers if answer is not None), None)


def is_passing(error: BaseException) -> bool:
    """Return whether a call that failed may succeed later."""
    status = _status(error)
    if status is not None:
        return status in _TRY_AGAIN or status >= 500
    return not isinstance(error, ValueError)


def reason(error: BaseException, token: str | bool | None = None) -> str:
    """Return why a call failed, in one short line that does not show the token.

    Args:
        error: The error.
        token: The token; None for the one of the environment or the log-in.
    """
    from huggingface_hub import get_token

    status = _status(error)
    deepest = [*_chain(error)][-1]
    said = next((text for one in _chain(error) if (text := getattr(one, "server_message", None))), None)
    text = " ".join(str(said or (error if status is not None else deepest)).split())[:300] or type(deepest).__name__
    if isinstance(secret := token or get_token(), str) and len(secret) >= _MIN_TOKEN_LENGTH:
        text = text.replace(secret, "…")
    return text if status is None else f"HTTP {status}: {text}"
