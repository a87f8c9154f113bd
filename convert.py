"""`python convert.py …`: the command mlx_gemma4.convert from a checkout."""

import sys

from mlx_gemma4.entry import convert

if __name__ == "__main__":
    sys.exit(convert())
