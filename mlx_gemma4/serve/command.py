"""The command `mlx_gemma4.serve`."""

import asyncio
import ctypes
import os
import platform
import signal
import socket
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Thread
from typing import Annotated

import uvicorn

from mlx_gemma4 import flags
from mlx_gemma4.config import expanded, read_given
from mlx_gemma4.entry import leave
from mlx_gemma4.errors import one_line, shown
from mlx_gemma4.flags import above_0, adapters_of, number, option, switch, whole
from mlx_gemma4.serve.app import App
from mlx_gemma4.serve.connection import Connection
from mlx_gemma4.serve.guard import Guard
from mlx_gemma4.serve.media import Allowed
from mlx_gemma4.serve.resident import Resident, Settings
from mlx_gemma4.terminal import run
from mlx_gemma4.weights.load import DEFAULT_MODEL, logger
from mlx_gemma4.weights.peers import at_loss, follows, launched, lead

LAST_BYTES = 1  # seconds that connections have to take what has been sent to them
M_ARENA_MAX, HEAPS = -8, 2  # glibc's number of the setting; of all threads together


def serve(
    model: flags.ModelName = DEFAULT_MODEL,
    host: Annotated[str, option("NAME", "Where to listen; beyond this machine with a key only.")] = "127.0.0.1",
    port: Annotated[int, whole("0: any that is free.")] = 8080,
    api_key: Annotated[str | None, option("KEY", "Requests need it.")] = None,
    api_key_file: Annotated[Path | None, option("FILE", "Requests need one of these, a line each.")] = None,
    allow_host: Annotated[list[str], option("NAME", "Another name of this server; repeatable.")] = [],  # noqa: B006
    allow_origin: Annotated[list[str], option("ORIGIN", "Pages elsewhere that may ask, or *; repeatable.")] = [],  # noqa: B006
    allow_files: Annotated[Path | None, option("FOLDER", "Requests may name files of this folder.")] = None,
    allow_urls: Annotated[bool, switch("Requests may name http:// and https:// URLs.", "--allow-urls")] = False,
    max_batch: flags.MaxBatch = 8,
    max_queue: Annotated[int, whole("Replies that wait, at most.")] = 64,
    store: flags.StoreFolder = None,
    store_bytes: Annotated[int | None, above_0("Memory for what has been read, at most.")] = None,
    thinking: Annotated[bool, switch("Think where a request does not say.", "--thinking")] = False,
    unload_after: Annotated[float | None, number("Give the memory back when nobody asks.", metavar="SECONDS")] = None,
    drafter: flags.DrafterName = "auto",
    adapter: flags.Adapters = [],  # noqa: B006
    dtype: flags.DType = None,
    kv_bits: flags.KvBits = None,
    split: flags.Split = None,
    version: flags.Version = False,
    debug: flags.Debug = False,
) -> None:
    """Serve Gemma 4 to programs that speak OpenAI's or Anthropic's protocol, and to browsers."""
    keys = ([] if api_key is None else [api_key]) + ([] if api_key_file is None else read_keys(api_key_file))
    if api_key == "":
        raise ValueError("--api-key is empty; expected a key")
    guard = Guard(host, keys, allow_host, allow_origin)
    if allow_files is not None and not expanded(allow_files).is_dir():
        raise ValueError(f"--allow-files is {shown(str(allow_files))}; expected a folder")
    allowed = Allowed(None if allow_files is None else expanded(allow_files), allow_urls)
    settings = Settings(
        model=model, drafter=drafter, dtype=dtype, kv_bits=kv_bits, split=split,
        adapter=adapters_of(adapter), max_batch=max_batch, max_queue=max_queue, store=store, store_bytes=store_bytes,
        unload_after=unload_after, thinking=thinking, allowed=allowed,
    )  # fmt: skip
    share_heaps()
    lead()
    group = launched()
    if follows(group):
        Resident(settings, group).follow()
        return
    with listening(host, port) as listener:
        resident = Resident(settings, group)
        at_loss.append(resident.abandon)
        loader = Thread(target=resident.load_ahead, daemon=True)
        loader.start()
        name = f"[{host}]" if ":" in host else host
        logger.info("http://%s:%d serves %s", name, listener.getsockname()[1], resident.name)
        asyncio.run(Server(App(resident, guard)).until_told(listener))
        if loader.is_alive():
            os._exit(0)  # nothing interrupts what reads the weights, and nobody waits for them any more
        resident.close()


def share_heaps() -> None:
    """glibc would give requests' threads heaps of their own, up to 8 a core, each of which grows to the largest that a
    request has taken in it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, HEAPS)


def read_keys(path: Path) -> list[str]:
    data = read_given(path, f"the keys {str(path)!r}")
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"the keys {str(path)!r} cannot be read: {one_line(error)}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{str(path)!r} holds no keys; expected one a line")
    return keys


def listening(host: str, port: int) -> socket.socket:
    """Bound first, so that a port which is taken is found before gigabytes are loaded."""
    if not 0 <= port < 2**16:
        raise ValueError(f"port is {port}; expected a number from 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        raise OSError(f"cannot listen on {host[:100]}:{port}: {error}") from None


class Server(uvicorn.Server):
    """Waits without waking, and ends, when it is told to, behind the last reply."""

    def __init__(self, app: App):
        config = uvicorn.Config(
            app, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False, proxy_headers=False,
            server_header=False, date_header=False, timeout_keep_alive=75,
        )  # fmt: skip
        super().__init__(config)
        self.app = app
        self.stop = asyncio.Event()

    async def until_told(self, listener: socket.socket) -> None:
        """Serve until a first signal; a second one does not wait for replies."""
        loop = asyncio.get_running_loop()
        for own in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(own, self.told, own)
        await self.serve([listener])

    def told(self, number: int) -> None:
        if self.stop.is_set():
            leave(number, None)
        self.stop.set()

    def capture_signals(self) -> "AbstractContextManager[None]":  # type: ignore[override]  # uvicorn's are not wanted
        return nullcontext()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.stop.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.is_closing = True
        for server in self.servers:
            server.close()
        for connection in [*self.server_state.connections]:
            connection.shutdown()
        while self.app.running:
            await asyncio.sleep(0.05)
        for _ in range(20 * LAST_BYTES):
            if not self.server_state.connections:
                break
            await asyncio.sleep(0.05)
        for connection in [*self.server_state.connections]:
            connection.transport.abort()
        if self.server_state.tasks:  # they learn that nobody is there; the loop's end would be a traceback of each
            await asyncio.wait(self.server_state.tasks, timeout=LAST_BYTES)


def main() -> int:
    return run(serve)
