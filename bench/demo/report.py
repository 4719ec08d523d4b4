"""The demo's report: what happened to each layer and to the whole, in words that do not promise more than was seen.

Takes a result, gives plain text of at most 80 columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.demo.result import DENSE, DemoResult, LayerRow, Measured
from bench.demo.verdict import CLOSE, fastest, next_steps, of_kind, sparse_side, verdict
from sparsecomp.planning.summary import megabytes
from sparsecomp.reporting.terminal import table, terminal_width, wrap

_WIDEST = 80
# 90% quantile over 10% quantile from which a reader should not trust a time
_NOISY = 2.0
_LARGEST_ERRORS = 3
_NOT_MEASURED = (
    "Not measured: OpenVINO's own int8 (it takes NNCF), int8 with ranges from calibration, bf16, and any task of yours."
)


def render(result: DemoResult, width: int | None = None) -> str:
    """The report as plain text; ``width`` in columns, by default the terminal's, at most 80."""
    width = width or min(_WIDEST, terminal_width())
    head = (
        f"sparsecomp demo: all-MiniLM-L6-v2, {len(result.layers)} layers at {result.pattern} by {result.method}, "
        f"{result.date}"
    )
    parts = [
        "\n".join(wrap(line, width) for line in (head, result.device, _versions(result), result.calibration)),
        _layers(result, width),
        _size(result, width),
        _engines(result, width),
        _spread(result, width),
        _verdict(result, width),
        _next(result, width),
        wrap(
            f"Took {result.seconds:.0f} s. This report (report.txt), all figures (result.json) and the models are in "
            f"{result.folder}/.",
            width,
            "",
        ),
    ]
    return "\n\n".join(parts)


def _versions(result: DemoResult) -> str:
    packages = result.machine.get("packages", {})
    return ", ".join(f"{name} {version}" for name, version in packages.items() if version)


def _with_notes(drawn: str, notes: Sequence[str], width: int) -> str:
    return "\n".join([drawn, "", *(wrap(note, width, "") for note in notes)] if notes else [drawn])


def _layers(result: DemoResult, width: int) -> str:
    groups: dict[tuple[str, tuple[int, int], str], list[LayerRow]] = {}
    for row in result.layers:
        groups.setdefault((_role(row.name), row.shape, row.kernel), []).append(row)
    several = len({kernel for _, _, kernel in groups}) > 1
    columns = ["layers", ">error", ">rows", ">dense", ">sparse", ">ratio", ">bound", *(["kernel"] if several else [])]
    lines: list[Sequence[object]] = []
    for (role, shape, kernel), members in groups.items():
        errors = [row.error for row in members]
        name, error = f"{len(members)} x {role} {shape[0]}x{shape[1]}", f"{min(errors):.2f}-{max(errors):.2f}"
        for rows in members[0].dense:
            dense, sparse = members[0].dense[rows], members[0].sparse[rows]
            cells: list[object] = [name, error, rows, f"{dense * 1e6:.0f}", f"{sparse * 1e6:.0f}"]
            cells += [f"{dense / sparse:.2f}x", f"{members[0].bound[rows]:.2f}x"]
            lines.append([*cells, *([kernel] if several else [])])
            name = error = ""
    title = "Layer by layer: microseconds of one product, torch's dense and SparseLinear's"
    return _with_notes(table(columns, lines, title, width), _layer_notes(result), width)


