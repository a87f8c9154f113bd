"""How the demo model in `mlx_gemma4/demo` was made: its world, its synthetic data, its training."""
