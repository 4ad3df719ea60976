"""Uploads of folders to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from flax_diffusion.core.errors import WeightsError


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    path_in_repo: str | None = None,
) -> str:
    """Upload a folder to the Hub, in a repository that is made if it does not exist.

    Args:
        folder: Folder to upload, whole.
        repo_id: Repository, `name` or `owner/name`; without an owner it is the user's own.
        token: Token of the Hub; None for the one of the log-in.
        private: Make a new repository private; None for the owner's default.
        create_pr: Open a pull request in place of a commit.
        commit_message: Message of the commit; None for a plain one.
        path_in_repo: Folder in the repository; None for its root.

    Returns:
        Address of the commit.

    Raises:
        WeightsError: If the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=commit_message or f"Upload {folder.name}",
            create_pr=create_pr,
        )
    except LocalTokenNotFoundError as error:
        raise WeightsError(f"cannot push to {repo_id}: log in with `hf auth login`, or give token=…") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise WeightsError(
            f"cannot push {folder} to {repo_id} ({error}): the folder is whole on this machine, check the name of the "
            "repository and your rights, and push again"
        ) from error
    return str(commit)
