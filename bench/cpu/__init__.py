"""Measurements on a CPU beyond those of ``sparsecomp bench``."""
