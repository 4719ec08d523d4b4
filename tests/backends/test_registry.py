"""Which backends there are, what they answer, and that the choice follows the answers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparsecomp.backends import registry
from sparsecomp.backends.choice import Choice
from sparsecomp.backends.registry import backends, choose, explain, prepared
from sparsecomp.errors import BackendError, PatternError
from sparsecomp.machine.native import native
from sparsecomp.machine.request import Request
from sparsecomp.methods.weight import prune_weight
from sparsecomp.packing.format import pack
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import FLOAT


def request_of(pattern: str = "2:4", dtype: torch.dtype = torch.float32, device: str = "cpu") -> Request:
    return Request(parse(pattern), (32, 64), dtype, device, 8)


def test_backends_are_named_as_they_are_listed() -> None:
    gpu = ["cusparselt", "semi_structured", "triton_vnm", "triton", "gluon"]
    gpu += ["cutlass", "cutlass_fp8", "cutlass_fp8_tensor", "triton_block", "gluon_tf32", "gluon_int8", "gluon_wgmma"]
    assert list(backends()) == [*gpu, "cpu", "dense", "reference"]
    assert all(backend.name == name for name, backend in backends().items())


@pytest.mark.slow
def test_asking_imports_no_optional_package() -> None:
    code = (
        "import sys; from sparsecomp.backends.registry import backends; backends(); "
        "sys.exit(', '.join(m for m in ('triton', 'cupy', 'onnx', 'transformers') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("pattern", ["2:4", "8:16", "64:2:8", "2:4@v4", "block16x16:0.5", "block3x3:0.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_choice_is_the_first_without_a_reason(pattern: str, dtype: torch.dtype) -> None:
    answers = explain(request_of(pattern, dtype))
    assert [name for name, _ in answers] == list(backends())
    first = next(name for name, reason in answers if reason is None)
    assert choose(request_of(pattern, dtype)) == first
    kernel_there = not isinstance(native(), str) and pattern != "block3x3:0.5"  # its blocks are padded too much
    assert first == ("cpu" if kernel_there else "dense")


def test_a_request_that_nothing_runs_names_every_reason() -> None:
    with pytest.raises(BackendError, match=r"int8.*cpu: .*dense: .*reference: .*torch\.float32"):
        choose(request_of(dtype=torch.int8))


def test_missing_extension_is_a_reason_and_dense_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsecomp.backends.cpu.native", lambda: "the compiled extension is not there (test)")
    assert dict(explain(request_of()))["cpu"] == "the compiled extension is not there (test)"
    assert choose(request_of()) == "dense"
    with pytest.raises(BackendError, match="not there"):
        registry.backends()["cpu"].adopt((), parse("2:4"), (8, 8), torch.float32, FLOAT)


@pytest.mark.slow
def test_unknown_isa_is_a_reason_not_a_traceback() -> None:
    code = "from sparsecomp.backends.registry import backends; print(backends()['cpu'].missing())"
    if isinstance(native(), str):
        pytest.skip("needs the compiled extension")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"SPARSECOMP_ISA": "z80", "PATH": ""},
        check=True,
    )
    assert "refuses this machine" in done.stdout and "z80" in done.stdout


@pytest.mark.parametrize("wanted", [None, "cpu", "reference", "dense"])
def test_a_dense_weight_that_fits_gives_the_layout_of_its_packed_form(wanted: str | None) -> None:
    weight = prune_weight(torch.randn(24, 40), "2:4").weight
    pattern = parse("2:4")
    choice = Choice.asked(pattern, FLOAT, wanted)
    made, twin = prepared(weight, choice), prepared(pack(weight, pattern), choice)
    assert (made.backend, made.shape, made.dtype) == (twin.backend, (24, 40), torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(made.tensors, twin.tensors, strict=True))
    with pytest.raises(PatternError, match=r"row 0, group 0"):
        prepared(torch.ones(24, 40), choice)
