"""`python -m mlx_gemma4`: which commands there are."""

from importlib.metadata import entry_points

if __name__ == "__main__":
    print("Commands; each says more with --help:")
    for name in sorted(
        script.name
        for script in entry_points(group="console_scripts")
        if script.dist is not None and script.dist.name == "mlx_gemma4"
    ):
        print(f"  {name}")
