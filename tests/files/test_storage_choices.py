"""What a plan had found for a layer is kept in the file and followed by the layer that is loaded, where it can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsecomp as sc
from sparsecomp.backends.choice import Choice
from sparsecomp.backends.reference import ReferenceBackend
from sparsecomp.errors import FormatError
from sparsecomp.files import container
from sparsecomp.files.storage import inspect, load, save
from sparsecomp.methods.weight import prune_weight
from sparsecomp.nn import SparseLinear
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import FLOAT, INT8
from tests.files.saved_models import packed

PATTERN = parse("2:4")
PLANNED = Choice(PATTERN, FLOAT, "reference", 8)
KEY = "sparsecomp.choices"


def layer_of(choice: Choice) -> SparseLinear:
    torch.manual_seed(0)
    return SparseLinear.of_choice(prune_weight(torch.randn(4, 16), choice.pattern).weight, choice, torch.ones(4))


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def rewrite(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Change the header of a file and its checksum with it, as a writer of another version may."""
    tensors: dict[str, Tensor] = load_file(path)
    header = header_of(path)
    change(header)
    header["sparsecomp.crc32"] = container._checksum(tensors, header)
    save_file(tensors, path, metadata=header)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save(nn.Sequential(layer_of(PLANNED), packed(1)), tmp_path / "m")
    return tmp_path / "m"


def test_layers_follow_what_was_planned_for_them(path: Path) -> None:
    assert json.loads(header_of(path)[KEY]) == {"0": {"backend": "reference", "dense_above": 8}}
    model = load(path, into=nn.Sequential(nn.Linear(16, 4), nn.Linear(16, 4)))
    first, second = model
    assert first.choice == PLANNED and first.kernel.backend == "reference"
    assert "from 8 rows on" in first.explain(8).reason and first.explain(1).reason.startswith("the fastest")
    assert second.choice == Choice(PATTERN)
    save(model, path.with_name("again"))
    assert header_of(path.with_name("again"))[KEY] == header_of(path)[KEY]


def test_another_backend_takes_its_place_where_it_does_not_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReferenceBackend, "supports", lambda self, request: "cannot")
    layer = load(path, into=nn.Sequential(nn.Linear(16, 4), nn.Linear(16, 4)))[0]
    assert layer.kernel.backend != "reference" and layer.dense_above is None
    rewrite(path, lambda header: header.update({KEY: json.dumps({"0": {"backend": "of a later version"}})}))
    layer = load(path, into=nn.Sequential(nn.Linear(16, 4), nn.Linear(16, 4)))[0]
    torch.testing.assert_close(layer(torch.ones(3, 16)), layer_of(PLANNED)(torch.ones(3, 16)))


def test_a_sparse_layer_keeps_a_choice_of_its_own(path: Path) -> None:
    own = Choice(PATTERN, FLOAT, "dense", 3)
    for before, after in ((own, own), (Choice(PATTERN), PLANNED), (Choice(PATTERN, FLOAT, "dense", 3, True),) * 2):
        assert load(path, into=nn.Sequential(layer_of(before), packed(1)))[0].choice == after
    other = load(path, into=nn.Sequential(layer_of(Choice(parse("1:4"), FLOAT, "dense", 3)), packed(1)))[0]
    assert other.choice == Choice(PATTERN, FLOAT, "dense")  # rows were measured with 1:4


def test_the_numbers_of_a_choice_are_those_of_the_weight(tmp_path: Path) -> None:
    layer = SparseLinear.following(nn.Linear(16, 4), Choice(PATTERN, INT8, "dense"), "magnitude")
    save(nn.Sequential(layer), tmp_path / "m")
    for into in (nn.Linear(16, 4), layer_of(Choice(PATTERN, FLOAT, "dense", 3)), SparseLinear(16, 4, quantized=True)):
        assert load(tmp_path / "m", into=nn.Sequential(into))[0].choice == Choice(PATTERN, INT8, "dense")


def test_a_pinned_backend_is_of_the_process_that_pinned_it(tmp_path: Path) -> None:
    save(nn.Sequential(layer_of(Choice(PATTERN, FLOAT, "reference", 8, pinned=True))), tmp_path / "m")
    assert KEY not in header_of(tmp_path / "m")


def test_a_file_without_the_key_is_read_as_before(path: Path) -> None:
    rewrite(path, lambda header: header.pop(KEY))
    layer = load(path, into=nn.Sequential(nn.Linear(16, 4), nn.Linear(16, 4)))[0]
    assert layer.choice == Choice(PATTERN)
    shown = inspect(path)
    assert shown.layers[0].backend is None and "kernel" not in str(shown)


def test_keys_of_later_versions_are_ignored(path: Path) -> None:
    """As versions before this one ignore sparsecomp.choices."""
    rewrite(path, lambda header: header.update({"sparsecomp.later": "[]"}))
    assert load(path, into=nn.Sequential(nn.Linear(16, 4), nn.Linear(16, 4)))[0].choice == PLANNED


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "does not describe its layers"),
        ("[]", "sparsecomp.choices is .*, where an object belongs"),
        ('{"0": 3}', "sparsecomp.choices.0 is 3, where an object belongs"),
        ('{"0": {"dense_above": "8"}}', "sparsecomp.choices.0.dense_above is '8', where a whole number belongs"),
        ('{"0": {"backend": 1}}', "sparsecomp.choices.0.backend is 1, where text belongs"),
        ('{"7": {}}', 'layers that are not in the file: "7"; save it again'),
        (
            '{"0": {"dense_above": 1180591620717411303424}}',
            "dense_above is 1180591620717411303424, where a number of 64",
        ),
    ],
)
def test_damaged_choices_are_named(path: Path, text: str, says: str) -> None:
    rewrite(path, lambda header: header.update({KEY: text}))
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(16, 4))
    with pytest.raises(FormatError, match=f"^{path}: .*{says}"):
        load(path, into=model)
    assert type(model[0]) is nn.Linear


def test_inspect_shows_what_was_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = inspect(path)
    assert (shown.layers[0].backend, shown.layers[0].dense_above) == ("reference", 8)
    assert (shown.layers[1].backend, shown.layers[1].dense_above) == (None, None)
    for width, words in ((120, ["kernel", "reference, dense from 8 rows"]), (60, ["left out at 60 columns"])):
        monkeypatch.setenv("COLUMNS", str(width))
        text = str(shown)
        assert max(map(len, text.splitlines()[2:])) <= width and all(word in text for word in words)


def test_what_compile_followed_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    made = sc.plan(model, "2:4", measure=False)
    sc.compile(model, made, method="magnitude")
    sc.save(model, tmp_path / "m")
    again = sc.load(tmp_path / "m", into=nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)))
    choices = {name: each.choice for name, each in again.named_modules() if isinstance(each, SparseLinear)}
    assert choices == {name: layer.choice for name, layer in made.sparse.items()}
