"""`python -m mlx_gemma4.fit`; the command itself lives in commands/fit.py."""

import sys

from mlx_gemma4.entry import fit

if __name__ == "__main__":
    sys.exit(fit())
