"""Certifies the GPU backends on this machine: builds, tests, sanitizers, sweeps, one summary. Started by gpu.sh.

Standard library only, since it runs before anything is built. Leaves three files in the folder of results: summary.txt
(for people), certification.json (everything measured), logs.txt (the end of every stage's output).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu.goals import verdicts
from bench.gpu.stages import Outcome, Stage, by_status, run

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu-run"
VENV = ROOT / "build" / "gpu-venv"
HEADERS = ROOT / ".cutlass"
SWEEPS = ("bf16", "fp8", "compiled", "int8", "tf32")

_TYPES = "bfloat16,fp8,fp8-fast,float16"
_MODULES = ("torch", "numpy", "triton", "pytest", "scikit_build_core", "cupy", "rich", "safetensors")
_PROGRAMS = ("nvidia-smi", "nvcc", "cmake", "ninja", "c++", "compute-sanitizer", "ncu")
_FINISHING_S = 6.0
_LOG_LINES, _FAULT_LINES = 150, 12
# the tests of a kernel that brings its process down must not take those of others with them
_GLUON = "gluon or split or packing or elements"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 if something was measured and nothing was wrong, whatever could not be tried here."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing runs on after that")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    capability = _asked("compute_cap")
    machine = inventory(capability)
    print("\n".join(machine), flush=True)
    told = 0

    def report(outcomes: Sequence[Outcome]) -> None:
        nonlocal told
        print(*outcomes[told:], sep="\n", flush=True)
        told = len(outcomes)
        # whatever happens to this process later, what is known now can be read
        _write(given.output, machine, outcomes, time.monotonic() - begin, given.minutes)

    end = begin + 60 * given.minutes - _FINISHING_S
    outcomes = run(phases(os.cpu_count() or 1, capability), end, WORK, report)
    print((given.output / "summary.txt").read_text(encoding="utf-8"))
    measured = any((WORK / name / "gpu.json").is_file() for name in SWEEPS)
    return int(not measured or any(outcome.fault for outcome in outcomes))


def inventory(capability: str | None) -> list[str]:
    """What this machine has of what may be needed, a line each, and where CUTLASS is taken from."""
    modules = [f"{name} {'yes' if find_spec(name) else 'NO'}" for name in _MODULES]
    programs = [f"{name} {'yes' if shutil.which(name, path=_path()) else 'NO'}" for name in _PROGRAMS]
    named = os.environ.get("CUTLASS_PATH") or (str(HEADERS) if HEADERS.is_dir() else None)
    headers = named or ("the nvidia-cutlass wheel" if find_spec("cutlass_library") else "NONE FOUND; make .cutlass")
    return [
        f"gpu: {_asked('name') or 'none that nvidia-smi knows'}, driver {_asked('driver_version')}, "
        f"compute capability {capability}",
        f"python: {sys.version.split()[0]}, {os.cpu_count()} cores; modules: {', '.join(modules)}",
        f"programs: {', '.join(programs)}",
        f"CUTLASS headers: {headers}",
    ]


def phases(cores: int, capability: str | None) -> list[list[Stage]]:
    """Everything that is run, in order; the stages of one phase at the same time, and nothing beside a sweep."""
    python = str(VENV / "bin" / "python")
    here = "there is no GPU" if capability is None else f"this GPU has {capability}"
    hopper = None if capability == "9.0" else f"its kernels are for compute capability 9.0 and {here}"
    install = f"{python} -m pip install --no-build-isolation --no-deps --no-index -e ."
    # a build folder of its own, since CMake remembers these choices
    defines = "-C build-dir=build/gpu-wheel -C cmake.define.SPARSECOMP_CUTLASS=OFF -C cmake.define.SPARSECOMP_ORT=OFF"
    cmake = (
        f"set -e; cmake -S . -B build/gpu-cutlass -DSPARSECOMP_CUTLASS=ON -DSPARSECOMP_CUTLASS_TYPES={_TYPES} "
        f"-DSPARSECOMP_ORT=OFF -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE={python}; "
        f"cmake --build build/gpu-cutlass --target sparsecomp_cutlass --parallel {max(2, cores - 4)}"
    )
    # libraries that were finished when the build was cut short are of use, too
    into = f"$({python} -c 'import sparsecomp; print(sparsecomp.__path__[-1])')"
    copy = f"cmake --install build/gpu-cutlass --component cutlass --prefix {into} && ls -l {into}/cutlass_libraries"
    tests = (python, "-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", "-m", "gpu")
    folder = "tests/kernels"
    sanitizer = shutil.which("compute-sanitizer", path=_path())
    absent = None if sanitizer else "compute-sanitizer is not installed"

    def sanitized(tool: str) -> Stage:
        command = (str(sanitizer), "--tool", tool, "--error-exitcode", "9", *tests, folder, "-k", "sanitized")
        return _stage(tool, command, 150, 30, ("build",), absent, _judge_sanitizer)

    def tested(name: str, most: float, *selection: str, needs: str = "build", skip: str | None = None) -> Stage:
        return _stage(name, (*tests, *selection), most, 20, (needs,), skip, _judge_tests)

    def swept(name: str, most: float, least: float, *options: str) -> Stage:
        module = "compiled" if name == "compiled" else "sweep"
        command = (python, "-m", f"bench.gpu.{module}", "--output", str(WORK / name), "--limit", "{seconds}")
        # our experiments are measured, too: one that faults is left out of the rest
        flags = {"SPARSECOMP_EXPERIMENTAL": "gluon_wgmma"} if name == "bf16" else {}
        stage = _stage(f"sweep {name}", (*command, *options), most, least, ("build",), judge=_judge_sweep)
        return replace(stage, environment={**stage.environment, **flags})

    few = ("--models", "Llama-3-8B", "--tokens", "4096", "16", "1")
    on_gpu = f"{folder}/test_on_gpu.py"
    return [
        [_stage("environment", ("bash", "-c", _environment()), 40, 5)],
        [_stage("build", ("bash", "-c", f"{install} {defines}"), 150, 40, ("environment",))],
        [
            _stage("cutlass", ("bash", "-c", cmake), 170, 60, ("build",), hopper, _judge_cutlass),
            tested("tests triton", 150, on_gpu, "-k", f"not ({_GLUON})"),
            tested("tests gluon", 150, on_gpu, "-k", _GLUON),
            tested("tests wgmma", 150, f"{folder}/test_wgmma_on_gpu.py", skip=hopper),
            tested("tests graphs", 150, f"{folder}/test_graphs_on_gpu.py"),
            tested("tests cupy", 60, f"{folder}/test_cupy_on_gpu.py"),
            sanitized("memcheck"),
            sanitized("racecheck"),
        ],
        [_stage("cutlass install", ("bash", "-c", copy), 10, 5, ("build",), hopper, _judge_cutlass)],
        [tested("tests cutlass", 60, f"{folder}/test_cutlass_on_gpu.py", needs="cutlass install", skip=hopper)],
        [tested("tests choice", 60, f"{folder}/test_choice_on_gpu.py")],
        [swept("bf16", 420, 150)],
        [swept("fp8", 45, 30, "--dtype", "fp8", "--models", "Llama-3-8B", "--tokens", "4096", "2048", "8192", "16")],
        [swept("compiled", 50, 30)],
        [swept("int8", 25, 25, "--dtype", "int8", *few)],
        [swept("tf32", 25, 25, "--dtype", "tf32", *few)],
    ]


def _stage(
    name: str,
    command: tuple[str, ...],
    most: float,
    least: float = 0.0,
    needs: tuple[str, ...] = (),
    skip: str | None = None,
    judge: Any = None,
) -> Stage:
    environment = {"PATH": _path(), "SPARSECOMP_CACHE": str(WORK / "cache"), "PYTHONUNBUFFERED": "1"}
    # plugins that happen to be installed here are no part of the tests
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if "CUTLASS_PATH" not in os.environ and HEADERS.is_dir():
        environment["CUTLASS_PATH"] = str(HEADERS)
    return Stage(name, command, most, least, needs, skip, environment, **({"judge": judge} if judge else {}))


def _environment() -> str:
    """An environment of its own over the machine's packages, so that nothing there is changed."""
    outer = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    # a Python that is itself a virtual environment hides its packages from its children
    lines = "".join(f"{path}\\n" for path in outer)
    site = f"$({VENV}/bin/python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')"
    return f"{sys.executable} -m venv --system-site-packages --without-pip {VENV} && printf '{lines}' >{site}/outer.pth"


