"""`python -m mlx_gemma4`: which commands there are."""

import sys
from importlib.metadata import entry_points

import mlx_gemma4

if __name__ == "__main__":
    given = sys.argv[1:]
    if given == ["--version"]:
        print(f"mlx_gemma4 {mlx_gemma4.__version__}")
        sys.exit()
    print("Commands; each says more with --help:")
    for name in sorted(
        script.name
        for script in entry_points(group="console_scripts")
        if script.dist is not None and script.dist.name == "mlx_gemma4"
    ):
        print(f"  {name}")
    if given not in ([], ["--help"]):
        sys.exit(f"error: {given[0][:80]!r} is none of these; expected python -m mlx_gemma4.COMMAND")
