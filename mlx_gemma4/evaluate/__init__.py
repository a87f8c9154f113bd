"""How close two models are."""
