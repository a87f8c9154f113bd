"""`python -m mlx_gemma4.serve`."""

import sys

from mlx_gemma4.entry import serve

sys.exit(serve())
