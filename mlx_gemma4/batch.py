"""`python -m mlx_gemma4.batch`; the command itself lives in commands/batch.py."""

import sys

from mlx_gemma4.entry import batch

if __name__ == "__main__":
    sys.exit(batch())
