"""Options that are wrong, given twice or would be ignored: refused in a sentence, before any work is done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from sparsecomp.cli import parser
from sparsecomp.cli.main import VERBS, main
from sparsecomp.cli.words import in_words_of_the_command_line

COMPILE = ["compile", "shop:build", "--pattern", "2:4", "--method", "magnitude"]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ([*COMPILE, "--method", "wanda", "-o", "x.safetensors"], "--method"),
        ([*COMPILE, "--batch", "1", "--batch", "8", "-o", "x.safetensors"], "--batch"),
        ([*COMPILE, "-o", "x.safetensors", "-o", "y.safetensors"], "-o/--output"),
        (["prune", "shop:build", "--pattern", "2:4", "--seed", "1", "--seed=2", "-o", "x"], "--seed"),
        (["export", "f", "--model", "shop:build", "--form", "packed", "--form", "dense", "-o", "x.onnx"], "--form"),
        (["inspect", "f.onnx", "--pattern", "2:4", "--pattern", "1:4"], "--pattern"),
        (["plan", "shop:build", "--weights", "a", "--weights", "b"], "--weights"),
        (["bench", "--batches", "1", "--batches", "2"], "--batches"),
    ],
)
def test_an_option_given_twice_is_refused(
    arguments: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"argument {option}: is given twice" in error and "give it once" in error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--batches", "0"], '"0" is no whole number of 1 or more'),
        (["--batches", "-1"], '"-1" is no whole number of 1 or more'),
        (["--batches", "x"], '"x" is no whole number of 1 or more'),
        (["--batches", ","], "is an empty list"),
        (["--cold", "-1"], '"-1" is no whole number of 0 or more'),
        (["--threads", "0"], '"0" is no whole number of 1 or more'),
        (["--shapes", "384xabc"], '"384xabc" is no shape'),
        (["--shapes", "384"], '"384" is no shape'),
        (["--shapes", "0x8"], '"0x8" is no shape'),
        (["--shapes", "8x8x8"], '"8x8x8" is no shape'),
        (["--seconds", "-1"], '"-1" is no number above 0'),
        (["--seconds", "nan"], '"nan" is no number above 0'),
        (["--output", "b2.csv"], 'ends in ".csv"; this file is written as .json'),
        (["--output", "absent/a.json"], 'there is no folder "absent"'),
        (["--plot", "b.png"], "this file is written as .svg"),
    ],
)
def test_arguments_of_bench_are_checked_before_it_measures(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert says in error and "_numbers" not in error and not Path("absent").exists()


def test_a_pattern_of_bench_is_read_before_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--patterns", "2:4+int8,2:5"]) == 2
    assert "M in 2, 4, 8, 16" in capsys.readouterr().err
    assert main(["bench", "--goals", "--cold", "0"]) == 2
    assert "--goals sets cold itself" in capsys.readouterr().err


def test_lists_on_the_command_line() -> None:
    assert parser.shapes("4096x11008, 3x5") == ((4096, 11008), (3, 5))
    assert parser.counts("1,8,1") == (1, 8) and parser.counts_or_none("0") == ()
    assert parser.words("fp32, bf16,fp32") == ("fp32", "bf16")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*COMPILE, "-o", "a.bin"], 'ends in ".bin"; this file is written as .safetensors or .st'),
        ([*COMPILE, "-o", "packed"], "has no ending"),
        ([*COMPILE, "-o", "."], '"." is a folder; name a file in it'),
        ([*COMPILE, "-o", "folder/"], '"folder/" ends in a slash'),
        ([*COMPILE, "-o", ""], "the name is empty"),
        (["export", "f", "--model", "shop:build", "-o", "m.txt"], "this file is written as .onnx"),
    ],
)
def test_a_file_is_written_under_an_ending_that_says_what_it_is(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compile", "shop:build", "--pattern", "5=2:4", "--method", "magnitude"], "matches no layer"),
        (["compile", "shop:holed", "--pattern", "2:4", "--method", "magnitude"], 'layer "2": weight[3, 4] is nan'),
        (["compile", "shop:build", "--pattern", "2:4"], "2 of 2 layers do not fit their pattern"),
        (["compile", "shop:single", "--pattern", "2:4", "--method", "magnitude"], "is one linear layer itself"),
        (["compile", "shop:lazy", "--pattern", "2:4", "--method", "magnitude"], 'whose "0.weight" has no shape yet'),
        ([*COMPILE, "--skip", "9"], 'skip "9" matches no layer'),
    ],
)
def test_cheap_checks_come_before_the_plan(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measuring(*_: object, **__: object) -> None:
        raise AssertionError("the plan was measured")

    monkeypatch.setattr("sparsecomp.planning.measure.measure", measuring)
    assert main([*arguments, "-o", "x.safetensors"]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "AssertionError" not in error, error
    assert not Path("x.safetensors").exists()


PRUNE = ["prune", "shop:build", "--pattern", "2:4", "-o", "x.safetensors"]
WANDA = [*PRUNE, "--method", "wanda", "--calibration", "shop:batches"]
PACK = ["compile", "shop:build", "-o", "x.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*PACK, "--pattern", "2:4", "--method", "magnitud"], 'argument --method: unknown pruning method "magnitud"'),
        ([*PACK, "--pattern", "2:4", "--method", "wanda"], "--calibration module:function"),
        ([*PACK, "--pattern", "2:4", "--calibration", "shop:batches"], "with --method, and for patterns with @a8"),
        ([*PACK, "--pattern", "2of4", "--method", "magnitude"], 'argument --pattern: pattern "2of4" is not understood'),
        ([*PACK, "--pattern", "=2:4", "--method", "magnitude"], 'has no glob before "="'),
        ([*PACK, "--method", "magnitude"], "--pattern is missing"),
        ([*PACK, "--pattern", "2:4", "--pattern", "8:16"], "two patterns are given"),
        ([*COMPILE, "-o", "x.safetensors", "--everywhere", "--batch", "8"], "--batch is for the plan"),
        ([*COMPILE, "-o", "x.safetensors", "--batch-item", "0"], "--batch-item is the part of a calibration batch"),
        (["plan", "shop:build", "--pattern", "2:5"], "M in 2, 4, 8, 16"),
        (["plan", "shop:build", "--batch", "x"], '"x" is no whole number of 1 or more'),
        ([*PRUNE, "--tune", "4"], "needs --blocks"),
        ([*PRUNE, "--tune", "-1"], '"-1" is no whole number of 0 or more; write one such as 100'),
        ([*PRUNE, "--tune", "1,2"], '"1,2" is no whole number of 0 or more; write one such as 100'),
        ([*PRUNE, "--learning-rate", "fast"], '"fast" is no number; write one such as 0.1'),
        ([*PRUNE, "--learning-rate", "0.1"], "--learning-rate is that of --tune and --distill"),
        ([*PRUNE, "--blocks"], "--blocks needs batches"),
        ([*PRUNE, "--distill", "3"], "--distill needs batches"),
        ([*PRUNE, "--held-out", "0.5"], "--held-out needs batches"),
        ([*PRUNE, "--pattern", "*=1:4"], 'two patterns are given for "*"'),
        ([*WANDA, "--held-out", "2"], "leaves nothing to train on"),
        ([*WANDA, "--held-out", "inf"], '"inf" is no number'),
        ([*WANDA, "--batch-item", ","], '"," is an empty list'),
        ([*WANDA, "--distill", "5", "--learning-rate", "-1"], "learning"),
        ([*PRUNE, "--report", "a.txt"], "written as .json, .csv or .html"),
        (
            [*PRUNE, "--report", "a.html/"],
            '"a.html/" ends in a slash, which names a folder; name a file, such as a.html',
        ),
        (["export", "f", "--model", "shop:build", "--form", "thin", "-o", "x.onnx"], "invalid choice"),
        (["inspect", "f.onnx", "--pattern", "2:5"], "M in 2, 4, 8, 16"),
        (["bench", "--dtypes", "fp8"], "fp32 and bf16"),
        (["bench", "--threads", "100000"], "cores"),
    ],
)
def test_a_wrong_option_is_2_with_one_sentence_and_the_short_usage(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    *usage, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and says in error
    assert usage[0].startswith(f"usage: sparsecomp {arguments[0]}") and "Traceback" not in error
    assert len(usage) <= 3 and f"sparsecomp {arguments[0]} --help" in " ".join(" ".join(usage).split())
    assert max(map(len, usage)) <= 80 and not Path("x.safetensors").exists()


def test_layers_that_do_not_fit_are_all_named_with_the_options_that_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "shop:build", "--pattern", "2:4", "-o", "x.safetensors"]) == 1
    error = capsys.readouterr().err
    assert 'such as "0": weight breaks 2:4 in row 0' in error and "--skip '0' --skip '2'" in error
    assert "--method magnitude" in error and "method='magnitude'" not in error


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            'method "wanda" needs calibration data and got none; pass calibration=sc.calibrate(model, batches)',
            'method "wanda" needs calibration data and got none; name batches: --calibration module:function',
        ),
        (
            "needs it; pass gram=cal[name].gram of cal = sc.calibrate(model, batches)",
            "needs it; name batches: --calibration module:function",
        ),
        ("keep it dense, or exclude them with skip=[...]", "keep it dense, or exclude them with --skip NAME"),
        (
            "prune it first, for example with method='magnitude'",
            "prune it first, for example with --method magnitude, or leave it dense with --skip NAME",
        ),
        ('give one, or use where="faster"', "give one, or use no --everywhere"),
        (
            'it has more; say what the model gets with forward=lambda model, batch: model(a=batch["a"], b=batch["b"])',
            "it has more; name what the model takes of it: --batch-item a,b",
        ),
        ("a sentence about nothing of this", "a sentence about nothing of this"),
    ],
)
def test_advice_names_options_and_not_python(text: str, told: str) -> None:
    assert in_words_of_the_command_line(text) == told


def test_inspect_refuses_a_pattern_it_would_not_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMPILE, "--everywhere", "-o", "p.safetensors"]) == 0
    assert main(["inspect", "p.safetensors", "--pattern", "8:16"]) == 2
    assert "leave it out" in capsys.readouterr().err


def test_pruned_and_packed_files_are_not_mistaken_for_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "shop:build", "--pattern", "2:4", "-o", "pruned.safetensors"]) == 0
    assert main([*COMPILE, "--everywhere", "-o", "packed.safetensors"]) == 0
    capsys.readouterr()
    export = ["export", "pruned.safetensors", "--model", "shop:build", "-o", "x.onnx"]
    for arguments in (["inspect", "pruned.safetensors"], export):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert "holds dense weights with 2 pruned layers, not a packed model" in error and "compile MODEL" in error
    assert main(["prune", "shop:build", "--weights", "packed.safetensors", "--pattern", "2:4", "-o", "x"]) == 1
    assert "holds a packed model, and --weights takes dense weights" in capsys.readouterr().err


def test_help_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("", *(module.__name__.rpartition(".")[2] for module in VERBS)):
        assert main([*([verb] if verb else []), "--help"]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparsecomp", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("sparsecomp ")


def test_warnings_of_the_package_are_one_line_without_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    from sparsecomp.cli import main as module

    with module._plain_warnings():
        warnings.warn_explicit(
            "too\nfew rows; pass calibration=sc.calibrate(model, batches)", UserWarning, module.__file__, 1
        )
    assert capsys.readouterr().err == "warning: too few rows; name batches: --calibration module:function\n"


@pytest.mark.slow
def test_a_refused_instruction_set_is_said_by_layers_and_by_doctor() -> None:
    code = (
        "import json, warnings, torch, sparsecomp as sc\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    layers = [sc.SparseLinear(16, 16, '2:4') for _ in range(3)]\n"
        "said = [str(each.message) for each in seen if each.category is RuntimeWarning]\n"
        "print(json.dumps([said, layers[0].kernel.backend]))\n"
    )
    environment = {**os.environ, "SPARSECOMP_ISA": "avx1024"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    said, backend = json.loads(done.stdout)
    from sparsecomp.machine.native import extension

    if isinstance(extension(), str):
        pytest.skip("needs the compiled extension")
    assert backend == "dense" and len(said) == 1 and "SPARSECOMP_ISA=avx1024" in said[0]
    command = [sys.executable, "-m", "sparsecomp", "doctor", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    told = " ".join(done.stdout.split())
    assert done.returncode == 1 and "C++ compiler" not in told
    assert "so sparse layers multiply dense: the compiled extension refuses this machine: SPARSECOMP_ISA" in told


def test_methods_are_known_in_a_process_that_pruned_nothing() -> None:
    calls = [f"choices.check_method({name!r}, 'shop:batches')" for name in ("magnitude", "wanda", "balanced")]
    code = "; ".join(["from sparsecomp.cli import choices", *calls])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
