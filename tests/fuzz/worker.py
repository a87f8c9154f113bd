"""The process that tries inputs, one after the other: `python -m fuzz.worker READ WRITE` with two pipes.

Asked with a kind and an input, it answers with what came of it. What its streams get is read by the process that
started it.
"""

import faulthandler
import importlib
import json
import logging
import os
import struct
import sys
import traceback
import warnings
from typing import Any, BinaryIO

from . import inputs
from .judge import Fault, check_line
from .surface import LOGGER


def send(pipe: BinaryIO, message: bytes) -> None:
    pipe.write(struct.pack("<Q", len(message)) + message)
    pipe.flush()


def receive(pipe: BinaryIO) -> bytes | None:
    head = pipe.read(8)
    return pipe.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else None


class Logged(logging.Handler):
    """What is logged counts as a message for people."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def attempt(kind: Any, value: Any, logged: Logged) -> dict[str, str]:
    """{"outcome": "right" | "refused" | "fault", and for a fault "where", "detail"}."""
    logged.lines.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            outcome = kind.check(value) or "right"
            for warning in caught:
                if warning.category is not UserWarning:
                    raise Fault(f"{warning.category.__name__} of a library", str(warning))
                check_line(str(warning.message), "warning")
            for line in logged.lines:
                check_line(line, "logged line")
        except Fault as fault:
            return {"outcome": "fault", "where": fault.where, "detail": fault.detail}
        except BaseException as error:
            detail = "".join(traceback.format_exception(error))[-3000:]
            return {"outcome": "fault", "where": f"{type(error).__name__} in the check itself", "detail": detail}
    return {"outcome": outcome}


def main() -> None:
    read, write = os.fdopen(int(sys.argv[1]), "rb"), os.fdopen(int(sys.argv[2]), "wb")
    faulthandler.enable()
    logged = Logged()
    logging.getLogger(LOGGER).addHandler(logged)
    logging.getLogger(LOGGER).setLevel(logging.INFO)
    while (name := receive(read)) is not None:
        kind = importlib.import_module(f".{name.decode()}", __package__)
        value = receive(read)
        if value is None:
            break
        if value:
            answer = attempt(kind, inputs.unpack(value), logged)
        else:  # asked to load what this kind of input needs, before its memory is measured
            kind.prepare()
            answer = {"outcome": "right"}
        send(write, json.dumps(answer).encode())


if __name__ == "__main__":
    main()
