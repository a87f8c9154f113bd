"""`python -m mlx_gemma4.evaluate`."""

import sys

from mlx_gemma4.entry import evaluate

sys.exit(evaluate())
