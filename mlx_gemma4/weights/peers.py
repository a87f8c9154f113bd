"""Whether the other machines that share a model are alike, how fast they are, and whether they are still there.

MLX's exchanges wait for a machine that is gone, some of them for ever, and no signal is heard inside them. So a thread
beside them hears every second from the first machine, and that one from all, over a plain socket.
"""

import atexit
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_gemma4.errors import CheckpointError
from mlx_gemma4.planner import Speeds

BEAT, SILENCE = 1.0, 15.0  # seconds between signs of life, and without one until a machine counts as gone
SUMMED, ROW, TRIES = 2**20, 4096, 5  # numbers of a large sum, a row of a matrix that is read, and how often
ALIVE, FAREWELL = b".", b"q"

watched = False  # by this process


def check_alike(group: mx.distributed.Group, described: str) -> None:
    """CheckpointError, on all machines, if one has another version, other weights or other options."""
    own = np.frombuffer(hashlib.blake2b(described.encode(), digest_size=16).digest(), np.int32)
    found = np.asarray(mx.distributed.all_gather(mx.array(own)[None], group=group))
    if others := [rank for rank, digest in enumerate(found) if (digest != found[0]).any()]:
        raise CheckpointError(
            f"machine {others[0]} has another version, model or options than machine 0; expected the same on all "
            f"{group.size()}"
        )


def measured(group: mx.distributed.Group) -> Speeds:
    """How fast the machines and the link are; all are told the same, that of the slowest link."""
    own = [seconds(partial(mx.distributed.all_sum, mx.ones(count), group=group)) for count in (1, SUMMED)]
    matrix = mx.ones((32 * SUMMED // ROW, ROW))  # more than what caches hold
    mx.eval(matrix)
    own.append(matrix.nbytes / seconds(lambda: matrix @ mx.ones(ROW)))
    small, large, memory = mx.distributed.all_gather(mx.array([own]), group=group).T
    latency, whole = cast(float, small.max().item()), cast(float, large.max().item())
    return Speeds(cast(list[float], memory.tolist()), latency, 4 * SUMMED / max(whole - latency, 1e-9))


def seconds(made: Callable[[], mx.array]) -> float:
    """That it takes at best to compute something."""
    found: list[float] = []
    for _ in range(1 + TRIES):
        begun = time.perf_counter()
        mx.eval(made())
        found.append(time.perf_counter() - begun)
    return min(found[1:])


def watch(group: mx.distributed.Group) -> None:
    """End this process, with a line that names it, soon after another machine is gone. Once for each process."""
    global watched
    if watched:
        return
    watched = True
    shown = sys.excepthook

    def hold(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        leave_word(error)
        shown(kind, error, trace)

    sys.excepthook = hold
    port = 0
    if group.rank() == 0:
        server = socket.create_server((first_address(), 0), backlog=group.size())
        port = server.getsockname()[1]
    port = cast(int, mx.distributed.all_sum(mx.array(port), group=group).item())
    if group.rank():
        start(socket.create_connection((first_address(), port), SILENCE), 0)
        return
    for _ in range(group.size() - 1):
        link, (host, _) = server.accept()
        start(link, host)
    server.close()


def leave_word(error: BaseException) -> None:
    """Before an error is shown: if an exchange failed because a machine is gone, whoever listens says so and ends."""
    if watched and isinstance(error, RuntimeError):  # as MLX's are
        time.sleep(2 * BEAT)


def first_address() -> str:
    """Of the first machine, as `mlx.launch` tells it to the ring."""
    hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text()) if "MLX_HOSTFILE" in os.environ else []
    return str(hosts[0][0]).rpartition(":")[0] if hosts else "127.0.0.1"


def start(link: socket.socket, name: object) -> None:
    link.settimeout(SILENCE)
    atexit.register(take_leave, link)
    threading.Thread(target=tell, args=(link,), daemon=True).start()
    threading.Thread(target=listen, args=(link, name), daemon=True).start()


def take_leave(link: socket.socket) -> None:
    with suppress(OSError):  # it has left too
        link.sendall(FAREWELL)


def tell(link: socket.socket) -> None:
    try:
        while True:
            link.sendall(ALIVE)
            time.sleep(BEAT)
    except OSError:  # whoever listens knows
        return


def listen(link: socket.socket, name: object) -> None:
    try:
        while heard := link.recv(64):
            if FAREWELL in heard:
                return
    except OSError:
        pass
    time.sleep(BEAT / 2)  # MLX's ring writes of it too, from a thread of its own: this line stands alone, and last
    print(f"error: machine {name} is gone; expected all to stay until the end", file=sys.stderr, flush=True)
    os._exit(1)  # the thread that waits for it hears nothing
