"""Servers of the Model Context Protocol: programs that are started, and addresses; in an event loop of their own."""

import base64
import json
import logging
import math
import re
import sys
import tempfile
import weakref
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from os import environ
from pathlib import Path
from typing import Any, TextIO

import anyio
import httpx2
from anyio.from_thread import BlockingPortal, start_blocking_portal
from mcp import Client, MCPError, StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.types import METHOD_NOT_FOUND, CallToolResult, ContentBlock, TextResourceContents
from mcp.types import Tool as Listed

from mlx_gemma4.agent.tools import Part, Tool, ToolError, text_part
from mlx_gemma4.config import read_given
from mlx_gemma4.errors import a, one_line, with_name

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup  # anyio brings it

logging.getLogger("mcp").addHandler(logging.NullHandler())  # of what servers do wrong it logs tracebacks

STILL = 300  # seconds that an address may be silent while it works
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
ONE_OF = 'expected "command" (with "args", "env", "cwd"), or "url" (with "headers")'


@dataclass(frozen=True)
class Config:
    """How a server is reached: by a command, or at a URL."""

    name: str
    command: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


def read_configs(source: str | Path | Mapping[str, Any]) -> list[Config]:
    """The servers in a file as other programs have it, {"mcpServers": {name: {…}}}, or in the same as a dict.

    ${NAME} and ${NAME:-else} in its texts are the environment's. ValueError that names the place.
    """
    where, found = "mcp", source
    if isinstance(source, (str, Path)):
        where = f"mcp {str(source)!r}"
        data = read_given(source, where)
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {one_line(error)}") from None
    servers = found.get("mcpServers") if isinstance(found, Mapping) else None
    if not isinstance(servers, Mapping):
        raise ValueError(f'{where} has no object "mcpServers"; expected {{"mcpServers": {{name: {{"command": …}}}}}}')
    configs = [read_config(str(name), entry, f"{where}, {name}") for name, entry in servers.items()]
    return [config for config in configs if config is not None]


def read_config(name: str, entry: Any, where: str) -> Config | None:
    """None: it is switched off."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is {a(entry)}; {ONE_OF}")
    if entry.get("disabled") is True:
        return None
    kinds: dict[str, tuple[type, ...]] = {
        "type": (str,), "command": (str,), "url": (str,), "cwd": (str,), "args": (list,), "env": (dict,),
        "headers": (dict,),
    }  # fmt: skip
    for key, types in kinds.items():
        if entry.get(key) is not None and not isinstance(entry[key], types):
            raise ValueError(f"{where}.{key} is {a(entry[key])}; expected {a(types[0]())}")
    given = {key: filled(entry[key], f"{where}.{key}") for key in kinds if entry.get(key) is not None}
    if given.get("type") == "sse":
        raise ValueError(f"{where} has the type sse, which is of old; expected stdio or streamable HTTP")
    if ("command" in given) == ("url" in given):
        raise ValueError(f"{where} has {', '.join(map(str, entry)) or 'nothing'}; {ONE_OF}")
    if "url" in given:
        return Config(name, url=given["url"], headers=given.get("headers", {}))
    return Config(name, [given["command"], *given.get("args", ())], given.get("env", {}), given.get("cwd"))


def filled(value: Any, where: str) -> Any:
    """A value with the environment's variables in its texts."""
    if isinstance(value, list):
        return [filled(entry, where) for entry in value]
    if isinstance(value, dict):
        return {key: filled(entry, where) for key, entry in value.items()}

    def variable(found: re.Match[str]) -> str:
        text = environ.get(found[1], found[2])
        if text is None:
            raise ValueError(f"{where} names the variable {found[1]}, which is not set; expected it, or ${{…:-else}}")
        return text

    return VARIABLE.sub(variable, str(value))


class Servers:
    """Servers that run until `close`, and their tools."""

    def __init__(self, configs: list[Config], start_timeout: float, call_timeout: float) -> None:
        """Start all. Timeouts in seconds. OSError that names the server for one that does not answer."""
        self.opened = ExitStack()
        weakref.finalize(self, self.opened.close)  # also at the process's end, while the loop still runs
        with ExitStack() as failed:
            failed.callback(self.close)
            portal = self.opened.enter_context(start_blocking_portal())
            self.servers = [Server(config, portal, start_timeout, call_timeout) for config in configs]
            for server in self.servers:
                self.opened.callback(server.stop)
            with ThreadPoolExecutor() as threads:
                for _ in threads.map(Server.start, self.servers):  # which raises what one of them raises
                    pass
            failed.pop_all()

    def tools(self, taken: set[str]) -> list[Tool]:
        """Those of all; a name that is taken, or that two servers have, begins with the server's."""
        found = [(server, listed) for server in self.servers for listed in server.listed]
        names = [plain(listed.name) for _, listed in found]
        return [
            server.tool(
                listed, name if name not in taken and names.count(name) == 1 else f"{plain(server.name)}_{name}"
            )
            for (server, listed), name in zip(found, names, strict=True)
        ]

    def close(self) -> None:
        self.opened.close()


