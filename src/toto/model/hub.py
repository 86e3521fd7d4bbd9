"""Models to and from the hub, through huggingface_hub."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the HTTP client's own
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    XetDownloadError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from toto.runtime.errors import CheckpointError, ConfigError
from toto.runtime.version import __version__

FAILURES: Final = (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    XetDownloadError,
    HTTPError,
    OSError,
)
WEIGHTS: Final = ["model*.safetensors", "model.safetensors.index.json"]
NEEDED: Final = ["config.json", "toto.json", *WEIGHTS]
UNAUTHORISED: Final = (401, 403)


def snapshot(name: str) -> Path:
    """The local folder of a model on the hub ("user/name"); only configuration and safetensors are fetched.

    Raises:
        CheckpointError: the hub hasn't got it, or can't be reached.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=NEEDED))
    except FAILURES as error:
        raise CheckpointError(
            f"no such folder, and the hub can't give it ({_reason(error)})",
            where=name,
            fix="check the name or the network",
        ) from None


def require_hub_name(name: str) -> None:
    """Refuse what is no name of a model on the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise ConfigError("is no name on the hub", where="--push", fix="write user/name")


def push_to_hub(folder: Path, name: str, *, private: bool = False) -> str:
    """Put a folder's files onto the hub as one commit; returns its address.

    The repository is made where there is none. Weights of an earlier push that the folder hasn't got are deleted there.

    Raises:
        ConfigError: no name of a model; or it shall be private, and a public repository of this name is there.
        CheckpointError: the hub doesn't take it.
    """
    require_hub_name(name)
    api = HfApi(library_name="toto", library_version=__version__)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.model_info(name).private:
            raise ConfigError(
                "is public on the hub, and --private is asked for",
                where=name,
                fix="make it private there, or choose another name",
            )
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=f"Exported by toto {__version__}",
            delete_patterns=[*WEIGHTS, "toto.json", "generation_config.json"],
        )
    except FAILURES as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        nobody = isinstance(error, LocalTokenNotFoundError) or status in UNAUTHORISED
        raise CheckpointError(
            f"the hub doesn't take it ({_reason(error)})",
            where=name,
            fix="log in with `hf auth login`, as someone who may write there" if nobody else "check the network",
        ) from None
    return str(commit.repo_url)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
