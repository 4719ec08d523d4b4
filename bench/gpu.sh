#!/usr/bin/env bash
# Certifies the GPU backends on a machine with an NVIDIA GPU, in one call of at most 9 minutes and without a network:
# builds in place, runs the GPU tests, compute-sanitizer on the hand-made pipelines, and the sweeps. Three files are left
# in $OUT (default: gpu-out): summary.txt, certification.json, logs.txt. Needs torch, triton, pytest, scikit-build-core,
# cmake and a C++ compiler; GPU_PYTHON names the Python that has them, GPU_MINUTES another limit, SPARSECOMP_COMMIT the
# commit of a copy without history. CUTLASS is taken from CUTLASS_PATH, from .cutlass (make .cutlass), or from its wheel.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${GPU_PYTHON:-python3}" -m bench.gpu.certify --output "${OUT:-gpu-out}" --minutes "${GPU_MINUTES:-9}"
