"""`python -m mlx_gemma4.tune`."""

import sys

from mlx_gemma4.entry import tune

sys.exit(tune())
