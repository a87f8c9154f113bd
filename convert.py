"""`python convert.py …`: the command mlx_gemma4.convert from a checkout."""

import sys

from mlx_gemma4.convert.command import main

if __name__ == "__main__":
    sys.exit(main())
