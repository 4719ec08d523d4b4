#!/usr/bin/env bash
# Certifies the GPU backends on a machine with an NVIDIA GPU, in one call of at most 9 minutes and without a network:
# builds in place, runs the GPU tests, compute-sanitizer on the hand-made pipeline, and the sweep. Everything is written
# to $OUT (default: gpu-out). Needs torch, triton, pytest, scikit-build-core and a C++ compiler; GPU_PYTHON names the
# Python that has them, GPU_MINUTES another limit. The exit status is that of the worst step.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu-out}
python=${GPU_PYTHON:-python3}
limit=$((${GPU_MINUTES:-9} * 60))
mkdir -p "$out"
worst=0

left() { echo $((limit - SECONDS - 10)); }

# step NAME SECONDS COMMAND...: run with at most that long, or what is left if that is less; keep the output
step() {
  local name=$1 most=$2 rest status
  shift 2
  rest=$(left)
  ((most > rest)) && most=$rest
  if ((most < 5)); then
    echo "$name: no time left" | tee -a "$out/steps.txt"
    worst=1
    return 1
  fi
  local begin=$SECONDS
  timeout --kill-after=5 "$most" "$@" >"$out/$name.log" 2>&1
  status=$?
  echo "$name: exit $status after $((SECONDS - begin)) s" | tee -a "$out/steps.txt"
  if ((status != 0)); then
    tail -n 15 "$out/$name.log"
    worst=1
  fi
  return $status
}

: >"$out/steps.txt"
nvidia-smi >"$out/nvidia-smi.txt" 2>&1 || echo "nvidia-smi cannot be run" | tee -a "$out/steps.txt"

# an environment of its own over the machine's packages, so that nothing there is changed
if ! [ -x build/gpu-venv/bin/python ]; then
  step environment 60 "$python" -m venv --system-site-packages --without-pip build/gpu-venv || exit 1
  # a Python that is itself a virtual environment hides its packages from its children
  "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))), sep="\n")' \
    >"$(build/gpu-venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/outer.pth"
fi
# cmake and ninja may lie beside the machine's own Python
PATH=$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH
python=$PWD/build/gpu-venv/bin/python
step build 150 "$python" -m pip install --no-build-isolation --no-deps --no-index -e . || exit 1

# CUTLASS's kernels are compiled once, on all cores; where there is no CUTLASS the backend says so, and that is no fault
if nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -q '^9\.0'; then
  before=$worst
  step cutlass 180 "$python" -m sparsecomp.backends.cutlass_build --types bfloat16,float16,fp8 || {
    grep -q "the cutlass backend finds no" "$out/cutlass.log" && worst=$before
  }
fi

# most of the time of these tests is compilation, which xdist spreads over the cores
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
step tests 180 "$python" -m pytest -q -m gpu "${parallel[@]}" tests/kernels_gpu
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    before=$worst
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q -m gpu tests/kernels_gpu -k sanitized
    if grep -q "Device not supported" "$out/$tool.log" 2>/dev/null; then
      # no fault of a kernel
      echo "$tool: refused by this machine's driver" | tee -a "$out/steps.txt"
      worst=$before
    fi
  done
else
  echo "compute-sanitizer: not installed" | tee -a "$out/steps.txt"
fi
# the sweep stops by itself, 100 seconds before the end; int8 and tf32 then have half a minute each
step sweep "$limit" "$python" -m sparsecomp.bench.gpu --output "$out" \
  --minutes "$("$python" -c "print(max(0.1, ($(left) - 100) / 60))")"
for elements in int8 tf32; do
  step "sweep-$elements" 35 "$python" -m sparsecomp.bench.gpu --output "$out/$elements" --dtype "$elements" \
    --models Llama-3-8B --tokens 4096 1 16 --minutes 0.4
done
exit $worst