def _role(name: str) -> str:
    """ "attention" of encoder.layer.0.attention.self.query."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return parts[number + 1] if number + 1 < len(parts) else name


def _layer_notes(result: DemoResult) -> list[str]:
    worst = sorted(result.layers, key=lambda row: row.error, reverse=True)[:_LARGEST_ERRORS]
    named = ", ".join(f"{row.name.removeprefix('encoder.layer.')} {row.error:.3f}" for row in worst)
    notes = [
        f"error: ||(W-V)X|| / ||WX|| on the calibration text, least and largest; the largest: {named}. rows: tokens "
        "in a batch. bound: the most that halving the work and the bytes can give.",
    ]
    if any(row.dense[rows] / row.sparse[rows] > row.bound[rows] for row in result.layers for rows in row.dense):
        notes.append(
            "A ratio above its bound is no wonder of sparsity: torch's dense product is that far from this machine's "
            "peak. The fair yardstick is the best dense engine, below."
        )
    if result.stayed_dense:
        names = ", ".join(name.removeprefix("encoder.layer.") for name in result.stayed_dense)
        reasons = "; ".join(dict.fromkeys(result.stayed_dense.values()))
        notes.append(
            f"The planner would leave {len(result.stayed_dense)} of {len(result.layers)} layers dense: {names} "
            f"({reasons}). They were made sparse all the same, so that quality below is that of the whole encoder."
        )
    else:
        notes.append(f"The planner makes all {len(result.layers)} layers sparse: none is slower than torch's dense.")
    return notes


def _size(result: DemoResult, width: int) -> str:
    dense, packed = sum(row.dense_bytes for row in result.layers), sum(row.bytes for row in result.layers)
    lines = [
        f"encoder's weights  {megabytes(dense)} -> {megabytes(packed)} ({packed / dense:.0%})",
        f"whole model        {megabytes(result.dense_bytes)} -> {megabytes(result.file_bytes)} "
        f"({result.file_bytes / result.dense_bytes:.0%}); {megabytes(result.dense_bytes - dense)} are embeddings and "
        "others, left as they are",
        "saved, reloaded into a fresh model: embeddings equal bit for bit",
    ]
    if result.integer_bytes:
        stored = ", ".join(f"{name} {megabytes(size)}" for name, size in result.integer_bytes.items())
        lines.append(
            f"encoder in int8    {stored}; ours leaves the embeddings in fp32, ONNX Runtime's int8 rounds them, too"
        )
    return "\n".join(["Size", *("  " + wrap(line, width - 2, " " * 21) for line in lines)])


def _engines(result: DemoResult, width: int) -> str:
    columns = ["engine", ">MB"]
    shown: list[list[str]] = [
        [each.name for each in result.engines],
        _marked(result.engines, lambda each: each.bytes / 1e6, ".1f", min),
    ]
    for batch in result.batches:
        best = fastest(of_kind(result.engines, DENSE), batch).times[batch].median
        columns += [f">batch {batch}", ">ratio"]
        shown.append(_marked(result.engines, lambda each, b=batch: _ms(each, b), ".1f", min))  # type: ignore[misc]
        shown.append([f"{best / each.times[batch].median:.2f}x" for each in result.engines])
    columns += [">cosine", ">neighbour"]
    others = [each for each in result.engines if each.kind != DENSE]
    shown.append(_marked(result.engines, lambda each: each.quality.cosine, ".3f", max, others))
    shown.append(_marked(result.engines, lambda each: each.quality.neighbour, ".3f", max, others))
    lines = list(zip(*shown, strict=True))
    texts = f"{result.tokens} tokens a text, {result.threads} thread{'s' if result.threads > 1 else ''}"
    title = f"The whole model: MB of its file, ms of a batch, {texts}"
    notes = [
        "* best of its column, of the last two among those that are not dense fp32. ratio: times as fast as the "
        f"fastest dense fp32. cosine, neighbour: {result.held_out} held-out paragraphs against the dense model: mean "
        "cosine of the two embeddings, and how often the nearest other paragraph is the same one.",
        f"Rank correlation of all similarities: {_ranks(others)}.",
        _legend(result),
        *(
            [f"Missing here: {'; '.join(f'{name} ({why})' for name, why in result.missing.items())}."]
            * bool(result.missing)
        ),
        _NOT_MEASURED,
    ]
    return _with_notes(table(columns, lines, title, width), notes, width)


def _ranks(engines: Sequence[Measured]) -> str:
    """One engine for each quality."""
    first = {each.quality: each.name for each in reversed(engines)}
    return ", ".join(f"{name} {quality.rank:.3f}" for quality, name in reversed(first.items()))


def _ms(each: Measured, batch: int) -> float:
    return each.times[batch].median * 1e3


def _marked(
    engines: Sequence[Measured],
    value: Callable[[Measured], float],
    form: str,
    best: Callable[[Sequence[float]], float],
    among: Sequence[Measured] | None = None,
) -> list[str]:
    """The values, the best of them (``among`` some) with a star, and any other that reads the same."""
    eligible = list(engines if among is None else among)
    top = format(best([value(each) for each in eligible]), form) if eligible else ""
    return [
        text + ("*" if text == top and any(each is other for other in eligible) else " ")
        for each in engines
        for text in [format(value(each), form)]
    ]


def _legend(result: DemoResult) -> str:
    told = "; ".join(f"{each.name}: {each.what}" for each in result.engines if each.what)
    return f"ORT is ONNX Runtime, int8 ORT our int8 in it (sc.onnx_session). {told}."


def _spread(result: DemoResult, width: int) -> str:
    columns = ["engine"]
    for batch in result.batches:
        columns += [f">batch {batch}, 10%-90%", ">over torch"]
    lines = []
    for each in result.engines:
        cells: list[object] = [each.name]
        for batch, time in each.times.items():
            cells.append(f"{time.low * 1e3:.2f}-{time.high * 1e3:.2f}")
            cells.append(f"{result.engines[0].times[batch].median / time.median:.2f}x")
        lines.append(cells)
    counts = " and ".join(str(time.samples) for time in result.engines[0].times.values())
    title = f"Spread of these times in ms; {counts} rounds, all engines in turn"
    notes = []
    if _noisy(result):
        notes.append("These times vary widely: something else was running. Run again on a quiet machine.")
    if result.difference:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in result.difference.items())
        notes.append(f"Largest difference of an embedding's values to torch's with the same weights: {errors}.")
    return _with_notes(table(columns, lines, title, width), notes, width)


def _noisy(result: DemoResult) -> bool:
    return any(time.high > _NOISY * time.low for each in result.engines for time in each.times.values())


def _verdict(result: DemoResult, width: int) -> str:
    quality = sparse_side(result.engines).quality
    lines = [f"- {sentence}" for sentence in verdict(result)]
    closeness = (
        f"cosine {quality.cosine:.3f}, rank correlation of all similarities {quality.rank:.3f}, same neighbour "
        f"{quality.neighbour:.3f}"
    )
    if quality.cosine < CLOSE:
        lines.append(
            f"- The sparse embeddings do NOT replace the dense model's ({closeness}): all layers were pruned in one "
            "shot, each on its own."
        )
    else:
        lines.append(f"- The sparse embeddings are close to the dense model's ({closeness}); check your own task.")
    title = "Verdict, from the figures above" + (" (of a machine that was not quiet)" if _noisy(result) else "")
    return "\n".join([title, *(wrap(line, width) for line in lines)])


def _next(result: DemoResult, width: int) -> str:
    lines = ["What to do next"]
    for number, (text, typed) in enumerate(next_steps(result), 1):
        lines.append(wrap(f"{number}. {text}", width, "   "))
        lines += [f"     {line}" for line in typed]
    return "\n".join(lines)
