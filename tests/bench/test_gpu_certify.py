"""The certification without a GPU: stages and their time limits, the watched sweep, verdicts, and the whole script."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import certify, goals, stages
from bench.gpu.stages import Outcome, Stage, run
from bench.gpu.supervise import Journal, supervise

ROOT = Path(__file__).parents[2]


def _python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def _run(phases: Sequence[Sequence[Stage]], folder: Path, seconds: float = 60.0) -> dict[str, Outcome]:
    return {each.name: each for each in run(phases, time.monotonic() + seconds, folder)}


def test_stages_of_a_phase_run_together_and_phases_in_turn(tmp_path: Path) -> None:
    # each of the two waits for what the other one makes
    meet = "import time, pathlib\npathlib.Path({0!r}).touch()\nwhile not pathlib.Path({1!r}).exists(): time.sleep(0.01)"
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    last = f"import pathlib; assert pathlib.Path({one!r}).exists(); print('seen')"
    phases = [
        [Stage("a", _python(meet.format(one, two)), 30), Stage("b", _python(meet.format(two, one)), 30)],
        [Stage("c", _python(last), 30, needs=("a", "b"))],
    ]
    outcomes = _run(phases, tmp_path)
    assert [outcomes[name].state for name in "abc"] == ["passed"] * 3
    assert (tmp_path / "c.log").read_text() == "seen\n"


def test_a_failure_costs_only_what_needs_it(tmp_path: Path) -> None:
    phases = [
        [Stage("bad", _python("import sys; print('why'); sys.exit(3)"), 30)],
        [Stage("after", _python("pass"), 30, needs=("bad",)), Stage("other", _python("pass"), 30)],
        [Stage("absent", ("/no/such/program",), 30), Stage("unfit", _python("pass"), 30, skip="has no GPU")],
        [Stage("killed", _python("import os; os.kill(os.getpid(), 9)"), 30)],
    ]
    outcomes = _run(phases, tmp_path)
    assert (outcomes["bad"].state, outcomes["bad"].reason, outcomes["bad"].fault) == ("failed", "exit status 3", True)
    assert str(outcomes["after"]).split() == ["after", "not", "run", "0", "s", "needs", "bad"]
    assert outcomes["other"].state == "passed"
    assert "cannot be run" in outcomes["absent"].reason and outcomes["absent"].fault
    assert outcomes["unfit"].reason == "has no GPU" and not outcomes["unfit"].fault
    assert outcomes["killed"].reason == "signal 9"


def test_nothing_runs_on_after_the_end_and_later_phases_keep_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_LEAST", 1.0)
    begin = time.monotonic()
    phases = [
        [Stage("long", _python("import time; time.sleep(60)"), 60)],
        [Stage("short", (*_python("import sys; print(sys.argv[1])"), "{seconds}"), 60, least=3.0)],
    ]
    outcomes = _run(phases, tmp_path, 5.0)
    assert (outcomes["long"].state, outcomes["long"].fault) == ("cut short", True)
    assert outcomes["short"].state == "passed" and 2 <= int((tmp_path / "short.log").read_text()) <= 3
    assert time.monotonic() - begin < 5
    assert _run([[Stage("late", _python("pass"), 60)]], tmp_path, 0.5)["late"].reason == "no time was left"


def test_the_children_of_a_stage_end_with_it(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', \"import time; time.sleep(1); open({str(child)!r}, 'w')\"])\n"
    )
    assert _run([[Stage("parent", _python(code), 30)]], tmp_path)["parent"].state == "passed"
    time.sleep(1.5)
    assert not child.exists()


def test_a_judge_turns_a_status_into_words(tmp_path: Path) -> None:
    stage = Stage(
        "judged", _python("print('odd')"), 30, judge=lambda status, log: ("failed", f"{status} {log.strip()}", True)
    )
    assert _run([[stage]], tmp_path)["judged"].reason == "0 odd"


WORKER = """
import json, os, sys, time
path = sys.argv[1]
def add(**entry):
    with open(path, "a") as file: file.write(json.dumps(entry) + "\\n")
