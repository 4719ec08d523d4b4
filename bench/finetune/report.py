"""What the runs found: a table for each task, and the result as a file that other programs read.

Takes rows of results, gives text and JSON values. Makes no run.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.finetune.judging import mcnemar, unpacked
from bench.finetune.results import Results, Row
from bench.finetune.runs import Run, base_name
from sparsecomp.benchmark.machine import describe
from sparsecomp.machine.device import detect
from sparsecomp.reporting.terminal import table

FORMAT = 1
# the bar for a start: accuracy on validation no further below the dense model's
_NEAR = 0.01


def collect(results: Results, runs: Mapping[str, Run], seeds: Sequence[int]) -> dict[str, Any]:
    """Every result there is at the rate that validation chose, as JSON values, with the machine that reads them."""
    rows = [row for run in runs.values() for row in results.chosen(run, seeds)]
    return {
        "format": FORMAT,
        "kind": "finetune",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(detect("cpu"), [torch.get_num_threads()]),
        "settings": {"seeds": list(seeds), "threads": torch.get_num_threads()},
        "beside": {run.name: run.beside for run in runs.values() if run.beside is not None},
        "tried": [_tried(row) for run in runs.values() for row in results.tried(run)],
        "rows": rows,
    }


def _tried(row: Row) -> Row:
    """What validation said of one rate on the seed that chooses."""
    return {key: row[key] for key in ("run", "task", "seed", "rate", "steps", "validation", "curve")}


def summary(result: Mapping[str, Any]) -> str:
    """A table for each task, and how fast each start comes near the dense model."""
    by_run: dict[str, list[Row]] = {}
    for row in result["rows"]:
        by_run.setdefault(row["run"], []).append(row)
    if not by_run:
        return "no result yet"
    parts = []
    for task in dict.fromkeys(row["task"] for row in result["rows"]):
        names = [name for name, rows in by_run.items() if rows[0]["task"] == task]
        lines = [_line(by_run, name, result["beside"].get(name)) for name in names]
        f1 = [] if task == "movies" else [">F1"]
        columns = ["run", ">rate", ">one-shot", ">valid.", ">test", *f1, ">to dense", "McNemar p"]
        parts.append(table(columns, [_fitting(line, bool(f1)) for line in lines], title=_title(task, result)))
        near = _near([row for row in result["tried"] if row["task"] == task], by_run.get(base_name(task), []))
        if near:
            title = f"{task}: first step with the dense model's accuracy on validation less {_NEAR:.0%}, by rate"
            parts.append(table(["run", ">rate", ">one-shot", ">at the end", ">step", ">of"], near, title=title))
    return "\n\n".join(parts)


def _title(task: str, result: Mapping[str, Any]) -> str:
    seeds = ", ".join(str(each) for each in result["settings"]["seeds"])
    return (
        f"{task}: accuracy in %, means of seeds {seeds} as far as they are there (± their standard deviation); "
        f"{result['machine']['cpu']}, {result['date']}"
    )


def _line(by_run: Mapping[str, Sequence[Row]], name: str, beside: str | None) -> Row:
    rows = by_run[name]
    starts = [row["curve"][0][1] for row in rows if _starts_sparse(row)]
    return {
        "run": name.partition("/")[2],
        "rate": f"{rows[0]['rate']:g}",
        "start": f"{100 * statistics.mean(starts):.1f}" if starts else "",
        "validation": _percent([row["validation"] for row in rows]),
        "test": _percent([row["test"] for row in rows]),
        "f1": _percent([row["test_f1"] for row in rows]),
        **_against(rows, by_run.get(beside or "", [])),
    }


def _starts_sparse(row: Row) -> bool:
    sparse = row["settings"]["sparse"]
    return sparse is not None and sparse["start"] is not None


def _fitting(line: Row, f1: bool) -> list[str]:
    names = ("run", "rate", "start", "validation", "test", *(("f1",) if f1 else ()), "gap", "p")
    return [line[name] for name in names]


def _percent(shares: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(shares):.2f}"
    return f"{mean} ±{100 * statistics.stdev(shares):.2f}" if len(shares) > 1 else mean


def _against(rows: Sequence[Row], dense: Sequence[Row]) -> dict[str, str]:
    """The mean of differences to the dense run of the same seed, in points, and the p-value of each seed."""
    twins = {row["seed"]: row for row in dense}
    pairs = [(row, twins[row["seed"]]) for row in rows if row["seed"] in twins]
    if not pairs:
        return {"gap": "", "p": ""}
    gap = statistics.mean(row["test"] - twin["test"] for row, twin in pairs)
    return {"gap": f"{100 * gap:+.2f}", "p": " ".join(f"{p_value(row, twin):.2f}" for row, twin in pairs)}


def p_value(row: Row, other: Row) -> float:
    """McNemar's exact p-value of two results on the same test."""
    return mcnemar(*(unpacked(each["right"], each["tests"]) for each in (row, other)))[2]


def _near(tried: Sequence[Row], dense: Sequence[Row]) -> list[tuple[str, ...]]:
    """Of runs that were looked at on the way, by rate: where they first come near the dense model of their seed."""
    goals = {row["seed"]: row["validation"] - _NEAR for row in dense}
    lines = []
    for row in tried:
        if len(row["curve"]) > 1 and row["seed"] in goals:
            first = next((str(step) for step, score in row["curve"] if score >= goals[row["seed"]]), "never")
            ends = (f"{100 * score:.1f}" for score in (row["curve"][0][1], row["validation"]))
            lines.append((row["run"].partition("/")[2], f"{row['rate']:g}", *ends, first, str(row["steps"])))
    return lines
