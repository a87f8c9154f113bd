"""Google's Gemma 4 12B on Apple MLX: text, images, audio and video in, text out."""

from mlx_gemma4.decoding.sampling import Sampling
from mlx_gemma4.decoding.store import PromptStore
from mlx_gemma4.engine.generation import generate, stream_generate
from mlx_gemma4.engine.session import Session
from mlx_gemma4.prompt.prompt import Prompt
from mlx_gemma4.reply.reply import collect
from mlx_gemma4.weights.load import load

__version__ = "0.1.0"
__all__ = [
    "Prompt", "PromptStore", "Sampling", "Session", "collect", "generate", "load", "stream_generate",
]  # fmt: skip
