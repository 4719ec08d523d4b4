"""Every example runs in a process of its own, as a reader types it, and prints what its first lines promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {path.name: path for path in sorted((ROOT / "examples").glob("[0-9]*.py"))}


def output(name: str) -> str:
    """What an example prints, without what it says on standard error; skips where the example itself does."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "SPARSECOMP_CACHE": "off"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES[name])], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode == 1 and done.stderr.startswith("skipped: "):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiled(said: str) -> None:
    packed = re.search(r"^packed (\d) of 2 layers$", said, re.MULTILINE)
    assert packed is not None
    assert said.count(": 8.9 MB of 16.8 MB") == int(packed[1])
    difference = re.search(r"largest difference to the pruned model: (\S+)", said)
    assert difference is not None and float(difference[1]) < 1e-4
    assert re.search(r"^batch 8: torch [\d.]+ ms, sparse [\d.]+ ms, [\d.]+x$", said, re.MULTILINE)


def pruned(said: str) -> None:
    magnitude, fast = right(said, "magnitude"), right(said, "fast")
    assert right(said, "dense") > 90 and magnitude < fast - 2
    assert re.search(r"^ blocks\.0\.up +256 x 128 +1:4 +25\.0% ", said, re.MULTILINE)
    assert "its mask keeps 25% of the weights" in said


def recovered(said: str) -> None:
    assert right(said, "pruned to 1:8") < right(said, "distilled") < right(said, "dense") + 1
    assert "every pruned weight is still zero: True" in said


def planned(said: str) -> None:
    assert re.search(r"^ layer +out x in +runs +batch +torch fp32 +sparse +speedup +bound$", said, re.MULTILINE)
    assert len(re.findall(r"^layer \d: (?:dense|\d+:\d+), because ", said, re.MULTILINE)) == 3
    assert re.search(r"^\d+\.\d% of the weights go sparse$", said, re.MULTILINE)


def saved(said: str) -> None:
    assert "the file is 53% of the dense weights" in said
    assert "the same outputs, bit for bit: True" in said
    assert "damaged: ./model.safetensors does not match its checksum" in said


def exported(said: str) -> None:
    found = re.findall(r"^(?:sparse|dense), in .*: largest difference (\S+)$", said, re.MULTILINE)
    assert len(found) == 2 and all(float(each) < 1e-4 for each in found)
    assert "model.onnx: 2 of 2 weights fit 2:4" in said


def encoded(said: str) -> None:
    cosines = re.findall(r"^(magnitude|fast|packed 12 layers): mean cosine (\d\.\d+)", said, re.MULTILINE)
    assert [name for name, _ in cosines] == ["magnitude", "fast", "packed 12 layers"]
    magnitude, fast, packed = (float(value) for _, value in cosines)
    assert 0.3 < magnitude <= fast <= 1 and packed == pytest.approx(fast, abs=2e-3)


def trained_sparse(said: str) -> None:
    dense, shot = right(said, "dense, trained on"), right(said, "4:16+int8@a8, one shot")
    trained = right(said, "4:16+int8@a8, trained")
    assert shot < trained > dense - 1
    # what was trained is what runs
    assert right(said, "packed 6 layers") == pytest.approx(trained, abs=0.2)


def trained_by_the_trainer(said: str) -> None:
    told = re.search(r"^told right: ([\d.]+)%$", said, re.MULTILINE)
    assert told is not None and float(told[1]) > 80
    assert re.search(r"^density 50%, flip rate \d\.\d\d%$", said, re.MULTILINE)
    assert "packed 12 layers" in said


def right(said: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)}: ([\d.]+)% right$", said, re.MULTILINE)
    assert found is not None, said
    return float(found[1])


PROMISES: dict[str, Callable[[str], None]] = {
    "01_compile.py": compiled,
    "02_prune.py": pruned,
    "03_recover.py": recovered,
    "04_plan.py": planned,
    "05_save_and_load.py": saved,
    "06_onnx.py": exported,
    "07_hugging_face.py": encoded,
    "08_train_sparse.py": trained_sparse,
    "09_trainer.py": trained_by_the_trainer,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMISES)
def test_an_example_prints_what_it_promises(name: str) -> None:
    PROMISES[name](output(name))


def test_every_example_is_run() -> None:
    assert EXAMPLES.keys() == PROMISES.keys()


def test_examples_are_listed_in_their_page() -> None:
    page = (ROOT / "examples/README.md").read_text()
    assert all(name in page for name in EXAMPLES)
