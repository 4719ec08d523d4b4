"""The demo's report: what happened to each layer and to the whole, in words that do not promise more than was seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsecomp.device import Device
from sparsecomp.display import table
from sparsecomp.plan import Plan
from sparsecomp.prune.report import PruneReport
from sparsecomp.report import Summary, megabytes

from .harness import Timing
from .minilm import Quality

# 90% quantile over 10% quantile from which a reader should not trust a time
_NOISY = 2.0


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass by engine, for ``batch`` texts of ``tokens`` tokens each."""

    batch: int
    tokens: int
    engines: Mapping[str, Timing]


@dataclass(frozen=True)
class DemoResult:
    """Everything the report says. Bytes are of whole files or state dicts, ``rows`` the planned batch sizes."""

    method: str
    device: Device
    calibration: str
    held_out: int
    plan: Plan
    pruned: PruneReport
    layers: Summary
    rows: tuple[int, ...]
    dense_bytes: int
    file_bytes: int
    quality: Quality
    onnx_error: Mapping[str, float]
    onnx_bytes: Mapping[str, int]
    latencies: Sequence[Latency]
    seconds: float


def render(result: DemoResult) -> str:
    """The report as plain text."""
    parts = [
        f"sparsecomp demo: all-MiniLM-L6-v2, {len(result.layers.rows)} encoder layers at 2:4, method {result.method}",
        f"{result.device.describe()}\n{result.calibration}",
        _layers(result),
        _planner(result),
        _size(result),
        _latency(result),
        _quality(result),
        f"Took {result.seconds:.0f} s.",
    ]
    return "\n\n".join(parts)


def _layers(result: DemoResult) -> str:
    columns = ["layer", ">out x in", "pattern", ">error", ">KB", "kernel"]
    for rows in result.rows:
        columns += [f">us, {rows} rows", ">ratio (bound)"]
    lines: list[Sequence[object]] = []
    for row in result.layers.rows:
        cells: list[object] = [
            row.name.removeprefix("encoder.layer."),
            f"{row.shape[0]}x{row.shape[1]}",
            row.pattern,
            f"{result.pruned.layers[row.name].error:.3f}",
            f"{row.dense_bytes / 1e3:.0f} -> {row.bytes / 1e3:.0f}",
            row.kernel,
        ]
        for rows in result.rows:
            dense, sparse = row.dense[rows], row.sparse[rows]
            cells += [
                f"{dense * 1e6:.0f} -> {sparse * 1e6:.0f}",
                f"{dense / sparse:.2f}x ({row.bound[rows].value:.2f}x)",
            ]
        lines.append(cells)
    return "\n".join([table(columns, lines, title="Layer by layer, dense -> sparse"), *_layer_notes(result)])


def _layer_notes(result: DemoResult) -> list[str]:
    reasons = "; ".join(dict.fromkeys(f"{row.kernel}: {row.why}" for row in result.layers.rows))
    notes = [
        "error: ||(W-V)X|| / ||WX|| on the calibration text. ratio: torch's nn.Linear over SparseLinear, both measured",
        "here (layers of one shape once). bound: the most that halving the work and the bytes can give.",
        f"Why this kernel: {reasons}.",
    ]
    if any(
        row.dense[rows] / row.sparse[rows] > row.bound[rows].value for row in result.layers.rows for rows in result.rows
    ):
        notes.append(
            "A ratio above its bound is no wonder of sparsity: torch's dense product is that far from this machine's\n"
            "peak. The fair yardstick is the best dense engine, below."
        )
    return notes


def _planner(result: DemoResult) -> str:
    rows = " and ".join(str(rows) for rows in result.rows)
    total = len(result.plan)
    if not result.plan.stayed_dense:
        return f"The planner makes all {total} layers sparse: none is slower than torch's dense at {rows} rows."
    lines = [f"The planner (at {rows} rows) would leave {len(result.plan.stayed_dense)} of {total} layers dense:"]
    lines += [f"  {name.removeprefix('encoder.')}: {reason}" for name, reason in result.plan.stayed_dense.items()]
    return "\n".join(
        [*lines, "They were made sparse all the same, so that quality below is that of the whole encoder."]
    )


