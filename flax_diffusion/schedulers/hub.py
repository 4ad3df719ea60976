"""What schedulers fetch from the Hugging Face Hub, and put there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax_diffusion.core.errors import ConfigError

HUB_KEYWORDS = ("cache_dir", "force_download", "proxies", "local_files_only", "token")
"""Keywords of `from_pretrained` and `load_config` that concern the Hub."""


def fetched(source: str, subfolder: str | None, revision: str | None, name: str, options: Mapping[str, Any]) -> Path:
    """Return the local folder of a file on the Hub. THE ONE PLACE that passes `HUB_KEYWORDS` on.

    Args:
        source: Hub id, or a folder in an object store.
        subfolder: Folder inside it.
        revision: Branch, tag or commit.
        name: Name of the file.
        options: Values of `HUB_KEYWORDS`; None stands for the default.

    Raises:
        ConfigError: If an option is given and the file cannot be fetched with it.
        WeightsError: If there is no such folder or repository.
    """
    from flax_diffusion.core.io import model_files

    given = {key: value for key, value in options.items() if value is not None and (value or key == "token")}
    if not given:
        return Path(model_files.resolve(source, subfolder, revision, [name]))
    if "proxies" in given:
        raise ConfigError("proxies: huggingface_hub takes none as an argument; set HTTPS_PROXY in the environment")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    pattern = f"{subfolder}/{name}" if subfolder else name
    try:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=[pattern], **given))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"{source} is neither a folder nor found on the Hub with {', '.join(given)} as given: check the name, "
            f"the revision and these options ({type(error).__name__})"
        ) from error
    return folder / subfolder if subfolder else folder


def uploaded(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> str:
    """Put files in a repository on the Hub, which is made if it does not exist, and return the commit's address.

    Args:
        save: Writes the files to the folder that it is given.
        repo_id: Name of the repository; without an owner, the user's own.
        commit_message: Message of the commit.
        private: Whether a new repository is private; None for the owner's default.
        token: Token of the Hub; None for the one of `hf auth login`.
        create_pr: Open a pull request in place of a commit.
        subfolder: Folder in the repository.
    """
    from huggingface_hub import create_repo, upload_folder

    repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return str(
            upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=subfolder,
                commit_message=commit_message or "Upload scheduler",
                create_pr=create_pr,
                token=token,
            )
        )
