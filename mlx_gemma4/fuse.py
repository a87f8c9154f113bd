"""`python -m mlx_gemma4.fuse`; the command itself lives in commands/fuse.py."""

import sys

from mlx_gemma4.entry import fuse

if __name__ == "__main__":
    sys.exit(fuse())
