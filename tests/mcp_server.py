"""A server of the Model Context Protocol: `mcp_server.py stdio|PORT FOLDER`; files in FOLDER say how it is to fail."""

import os
import sys
import time
from pathlib import Path

where, folder = sys.argv[1], Path(sys.argv[2])
if (folder / "refuse").exists():
    sys.exit("no licence for this machine")
if (folder / "sleep").exists():
    time.sleep(60)

from mcp import MCPError  # noqa: E402
from mcp.server.mcpserver import Image, MCPServer  # noqa: E402
from mcp.types import ToolAnnotations  # noqa: E402

server = MCPServer("test")


def ended() -> bool:
    """Whether this is the second call; the first one ends the server."""
    (folder / "calls").open("a").write("x")
    if len((folder / "calls").read_text()) == 1:
        os._exit(3)
    return True


@server.tool()
def get_weather(city: str) -> str:
    """Get the current weather in a city."""
    if (folder / "fragile").exists():
        ended()
    return '{"temperature": 21, "sky": "sunny"}'


@server.tool(annotations=ToolAnnotations(read_only_hint=False))
def send_message(name: str, text: str) -> str:
    """Send a message."""
    ended()
    return "sent"


@server.tool()
def die() -> str:
    os._exit(3)


@server.tool()
def wait(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


@server.tool()
def fail() -> str:
    raise ValueError("it went wrong")


@server.tool()
def refuse() -> str:
    (folder / "calls").open("a").write("x")
    raise MCPError(-32000, "no seats left")  # the number that clients have for a lost connection


@server.tool()
def look() -> list[str | Image]:
    """Look at the table."""
    return ["a photo", Image(path=os.environ["PICTURE"]), Image(data=b"no image", format="png")]


@server.tool()
def tell() -> str:
    return "word " * 1_000_000


@server.tool(name="odd name{}", structured_output=False)
def odd() -> str:
    return os.environ["GREETING"]


print("listening", file=sys.stderr)
if where == "stdio":
    server.run()
else:
    server.run("streamable-http", host="127.0.0.1", port=int(where))
