"""What cmake/cutlass.cmake runs: ``backends.gpu.cutlass.build`` of this checkout, whatever else is installed."""

import runpy
import sys
from pathlib import Path

# the import hook of an editable install would answer for the package with the sources of another checkout
sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]
sys.path[0] = str(Path(__file__).resolve().parents[1])
runpy.run_module("sparsecomp.backends.gpu.cutlass.build", run_name="__main__")
