"""Whether the other machines that share a model are alike, and still there; and what the first of them has decided.

MLX's exchanges wait for a machine that is gone, some of them for ever, and no signal is heard inside them. So a thread
beside them hears every second from the first machine, and that one from all, over a plain socket. Where the machines
are led, the first one's decisions go the same way: MLX's exchanges would wait for the rounds before them.
"""

import atexit
import hashlib
import json
import logging
import os
import pickle
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, TypeVar, cast

import mlx.core as mx
import numpy as np

from mlx_gemma4.errors import CheckpointError, one_line

BEAT, SILENCE = 1.0, 15.0  # seconds between signs of life, and without one until a machine counts as gone
ALIVE, FAREWELL, WORD, DONE = b".", b"q", b"w", b"d"
GATHERING = 60  # seconds until all machines must be there: MLX's ring itself looks for the next one for 30
END_IF_ALONE = """
import os, select, signal, sys
process, seconds = map(int, sys.argv[1:])
if not select.select([0], [], [], seconds)[0]:
    expected = "expected those of the hostfile, by mlx.launch"
    print(f"error: not all machines came within {seconds} s; {expected}", file=sys.stderr)
    os.kill(process, signal.SIGKILL)
"""
LENGTH = 8  # bytes that say how long a word is
FAILED = "failed"

T = TypeVar("T")


class Peer:
    """Another machine, over a plain socket."""

    def __init__(self, own: socket.socket, name: object):
        self.socket, self.name = own, name
        self.lock = threading.Lock()
        self.heard: SimpleQueue[bytes | None] = SimpleQueue()  # words; None: it leads no more
        own.settimeout(SILENCE)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, kind: bytes, data: bytes = b"") -> None:
        with suppress(OSError), self.lock:  # whoever listens knows
            self.socket.sendall(kind + data)


watched = False  # by this process
links: list[Peer] = []  # of the first machine to all others, of these to it
led = False  # the first machine decides, the others follow, and none goes on without the others
at_loss: list[Callable[[], object]] = []  # what is done when a machine is gone, before this process ends


def check_alike(group: mx.distributed.Group, described: str) -> None:
    """CheckpointError, on all machines, if one has another version, other weights or other options."""
    if others := differing(group, described):
        raise CheckpointError(
            f"machine {others[0]} has another version, model or options than machine 0; expected the same on all "
            f"{group.size()}"
        )


def differing(group: mx.distributed.Group, described: str) -> list[int]:
    """The machines of which another thing is said than of the first."""
    own = np.frombuffer(hashlib.blake2b(described.encode(), digest_size=16).digest(), np.int32)
    found = np.asarray(mx.distributed.all_gather(mx.array(own)[None], group=group))
    return [rank for rank, digest in enumerate(found) if (digest != found[0]).any()]


# --- whether they are there --------------------------------------------------------------------


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
    port, secret = 0, bytes(16)  # which only these machines know
    if group.rank() == 0:
        server = socket.create_server((first_address(), 0), backlog=group.size())
        port, secret = server.getsockname()[1], secrets.token_bytes(16)
    said = mx.distributed.all_sum(mx.array([port, *secret]), group=group)
    port, *own_secret = cast(list[int], said.tolist())
    secret = bytes(own_secret)
    if group.rank():
        own = socket.create_connection((first_address(), port), SILENCE)
        own.sendall(secret)
        start(own, 0)
        return
    while len(links) < group.size() - 1:
        own, (host, _) = server.accept()
        own.settimeout(SILENCE)
        if own.recv(len(secret), socket.MSG_WAITALL) == secret:
            start(own, host)
    server.close()


def together() -> mx.distributed.Group:
    """The machines on which `mlx.launch` has started this command, once all are there; ValueError if some have one
    address. MLX would wait for those that never come, and meanwhile hears no signal and lets no thread of Python run:
    a process beside this one ends it."""
    if "MLX_RANK" not in os.environ:
        return mx.distributed.init()
    addresses = [address for own in hosts() for address in own]
    if twice := next((address for address in addresses if addresses.count(address) > 1), None):
        raise ValueError(f"the hostfile has {twice} twice; expected an address for each machine")
    arguments = [sys.executable, "-c", END_IF_ALONE, str(os.getpid()), str(GATHERING)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE):  # which ends with its input
        try:
            return mx.distributed.init()
        except RuntimeError as error:
            raise RuntimeError(f"{one_line(error)}; expected all machines of the hostfile, by mlx.launch") from None


def launched() -> mx.distributed.Group | None:
    """The machines on which `mlx.launch` has started this command, watched; None: it runs on one."""
    group = together()
    if group.size() == 1:
        return None
    watch(group)
    if group.rank():
        logging.getLogger("mlx_gemma4").setLevel(logging.WARNING)  # the first one tells the rest
    return group


