"""Every verb once on a small model, and what a user sees when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sparsecomp as sc
from sparsecomp.cli import doctor
from sparsecomp.cli.main import VERBS, main


def build() -> torch.nn.Module:
    import shop

    model: torch.nn.Module = shop.build()
    return model


def test_help_of_every_verb_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ["", *(module.__name__.rpartition(".")[2] for module in VERBS)]:
        assert main([*([verb] if verb else []), "--help"]) == 0
        assert f"example: sparsecomp {verb}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert sc.__version__ in capsys.readouterr().out


def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune"]) == 2
    assert main(["no-such-verb"]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith(("usage: sparsecomp", "       ", "error: "))


@pytest.mark.parametrize("verb", ["prune", "compile", "export"])
def test_a_missing_folder_is_named_before_the_work(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    subject = ["packed.safetensors", "--model", "no:model"] if verb == "export" else ["no:model", "--pattern", "2:4"]
    assert main([verb, *subject, "-o", "missing/file"]) == 2
    assert 'there is no folder "missing"; make it first' in capsys.readouterr().err


def test_dense_weights_of_another_model_say_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    save_file({"strange": torch.zeros(1)}, "weights.safetensors")
    assert main(["prune", "shop:build", "--weights", "weights.safetensors", "--pattern", "2:4", "-o", "file"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "strange" in error


def test_prune_writes_dense_weights_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prune", "shop:build", "--pattern", "2:4", "--method", "wanda", "--calibration", "shop:batches"]
    assert main([*arguments, "-o", "pruned.safetensors"]) == 0
    assert "wanda" in capsys.readouterr().out
    from safetensors.torch import load_file

    state = load_file("pruned.safetensors")
    import shop

    calibration = sc.calibrate(build(), shop.batches())
    for name in ("0", "2"):
        expected = sc.prune_weight(
            build().get_submodule(name).weight.detach(), "2:4", method="wanda", gram=calibration[name].gram
        )
        assert torch.equal(state[f"{name}.weight"], expected.weight)


def test_prune_compile_export_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    assert main(["prune", "shop:build", "--pattern", "2:4", "--skip", "2", "-o", "pruned.safetensors"]) == 0
    arguments = ["compile", "shop:build", "--weights", "pruned.safetensors", "--pattern", "2:4", "--only", "0"]
    assert main([*arguments, "--everywhere", "-o", "packed.safetensors"]) == 0
    assert main(["inspect", "packed.safetensors"]) == 0
    assert "2:4" in capsys.readouterr().out
    loaded = sc.load("packed.safetensors", into=build())
    assert isinstance(loaded.get_submodule("0"), sc.SparseLinear)
    x = torch.randn(5, 32)
    dense = build()
    weight = sc.prune_weight(dense.get_submodule("0").weight.detach(), "2:4").weight
    dense.get_submodule("0").weight.data.copy_(weight)
    torch.testing.assert_close(loaded(x), dense(x))

    arguments = ["export", "packed.safetensors", "--model", "shop:build", "--inputs", "shop:example"]
    assert main([*arguments, "-o", "model.onnx"]) == 0
    assert main(["inspect", "model.onnx"]) == 1  # layer 2 is dense
    assert "1 of 2 weights fit 2:4" in capsys.readouterr().out
    import onnxruntime

    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), dense(x).detach(), rtol=1e-4, atol=1e-5)


def test_compile_prints_the_plan_before_it_packs(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["compile", "shop:build", "--pattern", "2:4", "--method", "magnitude", "-o", "packed.safetensors"])
    out = capsys.readouterr()
    assert "48x32" in out.out
    # a plan may leave every layer of so small a model dense; the file is written either way
    assert code == 0
    assert Path("packed.safetensors").is_file()


def test_compile_refuses_weights_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "shop:build", "--pattern", "2:4", "--everywhere", "-o", "packed.safetensors"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "2:4" in error
    assert error.count("\n") == 1
    assert not Path("packed.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["prune", "shop", "--pattern", "2:4", "-o", "x"], "module:function"),
        (["prune", "nowhere:build", "--pattern", "2:4", "-o", "x"], "cannot be imported"),
        (["prune", "shop:nothing", "--pattern", "2:4", "-o", "x"], 'no function "nothing"'),
        (["prune", "shop:number", "--pattern", "2:4", "-o", "x"], "must return an nn.Module"),
        (["prune", "shop:broken", "--pattern", "2:4", "-o", "x"], "ValueError: the shop is closed"),
        (["prune", "shop:build", "--pattern", "2:4", "--calibration", "shop:number", "-o", "x"], "iterable"),
        (["prune", "shop:build", "--weights", "shop.py", "--pattern", "2:4", "-o", "x"], "do not fit"),
        (["prune", ".", "--pattern", "2:4", "-o", "x"], "config.json"),
        (["inspect", "shop.py"], "shop.py"),
        (["inspect", "absent.safetensors"], "absent.safetensors"),
        (["export", "absent.safetensors", "--model", "shop:build", "-o", "x.onnx"], "absent.safetensors"),
        (["prune", "shop:build", "--weights", "absent.st", "--pattern", "2:4", "-o", "x"], "there is no such file"),
        (["prune", "shop:build", "--weights", ".", "--pattern", "2:4", "-o", "x"], "is a folder"),
        (["prune", "shop:wants", "--pattern", "2:4", "-o", "x"], "wants width, depth; it must take no argument"),
        (["prune", "shop:Wants", "--pattern", "2:4", "-o", "x"], "wants width; it must take no argument"),
        (["prune", "shop:kind", "--pattern", "2:4", "-o", "x"], "returned the class Sequential"),
        (["prune", "shop:number", "--pattern", "2:4", "-o", "x"], "returned an int"),
        (["prune", "shop:broken", "--pattern", "2:4", "-o", "x"], 'factory "shop:broken" raised'),
        (["prune", "torn:build", "--pattern", "2:4", "-o", "x"], "it raises SyntaxError"),
        (["prune", "bert-base-uncased", "--pattern", "2:4", "-o", "x"], "download a Hugging Face id first"),
        (["prune", "google-bert/bert-base", "--pattern", "2:4", "-o", "x"], "hf download google-bert/bert-base"),
        (["prune", "models/model.pt", "--pattern", "2:4", "-o", "x"], "wrap torch.load"),
        (["prune", "model.safetensors", "--pattern", "2:4", "-o", "x"], "give the file with --weights"),
        (["prune", "./absent/", "--pattern", "2:4", "-o", "x"], "there is no such folder"),
        (["prune", "shop:build", "--auto-class", "AutoModel", "--pattern", "2:4", "-o", "x"], "leave it out"),
    ],
)
def test_an_error_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "inspect", "absent"], ["inspect", "absent", "--debug"]):
        assert main(arguments) == 1
        assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", stop)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.slow
def test_doctor_names_every_backend_and_each_reason_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsecomp.backends.registry import backends

    monkeypatch.setenv("SPARSECOMP_CACHE", "off")  # a path would stay whole, however long
    code = main(["doctor", "--quick"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    told, reasons = " ".join(out.split()), {name: each.missing() for name, each in backends().items()}
    assert all(name in told for name in reasons)
    assert all(told.count(" ".join(reason.split())) == 1 for reason in set(reasons.values()) - {None})
    for name in [name for name, reason in reasons.items() if reason is None]:
        assert next(line for line in out.splitlines() if line.split()[:1] == [name]).split() == [name, "ready"]
    compiled = {name for name, reason in reasons.items() if reason is None} - {"dense", "reference"}
    assert code == (0 if compiled else 1)


@pytest.mark.slow
def test_bench_writes_a_result_that_its_report_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsecomp.benchmark.report import comparisons, in_int8, load_result

    arguments = ["bench", "--shapes", "24x40", "--batches", "1,3", "--cold", "0", "--dtypes", "fp32,bf16"]
    assert main([*arguments, "--threads", "1", "--seconds", "0.01", "--output", "r.json", "--plot", "p.svg"]) == 0
    out = capsys.readouterr().out
    result = load_result(Path("r.json"))
    found = list(comparisons(result))
    assert len(found) == 2 * 2 * 3  # batches, dtypes, patterns
    for each in found:
        rows = [row for row in result["rows"] if row["pattern"] is None and row["batch"] == each.row["batch"]]
        same = [row for row in rows if in_int8(row) == in_int8(each.row)]
        fastest = min(row["us"] for row in same if row["dtype"] == each.row["dtype"])
        assert each.speedup == pytest.approx(fastest / each.row["us"])
        assert f"{each.speedup:.2f}x" in out
    assert json.loads(Path("r.json").read_text())["machine"]["peaks"]["1"]["fp32_gflops"] > 0
    assert Path("p.svg").read_text().count("<circle") == 2 * 3  # batches, patterns