def _size(result: DemoResult) -> str:
    layers = result.layers
    rest = result.dense_bytes - layers.dense_bytes
    onnx = ", ".join(f"{name} {megabytes(size)}" for name, size in result.onnx_bytes.items())
    return "\n".join(
        [
            "Size",
            f"  encoder linear weights  {megabytes(layers.dense_bytes)} -> {megabytes(layers.bytes)} "
            f"({layers.bytes / layers.dense_bytes:.0%})",
            f"  whole model             {megabytes(result.dense_bytes)} -> {megabytes(result.file_bytes)} "
            f"({result.file_bytes / result.dense_bytes:.0%}); "
            f"{megabytes(rest)} are embeddings and others, left as they are",
            f"  ONNX files              {onnx}",
            "  saved, reloaded into a fresh model: embeddings equal bit for bit",
        ]
    )


def _latency(result: DemoResult) -> str:
    columns = ["engine"]
    for each in result.latencies:
        columns += [f">batch {each.batch}", ">10%-90%", ">vs torch dense", ">vs best dense"]
    rows = []
    for name in result.latencies[0].engines:
        cells: list[object] = [name]
        for each in result.latencies:
            timing = each.engines[name]
            dense = each.engines["torch dense"].median
            best = min(value.median for engine, value in each.engines.items() if engine.endswith(" dense"))
            cells += [
                f"{timing.median * 1e3:.2f} ms",
                f"{timing.low * 1e3:.2f}-{timing.high * 1e3:.2f}",
                f"{dense / timing.median:.2f}x",
                f"{best / timing.median:.2f}x",
            ]
        rows.append(cells)
    title = f"Latency of a whole embedding, {result.latencies[0].tokens} tokens a text, {result.device.threads} threads"
    noisy = [
        timing for each in result.latencies for timing in each.engines.values() if timing.high > _NOISY * timing.low
    ]
    warning = ["These times vary widely: something else was running. Run again on a quiet machine."] if noisy else []
    errors = "; ".join(f"{name}: {error:.1e}" for name, error in result.onnx_error.items())
    return "\n".join(
        [
            table(columns, rows, title=title),
            *warning,
            "Stock ONNX Runtime runs the packed file anywhere, as dense products: portable, but no faster than dense.",
            f"Largest difference of an embedding to SparseLinear's: {errors}.",
        ]
    )


def _quality(result: DemoResult) -> str:
    quality = result.quality
    return "\n".join(
        [
            f"Quality on {result.held_out} held-out paragraphs, against the dense model (1 is equal)",
            f"  mean cosine of the embeddings             {quality.cosine:.3f}",
            f"  rank correlation of all similarities      {quality.rank:.3f}",
            f"  nearest neighbour is the same paragraph   {quality.neighbour:.3f}",
            _verdict(quality),
        ]
    )


def _verdict(quality: Quality) -> str:
    if quality.cosine >= 0.95:
        return "Embeddings are close to the dense model's; check your own task before you rely on them."
    return (
        "These embeddings do NOT replace the dense model's: pruning all layers in one shot, each on its own, moves\n"
        "them this far. What helps most is to tune what was kept: sc.prune_blocks(..., tuning=sc.Tuning()), block by\n"
        "block, then sc.distill, the whole model towards the dense one. On 400 such paragraphs that took 2:4 from a\n"
        "cosine of .935 and the same neighbour for .745 (balanced, layer by layer) to .966 and .805, and 8:16 (fast)\n"
        "from .949 and .773 to .971 and .825; docs/quality.md says how, and what it cost. Or leave the layers with\n"
        'the largest error dense (skip=[...]), or prune less ("12:16").'
    )
