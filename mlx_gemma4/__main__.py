"""`python -m mlx_gemma4`: which commands there are."""

import sys
from importlib.metadata import entry_points

import mlx_gemma4
from mlx_gemma4.entry import closed_pipe


def main(given: list[str]) -> int:
    if given == ["--version"]:
        print(f"mlx_gemma4 {mlx_gemma4.__version__}", flush=True)
        return 0
    print("Commands; each says more with --help:")
    for name in sorted(
        script.name
        for script in entry_points(group="console_scripts")
        if script.dist is not None and script.dist.name == "mlx_gemma4"
    ):
        print(f"  {name}")
    sys.stdout.flush()
    if given in ([], ["--help"]):
        return 0
    print(f"error: {given[0][:80]!r} is none of these; expected python -m mlx_gemma4.COMMAND", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:
        sys.exit(closed_pipe())
