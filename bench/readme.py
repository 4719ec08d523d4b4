"""The part of README that holds figures, written from result files, so that it says what was measured.

``python -m bench.readme bench/results/FILE.json`` rewrites README.md and docs/limit.svg in place. Files of
other machines may follow; each adds a paragraph.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from sparsecomp.benchmark.plot import limit_plot
from sparsecomp.benchmark.report import Comparison, comparisons, in_int8, load_result
from sparsecomp.engines.base import titled
from sparsecomp.engines.registry import float_engines
from sparsecomp.errors import FormatError
from sparsecomp.reporting.terminal import counted

SHAPE, DTYPE, THREADS = (4096, 4096), "fp32", 1
_HEADLINE_PATTERNS = ("2:4", "8:16", "8:16+int8@a8", "16:16+int8@a8")
_HEADLINE_BATCHES = (1, 8, 32, 128)
_BLOCK = re.compile(r"<!-- result: [^>]* -->\n.*?<!-- end -->", re.DOTALL)


def block(result: dict[str, Any]) -> str:
    """Headline and table in Markdown: the headline shape at every batch, cold weights where they were measured."""
    found = sorted(filter(_is_headline, comparisons(result)), key=lambda each: each.row["batch"])
    machine = result["machine"]
    first = next(each for each in found if each.row["pattern"] == "2:4")
    lines = [
        f"A {SHAPE[0]}x{SHAPE[1]} layer in {DTYPE} at 2:4 and batch {first.row['batch']}, weights from memory: "
        f"**{first.speedup:.2f}x the best dense engine** ({_name(first)}), of {first.row['bound']:.2f}x possible "
        f"({first.row['bound_by']} bound).",
        "",
        f"{machine['cpu']} ({machine['isa']}), one thread, {result['date']}; every row against the fastest of "
        f"{_engines(result)} in the same run{_int8_told(found)}:",
        "",
        *_table(found),
        "",
        *_above_bound(found),
        _overall(result),
        "",
    ]
    return "\n".join(lines)


def rewrite(readme: str, results: dict[str, dict[str, Any]]) -> str:
    """README with its block replaced by what these results, the first above all, say: file names and their contents.

    Raises FormatError if it has none.
    """
    if not _BLOCK.search(readme):
        raise FormatError("README.md has no block between <!-- result: FILE --> and <!-- end -->; put one in")
    first, *others = results.values()
    text = block(first) + "".join(f"\n{_other_machine(result)}\n" for result in others)
    text += f"\n{by_machine(list(results.values()))}\n" if others else ""
    return _BLOCK.sub(lambda _: f"<!-- result: {' '.join(results)} -->\n{text}<!-- end -->", readme)


def _is_headline(each: Comparison) -> bool:
    row = each.row
    if ((row["out"], row["in"]), row["dtype"], row["threads"]) != (SHAPE, DTYPE, THREADS):
        return False
    return row["weights"] == "cold" and row["pattern"] in _HEADLINE_PATTERNS and row["batch"] in _HEADLINE_BATCHES


def _above_bound(found: list[Comparison]) -> list[str]:
    """What to think of a speedup that exceeds its bound, if there is one."""
    if all(each.speedup <= each.row["bound"] for each in found):
        return []
    return [
        "The bound compares two products at this machine's measured peaks. A speedup above it says that the best dense "
        "engine is further from them at that batch, not that sparsity gives more than it can.",
        "",
    ]


def _int8_told(found: list[Comparison]) -> str:
    if all(each.other is None for each in found):
        return ""
    return (
        ", rows with int8 weights and activations (`int8@a8`) against the fastest of their dense int8, which the last "
        "column shows beside the others"
    )


def _table(found: list[Comparison]) -> list[str]:
    beside = any(each.other is not None for each in found)
    last = " over the best of the other numbers |" if beside else ""
    return [
        f"| pattern | batch | weights | sparse | best dense | speedup | 10%-90% | bound |{last}",
        f"| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |{' ---: |' if beside else ''}",
        *(_line(each) + (f" {_over_other(each)} |" if beside else "") for each in found),
    ]


def _over_other(each: Comparison) -> str:
    return "" if each.other is None else f"{each.beside:.2f}x ({titled(each.other['engine'])})"


def _line(each: Comparison) -> str:
    row, (low, high) = each.row, each.spread
    cells = (
        row["pattern"],
        row["batch"],
        row["weights"],
        _time(row["us"]),
        f"{_time(each.dense['us'])} ({_name(each)})",
        f"{each.speedup:.2f}x",
        f"{low:.2f}-{high:.2f}",
        f"{row['bound']:.2f}x",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _name(each: Comparison) -> str:
    return titled(each.dense["engine"])


def _engines(result: dict[str, Any]) -> str:
    """The dense engines that the run had, in words."""
    used = {row["engine"] for row in result["rows"] if row["pattern"] is None and not in_int8(row)}
    return _joined([titled(each.name) for each in float_engines() if each.name in used])


def _time(us: float) -> str:
    return f"{us / 1e3:.2f} ms"


def _other_machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"Another machine, {machine['cpu']} ({machine['isa']}), {result['date']}. {_overall(result)}"


def _overall(result: dict[str, Any]) -> str:
    """One sentence on the patterns of the headline: the means over all their rows, and how often sparse lost."""
    patterns = dict.fromkeys(each.row["pattern"] for each in filter(_is_headline, comparisons(result)))
    found = [each for each in comparisons(result) if each.row["pattern"] in patterns]
    means = _joined([f"{_mean(found, pattern)} for {pattern}" for pattern in patterns])
    verdicts = [each.verdict for each in found]
    slower, unclear = verdicts.count("loses") or "none", verdicts.count("unclear")
    doubt = f" ({unclear} more {'is' if unclear == 1 else 'are'} too noisy to tell)" if unclear else ""
    return (
        f"Over the {len(found)} rows of these patterns in that run ({_values(found, 'out', 'in')} shapes, batch "
        f"{min(each.row['batch'] for each in found)} to {max(each.row['batch'] for each in found)}, "
        f"{' and '.join(dict.fromkeys(each.row['dtype'] for each in found))}, "
        f"{counted(_values(found, 'threads'), 'thread count')}) the geometric mean is {means}; "
        f"dense was faster in {slower} of them{doubt}, and `sc.compile` leaves layers dense where it measures "
        f"that.{_remarks(result)}"
    )


# what results of earlier versions recorded, for a reader who has not met it in a table
_IN_WORDS = {
    "computes in fp32, as by its own choice on a processor that does not multiply bf16": (
        "multiplies in fp32 there, because that processor has no bf16 multiplication"
    )
}


def _remarks(result: dict[str, Any]) -> str:
    sentences = ""
    for name, text in result.get("remarks", {}).items():
        engine, dtype = name.split(", ")
        sentences += f" In {dtype} {titled(engine)} {_IN_WORDS.get(text, text)}."
    return sentences


# columns of the table of machines: what batches of, and the most rows in each
_SPANS = (("batch 1", 1), ("2-7", 7), ("8-24", 24), ("32-64", 64), ("128 and more", 1 << 30))
_SPAN_PATTERNS = ("2:4", "4:8", "8:16", "12:16+int8@a8", "8:16+int8@a8", "4:16+int8@a8")


def by_machine(results: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown: geometric means over the rows of every shape and number of threads, by machine and batch."""
    lines = [
        "Geometric means over all shapes and thread counts of a run, over the best dense engine of the same numbers:",
        "",
        f"| machine | pattern | {' | '.join(name for name, _ in _SPANS)} |",
        f"| --- | --- |{' ---: |' * len(_SPANS)}",
    ]
    for result in results:
        found = list(comparisons(result))
        machine = f"{result['machine']['cpu']} ({result['machine']['isa']}), {result['date']}"
        kinds = ((dtype, pattern) for dtype in ("fp32", "bf16") for pattern in _SPAN_PATTERNS)
        for dtype, pattern in kinds:
            rows = [each for each in found if (each.row["dtype"], each.row["pattern"]) == (dtype, pattern)]
            if rows:
                lines.append(f"| {machine} | {dtype} {pattern} | {' | '.join(_spans(rows))} |")
    return "\n".join(lines)


def _spans(rows: Sequence[Comparison]) -> Iterator[str]:
    least = 1
    for _, most in _SPANS:
        within = [each.speedup for each in rows if least <= each.row["batch"] <= most]
        yield f"{geometric_mean(within):.2f}x" if within else ""
        least = most + 1


def _joined(names: Sequence[str]) -> str:
    """Such as "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _values(found: list[Comparison], *names: str) -> int:
    return len({tuple(each.row[name] for name in names) for each in found})


def _mean(found: list[Comparison], pattern: str) -> str:
    return f"{geometric_mean(each.speedup for each in found if each.row['pattern'] == pattern):.2f}x"


def main() -> int:
    """Rewrite README.md and docs/limit.svg of the current folder."""
    if len(sys.argv) < 2:
        print("usage: python -m bench.readme bench/results/FILE.json [OTHER.json ...]", file=sys.stderr)
        return 2
    results = {Path(name).as_posix(): load_result(Path(name)) for name in sys.argv[1:]}
    readme = Path("README.md")
    readme.write_text(rewrite(readme.read_text(), results))
    Path("docs/limit.svg").write_text(limit_plot(next(iter(results.values())), SHAPE, DTYPE, THREADS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
