"""The shared libraries of csrc/cuda/wgmma_sp.cu: those that CMake built, else those compiled on first use and kept.

A library's file name says what it was made of: the configuration, a hash of sources and options, one of the tools. One
of other sources is never loaded. ``python -m sparsecomp.backends.gpu.cutlass.build`` compiles ahead; CMake asks it what
to build. Gives paths; knows nothing of tensors, and imports no torch, which a build need not have.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import sparsecomp
from sparsecomp.backends.gpu.cutlass.config import Config, configs
from sparsecomp.errors import BackendError
from sparsecomp.machine import cache
from sparsecomp.machine.sources import cuda_folder

MINIMUM_NVCC = (12, 3)
MINIMUM_CUTLASS = (4, 2)

FLAGS = (
    "-std=c++17",
    "-O3",
    # an assertion in device code is a call, and ptxas then waits for every wgmma before the next (C7510)
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
    # machine code alone: no other GPU can run wgmma
    "-gencode=arch=compute_90a,code=sm_90a",
    "-shared",
    "-Xcompiler=-fPIC",
    "-Xptxas=-v",
)
_SOURCES = ("wgmma_sp.cu", "wgmma_sp.h", "activation.cuh")
_PREBUILT = "cutlass_libraries"  # folder of the installed package that cmake/cutlass.cmake fills
_KEY_DIGITS = 16
_LAST_LINES = 5

_failed: dict[str, str] = {}


@dataclass(frozen=True)
class Toolchain:
    """A compiler, the folder that holds CUTLASS's cutlass/cutlass.h, and what tells this pair from others."""

    nvcc: Path
    cutlass: Path
    identity: str


@lru_cache(maxsize=1)
def toolchain() -> Toolchain | str:
    """What this machine compiles with, or the reason why it cannot."""
    found = _nvcc()
    if isinstance(found, str):
        return found
    nvcc, version = found
    headers = _cutlass()
    if isinstance(headers, str):
        return headers
    return Toolchain(nvcc, headers, f"{version}\n{_version_header(headers)}")


def compiled(needed: Sequence[Config]) -> bool:
    """Whether every one of these libraries is there already, so that asking for them compiles nothing."""
    return all(_kept(config) is not None for config in needed)


def why_not(needed: Sequence[Config]) -> str | None:
    """None if every one of these libraries was built, is in the cache or can be compiled here, else the reason."""
    for config in needed:
        if _kept(config) is not None:
            continue
        if (reason := _failed.get(_source_key(config))) is not None:
            return reason
        if isinstance(tools := toolchain(), str):
            return tools + _stale_note((config,))
    return None


def libraries(needed: Sequence[Config]) -> dict[Config, Path]:
    """The libraries, those that are missing being compiled in parallel, about a minute of one core each.

    Raises BackendError if they cannot be compiled, with the compiler's last lines.
    """
    if reason := why_not(needed):
        raise BackendError(f"the cutlass backend {reason}")
    paths = {config: _kept(config) for config in needed}
    missing = [config for config, path in paths.items() if path is None]
    if missing:
        warnings.warn(
            f"compiling {len(missing)} CUTLASS kernels, once on this machine: about a minute of one core each"
            f"{_stale_note(missing)}",
            stacklevel=2,
        )
        with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as pool:
            paths.update(zip(missing, pool.map(_build, missing), strict=True))
    return {config: path for config, path in paths.items() if path is not None}


