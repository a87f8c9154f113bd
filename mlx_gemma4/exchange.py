"""What the converter exchanges with the hub beside model folders: .gguf files in, conversions out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
)

from mlx_gemma4.hub import NAMES, reason

GGUF_PATTERNS = ["*q4_0*.gguf", "*Q4_0*.gguf", "*mmproj*.gguf"]


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Failures of the hub as one line: ValueError if the request is wrong, ConnectionError else."""
    try:
        yield
    except (HFValidationError, LocalTokenNotFoundError) as error:
        raise ValueError(f"{doing} failed: {reason(error)}") from None
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError) as error:
        raise ConnectionError(f"{doing} failed: {reason(error)}") from None


def download_gguf(hub_id: str) -> Path:
    """The folder of a repository's Q4_0 files."""
    with hub_errors(f"downloading {hub_id}"):
        return Path(snapshot_download(hub_id, allow_patterns=GGUF_PATTERNS))


def download_settings(hub_id: str) -> Path:
    """The folder of a model's configuration and tokenizer, without its weights."""
    with hub_errors(f"downloading {hub_id}"):
        return Path(snapshot_download(hub_id, allow_patterns=[name for name in NAMES if "safetensors" not in name]))


def check_login() -> None:
    """Raises if nobody is logged in: better before an hour of converting than after it."""
    with hub_errors("logging in to the hub (`hf auth login`)"):
        HfApi().whoami()


def upload(folder: Path, hub_id: str) -> None:
    """Upload a model folder, to a new repository or over an old one."""
    with hub_errors(f"uploading to {hub_id}"):
        api = HfApi()
        api.create_repo(hub_id, exist_ok=True)
        api.upload_folder(repo_id=hub_id, folder_path=folder)
