"""Inputs as files: JSON, with the numbers that Python's reader takes (NaN, Infinity) and bytes as base64."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

BYTES = "$base64"


def pack(value: Any) -> bytes:
    return json.dumps(wrapped(value)).encode()


def unpack(data: bytes) -> Any:
    return json.loads(data, object_hook=unwrapped)


def wrapped(value: Any) -> Any:
    if isinstance(value, bytes):
        return {BYTES: base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {key: wrapped(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [wrapped(entry) for entry in value]
    return value


def unwrapped(value: dict[str, Any]) -> Any:
    return base64.b64decode(value[BYTES]) if value.keys() == {BYTES} else value


def save(folder: Path, kind: str, value: Any) -> Path:
    """The file from which `--repeat` tries an input again; the bytes in it, if any, also lie beside it as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    data = pack(value)
    path = folder / f"{kind}-{hashlib.sha256(data).hexdigest()[:10]}.json"
    path.write_bytes(data)
    if isinstance(value, dict) and isinstance(value.get("data"), bytes):
        path.with_suffix(str(value.get("suffix", ".bin"))).write_bytes(value["data"])
    return path
