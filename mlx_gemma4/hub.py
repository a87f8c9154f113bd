"""A path or a hub id -> a folder on this machine, downloaded with its progress shown."""

import sys
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from mlx_gemma4.config import CheckpointError

# What a model folder is made of; the rest of a repository (other formats, pictures) stays where it is.
PATTERNS = ["*.json", "*.jinja", "model*.safetensors"]


def download(hub_id: str) -> Path:
    """The folder of a hub's snapshot; only what is not in the cache is fetched.

    CheckpointError if there is no such repository or it is gated, ConnectionError if the hub cannot be reached.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(hub_id, allow_patterns=PATTERNS))
    except GatedRepoError:
        raise CheckpointError(f"{hub_id} is gated; accept its licence on its page and log in with `hf auth login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CheckpointError(f"{hub_id!r} is neither a folder here nor a repository on the hub") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"{hub_id} is not on this machine and the hub cannot be reached: {reason}") from None