class Server:
    """One of them. Its methods are called from the caller's thread."""

    def __init__(self, config: Config, portal: BlockingPortal, start_timeout: float, call_timeout: float) -> None:
        self.config, self.name, self.portal = config, config.name, portal
        self.start_timeout, self.call_timeout = start_timeout, call_timeout
        self.listed: list[Listed] = []
        self.connection: AbstractContextManager[Client] | None = None
        self.client: Client | None = None

    # --- its life ------------------------------------------------------------------------------

    def start(self) -> None:
        with tempfile.TemporaryFile("w+", errors="replace") as log:  # what it writes to standard error
            connection = self.portal.wrap_async_context_manager(self.connected(log))
            try:
                self.client = connection.__enter__()
            except Exception as error:  # a server can fail in any way, also in a group of errors
                how = "started" if self.config.url is None else "reached"
                raise OSError(f"the server {self.name!r} cannot be {how}: {self.reason(error, log)}") from None
        self.connection = connection

    def stop(self) -> None:
        connection, self.connection, self.client = self.connection, None, None
        if connection is not None:
            with suppress(Exception):  # it is gone, however badly it went
                connection.__exit__(None, None, None)

    @asynccontextmanager
    async def connected(self, log: TextIO) -> AsyncIterator[Client]:
        with anyio.fail_after(self.start_timeout) as scope:
            async with self.transport(log) as transport, Client(transport, read_timeout_seconds=None) as client:
                self.listed = await listed_tools(client)
                scope.deadline = math.inf
                yield client

    @asynccontextmanager
    async def transport(self, log: TextIO) -> AsyncIterator[Any]:
        if self.config.url is None:
            command, *args = self.config.command
            given = StdioServerParameters(command=command, args=args, env=self.config.env, cwd=self.config.cwd)
            yield stdio_client(given, errlog=log)
        else:
            wait = httpx2.Timeout(self.start_timeout, read=STILL)
            async with httpx2.AsyncClient(headers=self.config.headers, timeout=wait) as http:
                yield streamable_http_client(self.config.url, http_client=http)

    def reason(self, error: BaseException, log: TextIO) -> str:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        log.seek(0)
        last = log.read()[-2000:].strip().rpartition("\n")[2]
        if isinstance(error, TimeoutError):
            text = f"no answer within {self.start_timeout:g} s"
        elif isinstance(error, OSError):
            text = with_name(error)  # the program's, or its folder's
        else:
            text = one_line(error) if isinstance(error, Exception) else str(error)
        return f"{text}; it says: {last}" if last else text

    # --- calls ---------------------------------------------------------------------------------

    def tool(self, listed: Listed, name: str) -> Tool:
        hints = listed.annotations
        changes = hints is not None and (
            hints.read_only_hint is False or bool(hints.destructive_hint) or hints.idempotent_hint is False
        )

        def run(arguments: dict[str, Any]) -> list[Part]:
            result = self.call(listed.name, arguments, again=not changes)
            parts = [part for block in result.content for part in block_parts(block)]
            if not parts and result.structured_content is not None:
                parts = [text_part(json.dumps(result.structured_content, ensure_ascii=False))]
            if result.is_error:
                raise ToolError("\n".join(part.get("text", "") for part in parts))
            return parts

        return Tool(name, listed.description or "", listed.input_schema, run)

    def call(self, name: str, arguments: dict[str, Any], again: bool) -> CallToolResult:
        """What a tool gives. A server that is gone is started once more; again: and then asked once more."""
        result = self.attempt(name, arguments)
        if result is None:
            self.stop()
            self.start()
            if not again:
                raise ToolError(f"the server {self.name!r} ended and runs again; what the call has done is not known")
            result = self.attempt(name, arguments)
        if result is None:
            raise ToolError(f"the server {self.name!r} ended during the call, twice")
        return result

    def attempt(self, name: str, arguments: dict[str, Any]) -> CallToolResult | None:
        """None: the server is gone."""
        if self.client is None:
            return None
        future = self.portal.start_task_soon(self.result, self.client, name, arguments)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    async def result(self, client: Client, name: str, arguments: dict[str, Any]) -> CallToolResult | None:
        try:
            with anyio.fail_after(self.call_timeout):
                return await client.call_tool(name, arguments)
        except TimeoutError:
            raise ToolError(f"no answer within {self.call_timeout:g} s") from None
        except MCPError as error:
            said = error.message
        # Servers use the numbers too that the client has for a lost connection, so another question shows which it is.
        try:
            with anyio.fail_after(self.start_timeout):
                await client.list_tools(cache_mode="bypass")
        except (MCPError, TimeoutError):
            return None
        raise ToolError(said)


async def listed_tools(client: Client) -> list[Listed]:
    """None of a server that has prompts or resources alone."""
    found, cursor = list[Listed](), None
    try:
        while True:
            page = await client.list_tools(cursor=cursor)
            found += page.tools
            if (cursor := page.next_cursor) is None:
                return found
    except MCPError as error:
        if error.code != METHOD_NOT_FOUND:
            raise
        return found


def plain(name: str) -> str:
    """A name as a call can have it."""
    return re.sub(r"[^\w./-]", "_", name)


def block_parts(block: ContentBlock) -> list[Part]:
    """A block of a result as the model can read it."""
    if block.type == "text":
        return [text_part(block.text)]
    if block.type == "image" or block.type == "audio":
        return [{"type": block.type, block.type: base64.b64decode(block.data)}]
    if block.type == "resource_link":
        return [text_part(f"{block.name}: {block.uri}")]
    resource = block.resource
    if isinstance(resource, TextResourceContents):
        return [text_part(resource.text)]
    kind = (resource.mime_type or "").partition("/")[0]
    if kind in ("image", "audio"):
        return [{"type": kind, kind: base64.b64decode(resource.blob)}]
    return [text_part(f"{resource.uri}: {len(resource.blob) * 3 // 4} bytes of {resource.mime_type or 'no type'}")]
