"""Google's Gemma 4 12B on Apple MLX: text, images, audio and video in, text out."""

from mlx_gemma4.generation import generate, stream_generate
from mlx_gemma4.prompt import Prompt
from mlx_gemma4.reply import collect
from mlx_gemma4.sampling import Sampling
from mlx_gemma4.weights import load

__version__ = "0.1.0"
__all__ = ["Prompt", "Sampling", "collect", "generate", "load", "stream_generate"]