def leave_word(error: BaseException) -> None:
    """Before an error is shown: if an exchange failed because a machine is gone, whoever listens says so and ends."""
    if watched and isinstance(error, RuntimeError):  # as MLX's are
        time.sleep(2 * BEAT)


def hosts() -> list[list[str]]:
    """The addresses of each machine, as `mlx.launch` tells them to the ring. ValueError if the file has none."""
    if "MLX_HOSTFILE" not in os.environ:
        return []
    file = os.environ["MLX_HOSTFILE"]
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the hostfile {file!r} cannot be read: {one_line(error)}; expected mlx.launch's") from None
    if not isinstance(found, list) or not found or not all(map(is_machine, found)):
        raise ValueError(f'{file!r} is no hostfile; expected [["address:port"], …], as mlx.launch writes it')
    return found


def is_machine(own: Any) -> bool:
    return isinstance(own, list) and own != [] and all(isinstance(one, str) and ":" in one for one in own)


def first_address() -> str:
    found = hosts()
    return found[0][0].rpartition(":")[0] if found else "127.0.0.1"


def start(own: socket.socket, name: object) -> None:
    link = Peer(own, name)
    links.append(link)
    atexit.register(link.send, FAREWELL)
    threading.Thread(target=tell_life, args=(link,), daemon=True).start()
    threading.Thread(target=listen, args=(link,), daemon=True).start()


def tell_life(link: Peer) -> None:
    while True:
        link.send(ALIVE)
        time.sleep(BEAT)


def listen(link: Peer) -> None:
    global led
    with suppress(OSError), link.socket.makefile("rb") as file:
        while kind := file.read(1):
            if kind == WORD:
                link.heard.put(file.read(int.from_bytes(file.read(LENGTH), "big")))
            elif kind == DONE:
                led = False
                link.heard.put(None)
            elif kind == FAREWELL:
                if led:  # it has said why, and is to end first
                    time.sleep(BEAT)
                    give_up()
                link.heard.put(None)
                return
    time.sleep(BEAT / 2)  # MLX's ring writes of it too, from a thread of its own: this line stands alone, and last
    give_up(f"error: machine {link.name} is gone; expected all to stay until the end")


def give_up(line: str = "") -> None:
    """End this process, whose other threads may hear nothing any more."""
    for action in at_loss:
        action()
    if line:
        print(line, file=sys.stderr, flush=True)
    os._exit(1)


# --- what the first has decided ----------------------------------------------------------------


def lead() -> None:
    """From now on the first machine decides what is done, and the others follow, until it releases them: where one
    leaves before that, all end. To be called before it is watched who does."""
    global led
    led = True


def leads(group: mx.distributed.Group | None) -> bool:
    """Whether this is the first machine, and others follow it."""
    return group is not None and led and group.rank() == 0


def follows(group: mx.distributed.Group | None) -> bool:
    """Whether this is one of the others."""
    return group is not None and group.rank() > 0


def release(group: mx.distributed.Group | None) -> None:
    """On the first machine: the others hear that nothing follows, as None."""
    global led
    if group is not None:
        led = False
        for link in links:
            link.send(DONE)


def tell(value: object) -> None:
    data = pickle.dumps(value)
    for link in links:
        link.send(WORD, len(data).to_bytes(LENGTH, "big") + data)


def hear(timeout: float | None = None) -> Any:
    """What the first machine says next; None: nothing follows. If that one failed, and this did not, it ends."""
    data = links[0].heard.get(timeout=timeout)
    value = None if data is None else pickle.loads(data)
    if value == FAILED and timeout is None:
        give_up("error: machine 0 failed where this one did not; expected the same on all")
    return value


def same(group: mx.distributed.Group | None, value: T) -> T:
    """The first machine's value, on all of them. That one does not wait for the others."""
    if follows(group):
        return cast(T, hear())
    if group is not None:
        tell(value)
    return value


def everyones(group: mx.distributed.Group | None, value: T) -> list[T]:
    """The values of all machines, the first one's first."""
    if group is None:
        return [value]
    if group.rank():
        tell(value)
        return cast(list[T], hear())
    return same(group, [value, *(pickle.loads(link.heard.get() or b"") for link in links)])


def anywhere(group: mx.distributed.Group | None, is_so: bool) -> bool:
    """Whether it is so on one of the machines, which all ask."""
    if group is None:
        return is_so
    return bool(mx.distributed.all_max(mx.array(is_so, mx.int32), group=group).item())


def settle(group: mx.distributed.Group | None, error: Exception) -> None:
    """After an error: it was everyone's, or else what the machines exchange would not fit any more, and they end."""
    if group is None:
        return
    try:
        if group.rank():
            if hear(SILENCE) != FAILED:
                raise Empty
            tell(FAILED)
        else:
            tell(FAILED)
            for link in links:
                link.heard.get(timeout=SILENCE)
    except Empty:
        give_up(f"error: machine {group.rank()} failed alone: {one_line(error)}; expected the same on all")
