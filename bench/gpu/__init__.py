"""Measurements and certification on an NVIDIA GPU; ``bench/gpu.sh`` starts them."""
