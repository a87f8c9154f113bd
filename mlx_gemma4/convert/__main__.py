"""`python -m mlx_gemma4.convert`."""

import sys

from mlx_gemma4.entry import convert

sys.exit(convert())
