"""The order of the rooms: each knows those before it in one list and nothing else, and no imports go in a circle."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from tests.house.modules import ROOT, imports, inside, modules

# from the ground up; a room may import the rooms before it
ROOMS = (
    "errors",
    "moved",
    "activations",
    "patterns",
    "reporting",
    "packing",
    "machine",
    "modules",
    "methods",
    "models",
    "backends",
    "nn",
    "swap",
    "files",
    "onnx",
    "engines",
    "planning",
    "pruning",
    "training",
    "compiler",
    "benchmark",
    "cli",
    "__main__",
)

# walls that the order alone does not build: room -> what it may not import, though that lies below it
WALLS: Mapping[str, tuple[str, ...]] = {
    "patterns.grammar": ("torch",),
    "methods": ("sparsecomp.packing", "sparsecomp.machine", "sparsecomp._native"),
    "packing": ("sparsecomp._native",),
    "models": ("sparsecomp.methods", "sparsecomp.packing", "sparsecomp.machine"),
    "nn": ("sparsecomp.models",),
    "files": ("sparsecomp.backends", "sparsecomp.methods", "sparsecomp.machine"),
    "onnx": ("sparsecomp.backends", "sparsecomp.methods", "sparsecomp.machine"),
    "engines": ("sparsecomp.packing", "sparsecomp.backends", "sparsecomp.nn", "sparsecomp.models", "sparsecomp.files"),
    "planning": ("sparsecomp.files", "sparsecomp.onnx"),
    "pruning": ("sparsecomp.packing", "sparsecomp.backends", "sparsecomp.files", "sparsecomp.onnx"),
    "training": ("sparsecomp.files", "sparsecomp.onnx"),
    "benchmark": ("sparsecomp.models", "sparsecomp.pruning", "sparsecomp.files"),
}
# package -> the only rooms and modules that may import it
ONLY_IN: Mapping[str, tuple[str, ...]] = {
    "transformers": ("cli", "files", "training.trainer"),
    "onnx": ("onnx", "cli.export", "engines"),
    "onnxruntime": ("onnx", "engines"),
    "openvino": ("engines",),
    "onnxscript": ("onnx",),
    "torch.distributed": ("pruning.distributed",),
}
KERNELS_MAY_IMPORT = ("sparsecomp.patterns", "sparsecomp.kernels")


def room(module: str) -> str:
    """The room of a module of the package, "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def broken_edges(module: str, path: Path) -> list[str]:
    """Imports of a file that cross a wall, each as a sentence."""
    return [f"{module}:{line} {sentence}" for line, name in imports(path, module) for sentence in broken(module, name)]


def broken(module: str, name: str) -> Iterator[str]:
    """Why ``module`` may not import ``name``."""
    if inside(name, "bench") and not inside(module, "bench"):
        yield f"imports {name}; what is installed must not need what maintainers run"
    if inside(module, "sparsecomp.kernels"):
        if inside(name, "sparsecomp.") or (
            inside(name, "sparsecomp")
            and name != "sparsecomp"
            and not any(inside(name, allowed) for allowed in KERNELS_MAY_IMPORT)
        ):
            yield f"imports {name}; kernels/ may only know sparsecomp.patterns"
        return
    if inside(module, "bench"):
        return
    own, other = room(module), room(name) if inside(name, "sparsecomp") else ""
    inner = module.removeprefix("sparsecomp.")
    climbs = other in ROOMS and own in ROOMS and ROOMS.index(other) > ROOMS.index(own)
    if climbs:
        yield f"imports {name}; the room {other} is above {own}"
    for prefix, walls in WALLS.items():
        if inside(inner, prefix):
            yield from (f"imports {name}; {prefix} must not know {wall}" for wall in walls if inside(name, wall))
    for package, places in ONLY_IN.items():
        if inside(name, package) and not any(inside(inner, place) for place in places):
            yield f"imports {name}; only {', '.join(places)} may"


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_no_import_crosses_a_wall(module: str, path: Path) -> None:
    assert broken_edges(module, path) == []


