"""What the runs found: tables for each net, bars that are met or not, and the result as a file.

Takes rows of results, gives text and JSON values. Makes no run.
"""

from __future__ import annotations

import datetime
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.lottery.results import CHOOSING_SEED, Results, Row
from bench.lottery.runs import EARLY, Run
from sparsecomp.benchmark.machine import describe
from sparsecomp.machine.device import detect
from sparsecomp.reporting.terminal import table
from sparsecomp.training.rewind import CONTROLS

FORMAT = 1
Rows = Mapping[str, Sequence[Row]]
# run, the run it is held against, and how many points it may be worse, or must be better
_BARS = (
    ("sgd/2:4-sr-ste", "sgd/dense", -0.3),
    ("sgd/4:8-sr-ste", "sgd/2:4-sr-ste", 0.0),
    ("adam/2:4-step", "adam/2:4-sr-ste", 0.0),
    ("grown/rigl-0.1", "grown/static-0.1", 0.0),
    ("grown/rigl-0.05", "grown/static-0.05", 0.0),
)
_OVER_RANDOM = 1.0


def collect(results: Results, runs: Mapping[str, Run], seeds: Sequence[int]) -> dict[str, Any]:
    """Every result there is as JSON values, with the machine that reads them."""
    rows = []
    for run in runs.values():
        found = (results.read(run.name, seed) for seed in ([CHOOSING_SEED] if run.kind == "rate" else seeds))
        rows += [{"net": run.net, "kind": run.kind, **row} for row in found if row is not None]
    return {
        "format": FORMAT,
        "kind": "lottery",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(detect("cpu"), [torch.get_num_threads()]),
        "settings": {"seeds": list(seeds), "threads": torch.get_num_threads(), "early": EARLY},
        "rows": rows,
    }


def default_path(result: Mapping[str, Any], folder: Path) -> Path:
    """<folder>/<date>-<cpu>-lottery.json."""
    cpu = re.sub(r"[^a-z0-9]+", "-", str(result["machine"]["cpu"]).lower()).strip("-")
    return folder / f"{result['date']}-{cpu}-lottery.json"


def summary(result: Mapping[str, Any]) -> str:
    """The tables and the bars of each net."""
    if not result["rows"]:
        return "no result yet"
    parts = []
    for net in dict.fromkeys(row["net"] for row in result["rows"]):
        rows: dict[str, list[Row]] = {}
        for row in result["rows"]:
            if row["net"] == net:
                rows.setdefault(row["run"].partition("/")[2], []).append(row)
        told = f"{result['machine']['cpu']}, {result['date']}"
        parts += [each for each in (_plain(net, rows, told), _tickets(net, rows), _kernels(net, rows)) if each]
        parts += ["\n".join(bars(net, rows))]
    return "\n\n".join(parts)


def _plain(net: str, rows: Rows, told: str) -> str:
    """One line for each run that is one training."""
    lines = []
    for name, found in rows.items():
        if found[0]["kind"] in ("rate", "plain"):
            against = f"{name.partition('/')[0]}/dense"
            if name.startswith("grown/rigl"):
                against = name.replace("rigl", "static")
            gap = gap_of(rows, name, against) if found[0]["kind"] == "plain" and name != against else None
            seeds = " ".join(str(row["seed"]) for row in found)
            judged, tested = ([row[part] for row in found] for part in ("validation", "test"))
            each_seed = " ".join(f"{100 * each:.2f}" for each in tested)
            scores = [_percent(judged), _percent(tested), each_seed, "" if gap is None else f"{gap:+.2f}"]
            lines.append([name, f"{found[0]['rate']:g}", seeds, *scores])
    title = f"{net}: accuracy in %, means over seeds (± their standard deviation); gap to dense, or to static; {told}"
    return (
        table(["run", ">rate", "seeds", ">valid.", ">test", "test by seed", ">gap"], lines, title=title)
        if lines
        else ""
    )


def _tickets(net: str, rows: Rows) -> str:
    """One line for each round, and the controls of the last."""
    found = {name: rows[f"ticket/{name}"] for name in ("weights", "learning-rate") if f"ticket/{name}" in rows}
    if not found:
        return ""
    rounds = next(iter(found.values()))[0]["rounds"]
    lines = []
    for index, each in enumerate(rounds):
        scores = {name: _percent([row["rounds"][index]["test"] for row in made]) for name, made in found.items()}
        lines.append([f"{100 * each['density']:.1f}", scores.get("weights", ""), scores.get("learning-rate", "")])
    for control in CONTROLS if "weights" in found else ():
        lines.append(
            [f"{control} mask" if control == "random" else control, control_scores(found["weights"], control), ""]
        )
    counts = ", ".join(f"{name} on {len(made)} seeds" for name, made in found.items())
    return table(
        ["% kept", ">weights", ">learning rate"], lines, title=f"{net}: test accuracy of tickets in %; {counts}"
    )


def control_scores(rows: Sequence[Row], control: str) -> str:
    """Test accuracy of a control."""
    return _percent([row["controls"][control]["test"] for row in rows])


def _kernels(net: str, rows: Rows) -> str:
    found = rows.get("ticket/kernel", [])
    if not found:
        return ""
    lines = [
        [
            kind,
            *(
                _numbers([row["kernels"][kind][name] for row in found])
                for name in ("effective_rank", "alignment", "centred_alignment")
            ),
        ]
        for kind in found[0]["kernels"]
    ]
    title = f"{net}: tangent kernel before training, {found[0]['images']} images, {len(found)} seeds"
    return table(["start", ">effective rank", ">alignment", ">centred"], lines, title=title)


def bars(net: str, rows: Rows) -> list[str]:
    """What was hoped for, and whether it came, for all that was run."""
    lines = []
    for name, against, least in _BARS:
        gap = gap_of(rows, name, against)
        if gap is not None:
            met = gap >= least and (gap > 0 or not name.startswith("grown/"))
            lines.append(
                f"{net}/{name} less {against}: {gap:+.2f} points; bar {least:+.1f}: {'met' if met else 'MISSED'}"
            )
    made = rows.get("ticket/weights", [])
    if made:
        gap = 100 * statistics.mean(row["test"] - row["controls"]["random"]["test"] for row in made)
        met = gap >= _OVER_RANDOM
        lines.append(
            f"{net}/ticket less a random mask: {gap:+.2f} points; bar +{_OVER_RANDOM}: {'met' if met else 'MISSED'}"
        )
    return lines


def gap_of(rows: Rows, name: str, against: str) -> float | None:
    """The mean over seeds of the difference of two runs on the test, in points; None where no seed has both."""
    twins = {row["seed"]: row["test"] for row in rows.get(against, [])}
    gaps = [row["test"] - twins[row["seed"]] for row in rows.get(name, []) if row["seed"] in twins]
    return 100 * statistics.mean(gaps) if gaps else None


def _percent(shares: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(shares):.2f}"
    return f"{mean} ±{100 * statistics.stdev(shares):.2f}" if len(shares) > 1 else mean


def _numbers(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3g}"
    return f"{mean} ±{statistics.stdev(values):.1g}" if len(values) > 1 else mean
