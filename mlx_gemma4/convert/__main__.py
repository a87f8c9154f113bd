"""`python -m mlx_gemma4.convert`."""

import sys

from mlx_gemma4.convert.command import main

sys.exit(main())
