"""What an input may take."""

SECONDS, SILENT_SECONDS = 20, 120  # of computing and, where the machine is busy, of waiting
MOST_BYTES = 10**9  # above what the process had before