entries = [json.loads(line) for line in open(path)] if os.path.exists(path) else []
banned = {e["banned"] for e in entries if "banned" in e}
done = {e["done"] for e in entries if "done" in e}
for case in ("one", "two"):
    if case in done: continue
    for engine in ("good", "faulty", "hanging"):
        if engine in banned: continue
        add(at=[engine, case])
        if engine == "faulty" and case == "two": os._exit(3)
        if engine == "hanging": time.sleep(60)
        add(row=[engine, case])
    add(done=case)
"""


def test_engines_that_crash_or_hang_are_named_and_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    supervise([*_python(WORKER), str(journal.path)], journal, time.monotonic() + 60, quiet=1.0)
    assert journal.of("failed") == [
        "hanging, one: the process said nothing for 1 s and was ended; left out from here on",
        "faulty, two: the process ended with status 3; left out from here on",
    ]
    assert journal.of("done") == ["one", "two"]
    # the case in which one hung is begun again
    assert journal.of("row") == [[e, "one"] for e in ("good", "faulty") * 2] + [["good", "two"], ["good", "two"]]


def test_a_case_that_fails_with_all_engines_in_turn_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    code = WORKER.replace('("good", "faulty", "hanging")', '("good",)')
    code = code.replace(
        "    add(done=case)", '    add(at=["", case])\n    if case == "one": os.abort()\n    add(done=case)'
    )
    supervise([*_python(code), str(journal.path)], journal, time.monotonic() + 60)
    assert journal.of("failed") == [
        "all engines in turn, one: the process was ended by signal 6; left out from here on"
    ]
    assert journal.of("done") == ["one", "two"]


def test_a_worker_that_says_nothing_at_all_is_not_begun_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    supervise(_python("import sys; sys.exit(1)"), journal, time.monotonic() + 60)
    assert journal.of("failed") == ["the measuring process ended with status 1"]
    late = Journal(tmp_path / "late")
    late.add(at=["good", "one"])
    supervise(_python("import time; time.sleep(60)"), late, time.monotonic() - 60)
    assert late.of("failed") == ["the measuring process ran out of time"]
    with late.path.open("a") as file:
        file.write('{"failed": "cut')
    assert len(late.read()) == 2


def _rows(engine: str, sparse: bool, us: float, tokens: int, side: int = 64) -> dict[str, Any]:
    return {"out": side, "in": side, "tokens": tokens, "dtype": "x", "engine": engine, "sparse": sparse, "us": us}


def test_verdicts() -> None:
    bf16 = {
        "machine": {"l2_mib": 1},
        "not measured": ["1x1, 1 tokens"],
        "packing": [{"side": 4096, "default": 900.0}, {"side": 8192, "default": 3000.0}],
        "rows": [
            *(_rows("cublas", False, 10.0, tokens) for tokens in (1, 256, 2048, 4096)),
            *(_rows("cusparselt", True, 6.0, tokens) for tokens in (2048, 4096)),
            _rows("sparsecomp a", True, 5.0, 2048),
            _rows("sparsecomp a", True, 8.0, 4096),
            _rows("sparsecomp a", True, 20.0, 256),
            _rows("sparsecomp a", True, 1.0, 1),  # in L2
            _rows("cublas", False, 10.0, 16, 2048),
            _rows("sparsecomp a", True, 8.0, 16, 2048),
        ],
    }
    compiled = {"rows": [_rows("nn.Linear", False, 10.0, 1), _rows("sparsecomp compiled", True, 10.5, 1)]}
    found = goals.verdicts({"bf16": bf16, "compiled": compiled})
    assert [each.state for each in found] == ["met", "met", "MISSED", "open", "MISSED", "MISSED", "met"]
    assert str(found[0]) == (
        "met     bf16, M >= 2048, geometric mean: 1.581x, wanted at least 1.35x (2 cases, 1 of the sweep not reached)"
    )
    assert "0.750x at 64x64, 4096 tokens, sparsecomp a" in str(found[2])
    assert "1.250x" in str(found[4]) and "1 cases" in str(found[4])
    assert "0.952x" in str(found[5])
    assert {each.state for each in goals.verdicts({})} == {"open"}


def test_what_pytest_said_is_judged() -> None:
    judge = certify._judge_tests
    assert judge(0, "..\n12 passed, 3 skipped in 4.20s\n") == ("passed", "12 passed, 3 skipped in 4.20s", False)
    skipped = "SKIPPED [7] tests/a.py:3: no GPU\n7 skipped in 1.00s\n"
    assert judge(0, skipped) == ("not run", "7 skipped in 1.00s (no GPU)", False)
    assert judge(1, "FAILED a\n=== 1 failed, 2 passed in 3.00s ===\n") == (
        "failed",
        "1 failed, 2 passed in 3.00s",
        True,
    )
    assert judge(-9, "") == ("failed", "exit status -9", True)
    sanitizer = certify._judge_sanitizer
    assert sanitizer(9, "Device not supported")[0] == "not run"
    assert sanitizer(9, "2 passed in 1.00s\n========= ERROR SUMMARY: 4 errors\n")[1:] == (
        "2 passed in 1.00s; ERROR SUMMARY: 4 errors",
        True,
    )
    cutlass = certify._judge_cutlass
    missing = (
        "CMake Error: SPARSECOMP_CUTLASS=ON, but the cutlass backend finds\n  no nvcc; install it\nCall Stack (most"
    )
    assert cutlass(1, missing) == ("not run", "the cutlass backend finds no nvcc; install it", False)
    assert cutlass(0, "nvcc wgmma_sp") == ("passed", "", False)
    assert cutlass(0, "total 0") == ("failed", "no library was finished", True)
    assert cutlass(2, "error: the cutlass backend cannot be built") == ("failed", "exit status 2", True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_the_whole_script_where_nothing_can_run(tmp_path: Path) -> None:
    # half a second is no time for any stage; the report is there all the same
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "GPU_MINUTES": "0.01", "GPU_PYTHON": sys.executable}
    work = tmp_path / "checkout"
    work.mkdir()
    shutil.copytree(ROOT / "bench", work / "bench", ignore=shutil.ignore_patterns("results"))
    done = subprocess.run(
        ["bash", "bench/gpu.sh"], cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "certification.json",
        "logs.txt",
        "summary.txt",
    ]
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert text.startswith("NOTHING WAS MEASURED") and "no time was left" in text and text in done.stdout
    whole = json.loads((tmp_path / "out" / "certification.json").read_text())
    assert len(whole["goals"]) == 7 and whole["stages"][0]["name"] == "environment"


def test_a_stage_that_is_ended_takes_the_watched_process_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_LEAST", 1.0)
    monkeypatch.chdir(tmp_path)
    left = tmp_path / "left"
    worker = f"import time; time.sleep(4); open({str(left)!r}, 'w')"
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
        "from bench.gpu.supervise import Journal, supervise\n"
        f"supervise([sys.executable, '-c', {worker!r}], Journal(Path('j')), time.monotonic() + 60)\n"
    )
    assert _run([[Stage("sweep", _python(code), 2.5)]], tmp_path)["sweep"].state == "cut short"
    time.sleep(2.5)
    assert not left.exists()


def test_every_test_that_needs_a_gpu_is_in_a_stage() -> None:
    marked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu\n" in path.read_text() or "mark.gpu)" in path.read_text()
    }
    listed = [stage for phase in certify.phases(16, "9.0") for stage in phase]
    named = {part for stage in listed for part in stage.command if part.startswith("tests/") and part.endswith(".py")}
    assert marked - {Path(__file__).relative_to(ROOT).as_posix()} == named
    # the two halves of one file
    gluon, rest = (stage.command[-1] for stage in listed if stage.name in ("tests gluon", "tests triton"))
    assert {f"not ({gluon})", f"not ({rest})"} & {gluon, rest}
    assert len({stage.name for stage in listed}) == len(listed)
    assert all(set(stage.needs) <= {each.name for each in listed} for stage in listed)


def test_the_time_kept_for_later_stages_leaves_enough_for_the_first() -> None:
    kept = [max(stage.least for stage in phase) for phase in certify.phases(16, "9.0")]
    assert sum(kept) < 9 * 60 - 60
