"""`python -m mlx_gemma4.chat`; the command itself lives in commands/chat.py."""

import sys

from mlx_gemma4.entry import chat

if __name__ == "__main__":
    sys.exit(chat())
