"""One kind of file or folder given for another: the sentence says what it is and which command takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsecomp.cli.main import main


@pytest.fixture(autouse=True)
def folders() -> None:
    """A model folder as downloaded, and one that prune wrote."""
    for name in ("plain", "pruned"):
        Path(name).mkdir()
        Path(name, "config.json").write_text("{}")
        save_file({"a.weight": torch.zeros(4, 8, device="cpu")}, f"{name}/model.safetensors", {"format": "pt"})
    Path("pruned/sparsecomp.json").write_text(json.dumps({"patterns": {"a": "2:4"}}))
    Path("empty").mkdir()
    Path("model.onnx").write_bytes(b"")


EXPORT = ["--model", "shop:build", "--inputs", "shop:example", "-o", "x.onnx"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["export", "model.onnx", *EXPORT], '"model.onnx" is an ONNX file already; name the file it was exported from'),
        (["inspect", "pruned"], "is a model folder of dense weights, 1 layer of it pruned, not a packed model"),
        (["inspect", "pruned/"], "sparsecomp compile pruned/ -o packed.safetensors"),
        (["inspect", "plain"], "sparsecomp compile plain --pattern 2:4 --method magnitude -o packed.safetensors"),
        (["inspect", "empty"], '"empty" is a folder, not a packed model; name a file'),
        (["inspect", "plain/model.safetensors"], "dense weights with 1 tensor, not a packed model; pack them with: "),
        (["inspect", "plain/model.safetensors"], "sparsecomp compile plain/ --pattern 2:4 --method magnitude -o"),
        (["export", "pruned/model.safetensors", *EXPORT], "sparsecomp compile pruned/ -o packed.safetensors"),
        (["plan", "plain/config.json"], 'is a file of the model folder "plain"; name the folder: plain/'),
        (["plan", "plain/model.safetensors"], 'is a file of the model folder "plain"; name the folder: plain/'),
    ],
)
def test_what_is_mistaken_for_another_is_named(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "Traceback" not in error