def compile_library(config: Config, tools: Toolchain, target: Path) -> str:
    """Compile one configuration to ``target``, which appears complete or not at all; gives the compiler's messages.

    Raises BackendError with the compiler's last lines if it fails.
    """
    top = tools.nvcc.parent.parent
    # a wheel's nvcc does not find what lies beside it
    folders = [f"-I{top}/include/cccl", f"-L{top}/lib"]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as folder:
        unfinished = Path(folder) / "library.so"
        command = [str(tools.nvcc), *FLAGS, *config.definitions(), f"-I{tools.cutlass}", *folders]
        command += [str(cuda_folder() / _SOURCES[0]), "-o", str(unfinished)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            lines = " | ".join(done.stdout.strip().splitlines()[-_LAST_LINES:])
            raise BackendError(f"{tools.nvcc} could not compile {config}: {lines}")
        unfinished.replace(target)
    return done.stdout


def _folder() -> Path:
    """Where libraries are kept; with the cache off, for this process only."""
    kept = cache.directory()
    if kept is None:
        return Path(_temporary().name)
    return kept / "cutlass"


@lru_cache(maxsize=1)
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sparsecomp-")


@lru_cache(maxsize=64)
def _source_key(config: Config) -> str:
    digest = hashlib.sha256("\0".join([*FLAGS, *config.definitions()]).encode())
    for name in _SOURCES:
        digest.update((cuda_folder() / name).read_bytes())
    return digest.hexdigest()[:_KEY_DIGITS]


def file_name(config: Config, tools: Toolchain) -> str:
    """The name of a library, which says all that it was made of."""
    return f"wgmma_sp-{config}-{_source_key(config)}-{_digest(tools.identity)}.so"


def prebuilt(config: Config) -> Path | None:
    """The library that was built with the package, of its present sources and by whatever tools, or None."""
    return _newest(_installed(config, _source_key(config)))


def _kept(config: Config) -> Path | None:
    return prebuilt(config) or _cached(config)


def _installed(config: Config, key: str) -> list[Path]:
    # an editable install keeps compiled files apart from the sources, in another folder of the package's path
    folders = (Path(folder) / _PREBUILT for folder in sparsecomp.__path__)
    return [path for folder in folders for path in sorted(folder.glob(f"wgmma_sp-{config}-{key}-*.so"))]


def _stale_note(missing: Sequence[Config]) -> str:
    """What to say of libraries of these configurations that are installed and were made of other sources."""
    any_key = "[0-9a-f]" * _KEY_DIGITS
    stale = [path.name for config in missing for path in _installed(config, any_key)]
    if not stale:
        return ""
    return f" (ignored, being built of other sources than this package's: {stale[0]}; reinstall sparsecomp)"


def _cached(config: Config) -> Path | None:
    """The library of this source and these tools; on a machine without tools, that of any."""
    tools = toolchain()
    if isinstance(tools, Toolchain):
        path = _folder() / file_name(config, tools)
        return path if path.exists() else None
    return _newest(_folder().glob(f"wgmma_sp-{config}-{_source_key(config)}-*.so"))


def _newest(paths: Iterable[Path]) -> Path | None:
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def _build(config: Config) -> Path:
    tools = toolchain()
    assert isinstance(tools, Toolchain)
    path = _folder() / file_name(config, tools)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        compile_library(config, tools, path)
    except (BackendError, OSError) as error:
        _failed[_source_key(config)] = str(error)
        raise BackendError(f"the cutlass backend cannot be built: {error}") from error
    return path


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _nvcc() -> tuple[Path, str] | str:
    """The first nvcc that is there, with what it says of its version, or the reason why there is none."""
    places = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        places.append(Path(on_path).parent)
    places.append(Path("/usr/local/cuda/bin"))
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        places += [Path(folder) / "cu13" / "bin", Path(folder) / "cuda_nvcc" / "bin"]
    path = next((place / "nvcc" for place in places if (place / "nvcc").is_file()), None)
    if path is None:
        return "finds no nvcc; install the CUDA toolkit or set CUDA_HOME"
    try:
        version = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"cannot run {path}: {error}; reinstall the CUDA toolkit or set CUDA_HOME to another"
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None or (int(release[1]), int(release[2])) < MINIMUM_NVCC:
        got = release[0] if release else "of unknown release"
        wanted = f"{MINIMUM_NVCC[0]}.{MINIMUM_NVCC[1]}"
        return f"needs nvcc {wanted} or newer, and {path} is {got}; set CUDA_HOME to a newer one"
    return path, version


def _cutlass() -> Path | str:
    """The folder with cutlass/cutlass.h, or the reason why there is none."""
    named = os.environ.get("CUTLASS_PATH")
    places = [Path(named) / "include", Path(named)] if named else []
    spec = find_spec("cutlass_library")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        places.append(Path(folder) / "source" / "include")
    place = next((place for place in places if (place / "cutlass" / "cutlass.h").is_file()), None)
    if place is None:
        return (
            "finds no CUTLASS headers; install them with: pip install --no-deps nvidia-cutlass, or set CUTLASS_PATH "
            "to a checkout of CUTLASS"
        )
    numbers = dict(re.findall(r"#define CUTLASS_(MAJOR|MINOR) (\d+)", _version_header(place)))
    version = (int(numbers.get("MAJOR", 0)), int(numbers.get("MINOR", 0)))
    if version < MINIMUM_CUTLASS:
        return (
            f"needs CUTLASS {MINIMUM_CUTLASS[0]}.{MINIMUM_CUTLASS[1]} or newer, and {place} holds "
            f"{version[0]}.{version[1]}; set CUTLASS_PATH to a newer one"
        )
    return place


def _version_header(include: Path) -> str:
    path = include / "cutlass" / "version.h"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile ahead what the given types need; prints the libraries, and returns 1 with the reason if it cannot."""
    parser = argparse.ArgumentParser(prog="python -m sparsecomp.backends.gpu.cutlass.build", description=main.__doc__)
    parser.add_argument("--types", default="bfloat16,float16", help="bfloat16, float16, fp8, fp8-fast; with commas")
    parser.add_argument("--plan", action="store_true", help="print the tools, configurations and file names instead")
    parser.add_argument("--compile", nargs=2, metavar=("CONFIGURATION", "FILE"), help="compile this one, to that file")
    parser.add_argument("--optional", action="store_true", help="a library that cannot be compiled is no failure")
    given = parser.parse_args(arguments)
    try:
        needed = {str(config): config for config in _of_types(given.types)}
        if given.plan:
            print("\n".join(_plan(needed.values())))
        elif given.compile is not None:
            config = needed.get(given.compile[0])
            if config is None:
                raise BackendError(f"{given.compile[0]} is no configuration; use one of {', '.join(needed)}")
            compile_library(config, _found(), Path(given.compile[1]))
        else:
            for config, path in libraries(tuple(needed.values())).items():
                print(f"{config}: {path}")
    except BackendError as error:
        print(f"{'warning' if given.optional else 'error'}: {error}", file=sys.stderr)
        return int(not given.optional)
    return 0


def _of_types(types: str) -> list[Config]:
    kinds = {name: configs(name, name) for name in ("bfloat16", "float16")}
    kinds |= {name: configs("float8_e4m3fn", "bfloat16", name != "fp8") for name in ("fp8", "fp8-fast")}
    names = types.split(",")
    if unknown := [name for name in names if name not in kinds]:
        raise BackendError(f"there are no CUTLASS kernels for the type {unknown[0]!r}; use one of {', '.join(kinds)}")
    return [config for name in names for config in kinds[name]]


def _plan(needed: Iterable[Config]) -> list[str]:
    """For CMake: the compiler, the folder of CUTLASS, then a line for each configuration and its file."""
    tools = _found()
    return [str(tools.nvcc), str(tools.cutlass), *(f"{config} {file_name(config, tools)}" for config in needed)]


def _found() -> Toolchain:
    tools = toolchain()
    if isinstance(tools, str):
        raise BackendError(f"the cutlass backend {tools}")
    return tools


if __name__ == "__main__":
    sys.exit(main())
