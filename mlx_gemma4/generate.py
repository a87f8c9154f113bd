"""`python -m mlx_gemma4.generate`; the command itself lives in commands/generate.py."""

import sys

if __name__ == "__main__":
    from mlx_gemma4.entry import generate as command

    sys.exit(command())
else:
    # Importing a submodule puts it into the package under its name: let that be the function, not a module over it.
    from mlx_gemma4.engine.generation import generate

    generate.generate = generate  # type: ignore[attr-defined]  # from mlx_gemma4.generate import generate
    sys.modules[__name__] = generate  # type: ignore[assignment]
