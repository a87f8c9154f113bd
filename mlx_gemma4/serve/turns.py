"""The conversation that a protocol's blocks and items make up, as our chat messages."""

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Any

from mlx_gemma4.errors import shown
from mlx_gemma4.prompt.messages import Message, Part, decode_base64
from mlx_gemma4.reply.reply import whole_thought
from mlx_gemma4.serve.ask import Refused

SEAL = b"mlx_gemma4:"  # so that another server's seal is known for none of ours


@dataclass
class Turns:
    """Gathers messages in order; what an assistant thought, said and called becomes one message until another comes."""

    messages: list[Message] = field(default_factory=list)

    def add(self, role: str, parts: list[Part]) -> None:
        self.messages.append({"role": role, "content": joined(parts)})

    def think(self, thought: str) -> None:
        message = self.assistant()
        message["reasoning"] = whole_thought([message.get("reasoning", ""), "\n", thought])

    def say(self, text: str) -> None:
        self.assistant()["content"] += text

    def call(self, id: str, name: str, arguments: Any) -> None:
        function = {"name": name, "arguments": arguments}
        self.assistant().setdefault("tool_calls", []).append({"id": id, "type": "function", "function": function})

    def result(self, id: str, parts: list[Part], where: str) -> None:
        """Behind the call that it answers and that call's other results; Refused, naming `where`, if there is none."""
        for index in reversed(range(len(self.messages))):
            if any(call["id"] == id for call in self.messages[index].get("tool_calls", ())):
                break
        else:
            raise Refused(f"{where} is {shown(id)}; expected the id of a tool call before it")
        index += 1
        while index < len(self.messages) and self.messages[index]["role"] == "tool":
            index += 1
        self.messages.insert(index, {"role": "tool", "tool_call_id": id, "content": joined(parts)})

    def assistant(self) -> Message:
        """The assistant's message that is being put together."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": ""})
        return self.messages[-1]


def text(value: str) -> Part:
    return {"type": "text", "text": value}


def function_tool(name: str, description: str | None, parameters: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "description": description or "", "parameters": parameters}
    return {"type": "function", "function": function}


def as_text(block: dict[str, Any]) -> Part:
    """A block of a kind that is not known, without the mark of a cache, which clients move on with every turn."""
    return text(json.dumps({key: value for key, value in block.items() if key != "cache_control"}, ensure_ascii=False))


def file_part(name: str | None, data: str, where: str) -> Part:
    """A PDF, or a text with its name before it, from base64 or a data: URL. ValueError, naming `where`, if wrong."""
    head, comma, encoded = data.rpartition(",")
    content = decode_base64(encoded, where)
    if comma and head.startswith("data:text/"):
        return text("\n".join(filter(None, [name, content.decode(errors="replace")])))
    return {"type": "pdf", "pdf": content}


def joined(parts: list[Part]) -> str | list[Part]:
    """Content in which no two texts stand side by side: the template would join them without a space."""
    content: list[Part] = []
    for part in parts:
        if part["type"] == "text" and content and content[-1]["type"] == "text":
            content[-1] = text(f"{content[-1]['text']}\n{part['text']}")
        else:
            content.append(part)
    if all(part["type"] == "text" for part in content):
        return "".join(part["text"] for part in content)
    return content


def sealed(thought: str) -> str:
    """A thought as what a client keeps and gives back without looking into it."""
    return base64.b64encode(SEAL + thought.encode()).decode()


def unsealed(seal: str) -> str:
    """The thought, or nothing if another server sealed it."""
    try:
        opened = base64.b64decode(seal, validate=True)
        return opened.removeprefix(SEAL).decode() if opened.startswith(SEAL) else ""
    except (binascii.Error, ValueError):
        return ""
