"""A hub id -> a folder on this machine, downloaded with its progress shown."""

import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library, of which not all is caught and turned into the errors below it
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils.logging import set_verbosity_error

from mlx_gemma4.errors import CheckpointError
from mlx_gemma4.media.source import TRY_AGAIN

logger = logging.getLogger("mlx_gemma4")

# What this package reads; a repository's other formats, folders and pictures stay where they are. Whole names where
# they are known, for here a * takes slashes too.
NAMES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "model.safetensors.index.json",
    "model*.safetensors",
]
PATTERNS = [folder + name for folder in ("", "drafter/") for name in NAMES]
SETTINGS = [pattern for pattern in PATTERNS if not pattern.endswith(".safetensors")]  # all but the weights
GGUF_PATTERNS = ["*q4_0*.gguf", "*Q4_0*.gguf", "*mmproj*.gguf"]


def download(hub_id: str, patterns: Sequence[str]) -> Path:
    """The folder of a hub's snapshot; only what is not in the cache is fetched, all of it is there without network.

    patterns: names of the files that are wanted. CheckpointError if there is no such repository or it is closed to this
    user, ConnectionError if the hub cannot be reached or fails.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    set_verbosity_error()  # or every retry of every file writes two lines; the last error is told here
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except GatedRepoError:
        raise CheckpointError(
            f"{hub_id} is gated; accept its licence on its page of the hub, then log in here with `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CheckpointError(
            f"{hub_id!r} is neither a folder here nor a repository on the hub; expected a model folder or a hub id "
            "such as google/gemma-4-12B-it (a private one needs `hf auth login`)"
        ) from None
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, json.JSONDecodeError) as error:
        return cached(hub_id, patterns, error)
    except OSError as error:
        if error.errno is not None:  # a file's, of this machine
            raise
        return cached(hub_id, patterns, error)  # what came is shorter than it should be


def read_header(hub_id: str, name: str) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file of a repository, from its first kilobytes: dtype, shape, data_offsets by name.

    CheckpointError if it is not there or damaged, ConnectionError if the hub cannot be reached or fails.
    """
    try:
        found = HfApi().parse_safetensors_file_metadata(hub_id, name)
    except EntryNotFoundError:
        raise CheckpointError(f"{hub_id} has no {name}; expected a model in safetensors files") from None
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{name} of {hub_id} is no safetensors file: {reason(error)}") from None
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"{name} of {hub_id} is not on this machine and cannot be read: {reason(error)}"
        ) from None
    return {tensor: vars(info) for tensor, info in found.tensors.items()}


def partners(hub_id: str) -> list[str]:
    """Hub ids under which a model's drafter may be published: by the same owner, with and without suffix, by Google."""
    owner, name = hub_id.split("/")
    match = re.fullmatch(r"(?P<base>.*-it(?P<qat>-qat)?(?:-q4_0-unquantized)?)(?P<suffix>-.*)?", name)
    if match is None:
        return []
    base, suffix = match["base"], match["suffix"] or ""
    original = re.sub("-qat$", "-qat-q4_0-unquantized", base)
    own = [f"{owner}/{base}-assistant{suffix}", f"{owner}/{base}-assistant", f"google/{original}-assistant"]
    return list(dict.fromkeys(own))


def download_partner(hub_id: str, patterns: Sequence[str]) -> tuple[Path, str] | None:
    """The folder and hub id of a model's drafter; None, with a warning, if none can be had."""
    for partner in partners(hub_id):
        try:
            folder = download(partner, patterns)
        except (CheckpointError, ConnectionError):
            continue
        if (folder / "config.json").is_file():  # else it is of another kind, as GGUF
            return folder, partner
    logger.warning("no drafter was found for %s: it decodes plainly, more slowly", hub_id)
    return None


def cached(hub_id: str, patterns: Sequence[str], failure: Exception) -> Path:
    """The folder in the cache if it is whole; else the error that `failure` amounts to."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns), local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # not there, or only a part of it
    cause = failure
    if isinstance(failure, LocalEntryNotFoundError) and isinstance(failure.__cause__, Exception):
        cause = failure.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 500
    if status < 500 and status not in TRY_AGAIN:
        closed = status in (401, 403)
        expected = "one open to you (log in with `hf auth login`)" if closed else "a repository that is whole"
        raise CheckpointError(f"the hub refuses {hub_id}: {reason(cause)}; expected {expected}")
    raise ConnectionError(f"{hub_id} is not (wholly) on this machine and the hub cannot be reached: {reason(cause)}")


def reason(error: Exception) -> str:
    """The first line of an error's message; the others are advice of huggingface_hub's."""
    if isinstance(error, json.JSONDecodeError):
        return "the answer is no JSON; is it the login page of a network?"
    return next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)
