"""Google's Gemma 4 12B on Apple MLX: text, images, audio and video in, text out."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_gemma4.agent.agent import Agent
    from mlx_gemma4.decoding.sampling import Sampling
    from mlx_gemma4.decoding.store import PromptStore
    from mlx_gemma4.engine.engine import Engine, generate_batch
    from mlx_gemma4.engine.generation import generate, stream_generate
    from mlx_gemma4.engine.session import Session
    from mlx_gemma4.prompt.prompt import Prompt
    from mlx_gemma4.reply.reply import collect
    from mlx_gemma4.weights.load import load

__version__ = "0.1.0"
__all__ = [
    "Agent", "Engine", "Prompt", "PromptStore", "Sampling", "Session", "collect", "generate", "generate_batch", "load",
    "stream_generate",
]  # fmt: skip

# Imported when asked for: a command must be able to answer Ctrl-C before MLX is there.
HOMES = {
    "Agent": "agent.agent",
    "Engine": "engine.engine",
    "Prompt": "prompt.prompt",
    "PromptStore": "decoding.store",
    "Sampling": "decoding.sampling",
    "Session": "engine.session",
    "collect": "reply.reply",
    "generate": "engine.generation",
    "generate_batch": "engine.engine",
    "load": "weights.load",
    "stream_generate": "engine.generation",
}


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = vars(import_module(f"{__name__}.{HOMES[name]}"))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
