"""Conversions to the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

from mlx_gemma4.weights.hub import reason


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Failures of the hub as one line: ValueError if the request is wrong, ConnectionError else."""
    try:
        yield
    except (HFValidationError, LocalTokenNotFoundError) as error:
        raise ValueError(f"{doing} failed: {reason(error)}") from None
    except (HfHubHTTPError, HTTPError) as error:
        raise ConnectionError(f"{doing} failed: {reason(error)}") from None


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
