"""What maintainers run, from a checkout: sweeps of every kind, certification, the demo. Nothing installed knows it."""
