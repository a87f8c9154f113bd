"""`python -m mlx_gemma4.evaluate`."""

import sys

from mlx_gemma4.evaluate.command import main

sys.exit(main())