def _path() -> str:
    """The programs' path: cmake and ninja may lie beside the machine's own Python, nvcc in CUDA's usual place."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])


def _judge_tests(status: int, log: str) -> tuple[str, str, bool]:
    last = next((line.strip(" =") for line in reversed(log.splitlines()) if " in " in line and line[:1] != "S"), "")
    if status == 0 and " passed" in f" {last}":
        return "passed", last, False
    if status in (0, 5):
        reasons = [line.split(": ", 1)[-1] for line in log.splitlines() if line.startswith("SKIPPED")]
        return "not run", f"{last} ({reasons[0]})" if reasons else last, False
    return "failed", last or f"exit status {status}", True


def _judge_sanitizer(status: int, log: str) -> tuple[str, str, bool]:
    if "Device not supported" in log:
        return "not run", "refused by this machine's driver", False
    state, reason, fault = _judge_tests(status, log)
    errors = [line.strip("= ") for line in log.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    return state, "; ".join([reason, *errors]), fault


def _judge_cutlass(status: int, log: str) -> tuple[str, str, bool]:
    reason = next((line.strip() for line in log.splitlines() if "the cutlass backend" in line), None)
    if status != 0 and reason is not None and "finds no" in " ".join(log.split()):
        return "not run", " ".join(log[log.index("the cutlass backend") :].split("Call Stack")[0].split()), False
    if status == 0 and "wgmma_sp" not in log:
        return "failed", "no library was finished", True
    return by_status(status)


def _judge_sweep(status: int, log: str) -> tuple[str, str, bool]:
    if "sees no CUDA device" in log:
        return "not run", "torch sees no CUDA device", False
    return by_status(status)


def _asked(field: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _write(output: Path, machine: Sequence[str], outcomes: Sequence[Outcome], seconds: float, minutes: float) -> None:
    results: dict[str, Any] = {}
    texts: list[str] = []
    for name in SWEEPS:
        try:
            results[name] = json.loads((WORK / name / "gpu.json").read_text(encoding="utf-8"))
            texts += ["", f"SWEEP {name}", (WORK / name / "gpu.txt").read_text(encoding="utf-8").rstrip()]
        except (OSError, ValueError):
            continue
    goals = verdicts(results)
    faults = [outcome for outcome in outcomes if outcome.fault]
    cut = sum(outcome.state == "cut short" or "no time" in outcome.reason for outcome in outcomes)
    states = [goal.state for goal in goals]
    lines = [
        *([] if results else ["NOTHING WAS MEASURED: no sweep has run so far; see STAGES."]),
        f"Of {len(goals)} goals {states.count('met')} were met, {states.count('MISSED')} missed, "
        f"{states.count('open')} could not be measured.",
        f"{len(faults)} stages went wrong, {cut} of them for lack of time; {seconds:.0f} of {60 * minutes:.0f} s used.",
        "",
        *machine,
        "",
        "GOALS (the best dense engine of the run = 1)",
        *(str(goal) for goal in goals),
        "",
        "STAGES",
        *(str(outcome) for outcome in outcomes),
        *(line for outcome in faults for line in _fault(outcome.name)),
        *texts,
    ]
    stages = [vars(outcome) for outcome in outcomes]
    whole = {"machine": list(machine), "stages": stages, "goals": [vars(goal) for goal in goals], "sweeps": results}
    (output / "certification.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    (output / "logs.txt").write_text("".join(_log(outcome.name, _LOG_LINES) for outcome in outcomes), encoding="utf-8")
    (output / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _log(stage: str, lines: int) -> str:
    path = WORK / f"{stage}.log"
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    return "\n".join([f"===== {stage} =====", *text, ""])


def _fault(stage: str) -> list[str]:
    text = _log(stage, 2000).splitlines()
    named = [line for line in text if line.startswith(("FAILED", "ERROR", "E   "))]
    return ["", f"what {stage} said:", *(f"  {line[:240]}" for line in (named or text)[-_FAULT_LINES:])] if text else []


if __name__ == "__main__":
    sys.exit(main())