def test_every_file_has_a_room() -> None:
    installed = (module for module, _ in modules() if not inside(module, "bench"))
    homeless = {module for module in installed if room(module) not in (*ROOMS, "", "kernels")}
    assert homeless == set(), "name the room in ROOMS, at the place of what it may know"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sparsecomp.packing.format", "from sparsecomp.backends.registry import choose"),
        ("sparsecomp.packing.format", "from ..backends import registry"),
        ("sparsecomp.packing.format", "def f():\n    from sparsecomp import backends"),
        ("sparsecomp.methods.scores", "import sparsecomp.packing.bits"),
        ("sparsecomp.onnx.export", "import importlib\nimportlib.import_module('sparsecomp.backends.cpu')"),
        ("sparsecomp.planning.measure", "from sparsecomp.benchmark import sweep"),
        ("sparsecomp.engines.registry", "from sparsecomp.backends.registry import choose"),
        ("sparsecomp.planning.measure", "import openvino"),
        ("sparsecomp.benchmark.sweep", "from bench.gpu import cases"),
        ("sparsecomp.kernels.decode", "import bench.minilm"),
        ("sparsecomp.nn.linear", "from sparsecomp.models import layers"),
        ("sparsecomp.planning.planner", "from sparsecomp.pruning import prune"),
        ("sparsecomp.pruning.model", "import transformers"),
        ("sparsecomp.kernels.decode", "from sparsecomp.packing import bits"),
    ],
)
def test_the_scan_sees_a_broken_edge(module: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text(source)
    assert broken_edges(module, path)


def drawn() -> list[list[str]]:
    """The rooms in the picture of the page, floor by floor from the ground up."""
    picture = (ROOT / "docs" / "design" / "architecture.svg").read_text()
    floors: dict[int, list[str]] = {}
    for line in picture.splitlines():
        if (place := re.match(r'<text x="24" y="(\d+)">', line)) is not None:
            floors[int(place[1])] = re.findall(r'<tspan class="room">(\w+)</tspan>', line)
    return [floors[height] for height in sorted(floors, reverse=True)]


def test_the_picture_shows_the_rooms_in_their_order() -> None:
    floors = drawn()
    rooms = [name for floor in floors for name in floor]
    assert sorted(rooms) == sorted(ROOMS), "docs/design/architecture.svg draws each room of ROOMS once"
    # rooms of one floor stand in any order
    for below, above in pairwise(floors):
        assert max(map(ROOMS.index, below)) < min(map(ROOMS.index, above)), f"{above} stand above {below} in ROOMS"


def test_the_page_names_files_that_there_are() -> None:
    page = (ROOT / "docs" / "design" / "architecture.md").read_text()
    named = set(re.findall(r"`(\w+(?:/\w+)+(?:\.\w+)?/?)`", page))
    assert {"packing/format.py", "tests/cli/", "csrc/cpu"} <= named
    assert [each for each in named if not (ROOT / each).exists() and not (ROOT / "sparsecomp" / each).exists()] == []


def circles(known: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other by imports."""
    reached: dict[str, set[str]] = {}
    for start in known:
        seen: set[str] = set()
        waiting = list(known[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += known.get(name, ())
        reached[start] = seen
    groups = {
        frozenset(other for other in reached if other in reached[name] and name in reached[other]) for name in reached
    }
    return sorted(sorted(group) for group in groups if group)


def test_no_imports_go_in_a_circle() -> None:
    paths = dict(modules())
    known = {
        module: {name for _, name in imports(path, module) if name in paths and name not in (module, "sparsecomp")}
        for module, path in paths.items()
        if module != "sparsecomp"
    }
    # a package that gives out names of its own files is no circle with them
    for module, names in known.items():
        names -= {other for other in names if inside(module, other)}
    assert circles(known) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
