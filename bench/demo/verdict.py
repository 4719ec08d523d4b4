"""Who is better at what, in words, and what a reader does next: computed from the figures of one run.

Takes what was measured, gives sentences. Prefers nobody: the same rules serve both sides of a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.demo.integers import NUMBERS
from bench.demo.result import DENSE, INT8, OUR_INT8, SPARSE, DemoResult, Measured
from bench.minilm import Quality
from sparsecomp.engines.timing import Timing

# times, sizes and cosines nearer than these count as level
_SAME_TIME, _SAME_SIZE, _SAME_COSINE = 1.05, 1.02, 0.002
# from this cosine on, embeddings are near enough to be tried in place of the dense model's
CLOSE = 0.98
_SENSITIVE = 4
# what int8 at half of the weights is held to: times torch's dense fp32, and times ours in fp32
HELD, OVER_TORCH, OVER_FP32 = f"8:16+{NUMBERS}", 2.4, 1.6


@dataclass(frozen=True)
class Side:
    """One side of a comparison: the fastest of its engines for each batch, one file, one quality."""

    label: str
    times: Mapping[int, Timing]
    bytes: int
    quality: Quality
    what: str = ""


@dataclass(frozen=True)
class Comparison:
    """What the first side is better and worse at, phrases that stand before "than", and clauses on what is level."""

    first: str
    second: str
    better: tuple[str, ...]
    worse: tuple[str, ...]
    level: tuple[str, ...]

    @property
    def wins(self) -> bool:
        """Better somewhere and nowhere worse."""
        return bool(self.better) and not self.worse

    @property
    def loses(self) -> bool:
        """Worse somewhere and nowhere better."""
        return bool(self.worse) and not self.better

    def __str__(self) -> str:
        """One sentence."""
        if not self.better and not self.worse:
            return f"{self.first} and {self.second} are level on this machine."
        text = f"{self.first} is {_and(self.better or self.worse)} than {self.second} on this machine"
        if self.better and self.worse:
            text += f", but {_and(self.worse)}"
        return text + (f"; {_and(self.level)}." if self.level else ".")


def side(label: str, engines: Sequence[Measured]) -> Side:
    """The fastest of these at each batch; the file and the quality are those of the closest to the dense model."""
    closest = max(engines, key=lambda each: each.quality.cosine)
    batches = engines[0].times
    times = {batch: min((each.times[batch] for each in engines), key=lambda time: time.median) for batch in batches}
    return Side(label, times, closest.bytes, closest.quality, closest.what)


def of_kind(engines: Sequence[Measured], kind: str) -> list[Measured]:
    """Those of a kind."""
    return [each for each in engines if each.kind == kind]


def fastest(engines: Sequence[Measured], batch: int) -> Measured:
    """The one with the least median time for so many texts."""
    return min(engines, key=lambda each: each.times[batch].median)


def int8_side(engines: Sequence[Measured]) -> Side | None:
    """The int8 engine that is closest to the dense model, if any ran: the strongest opponent, not the easiest."""
    found = of_kind(engines, INT8)
    return None if not found else side("ONNX Runtime's dynamic int8", [max(found, key=lambda e: e.quality.cosine)])


def sparse_side(engines: Sequence[Measured]) -> Side:
    """The sparse engines."""
    return side("sparse fp32", of_kind(engines, SPARSE))


def our_int8_sides(engines: Sequence[Measured]) -> list[Side]:
    """Int8 weights and activations in our kernel, each pattern a side of its own, for each has another quality."""
    found: dict[str, list[Measured]] = {}
    for each in of_kind(engines, OUR_INT8):
        pattern = each.name.partition("+")[0].partition(" ")[0]
        found.setdefault(f"{pattern}+{NUMBERS}", []).append(each)
    return [side(weights, ways) for weights, ways in found.items()]


def dense_side(engines: Sequence[Measured]) -> Side:
    """The dense fp32 engines, named after the fastest ones."""
    found = of_kind(engines, DENSE)
    names = dict.fromkeys(fastest(found, batch).name.removesuffix(" fp32") for batch in found[0].times)
    return side(f"the best dense fp32 ({' and '.join(names)})", found)


def compare(first: Side, second: Side) -> Comparison:
    """Speed at each batch, size of the file, and agreement with the dense model."""
    found: dict[int, list[str]] = {1: [], -1: [], 0: []}
    speed: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for batch, time in first.times.items():
        other = second.times[batch]
        sign = _faster(time, other)
        factor = max(time.median, other.median) / min(time.median, other.median)
        speed[sign].append(str(batch) if sign == 0 else f"{factor:.2f}x at batch {batch}")
    for sign, word in ((1, "faster"), (-1, "slower")):
        if speed[sign]:
            found[sign].append(f"{word} ({', '.join(speed[sign])})")
    if speed[0]:
        found[0].append(f"their speed at batch {_and(speed[0])} is too near to tell")
    sizes = f"({first.bytes / 1e6:.0f} MB against {second.bytes / 1e6:.0f} MB)"
    sign = _order(second.bytes / first.bytes, _SAME_SIZE)
    found[sign].append({1: f"smaller {sizes}", -1: f"larger {sizes}", 0: "their files are as large"}[sign])
    mine, theirs = first.quality, second.quality
    quality = (
        f"(cosine {mine.cosine:.3f} against {theirs.cosine:.3f}, "
        f"same neighbour {mine.neighbour:.3f} against {theirs.neighbour:.3f})"
    )
    gap = mine.cosine - theirs.cosine
    sign = 0 if abs(gap) <= _SAME_COSINE else 1 if gap > 0 else -1
    words = {
        1: "closer to the dense model",
        -1: "farther from the dense model",
        0: "they are as close to the dense model",
    }
    found[sign].append(words[sign] + ("" if sign == 0 else f" {quality}"))
    return Comparison(_capital(first.label), second.label, tuple(found[1]), tuple(found[-1]), tuple(found[0]))


def verdict(result: DemoResult) -> list[str]:
    """A sentence each: sparse against the best dense fp32, dense int8 against both, and our int8 against dense int8."""
    sparse, dense = sparse_side(result.engines), dense_side(result.engines)
    sentences = [str(compare(sparse, dense))]
    int8, ours = int8_side(result.engines), our_int8_sides(result.engines)
    if int8 is None:
        sentences += [str(compare(each, dense)) for each in ours]
        return [*sentences, "Dense int8, the rival to beat, could not be measured here.", *held_to(result)]
    sentences += [str(compare(int8, sparse)), str(compare(int8, dense))]
    return [*sentences, *(str(compare(each, int8)) for each in ours), *held_to(result)]


def held_to(result: DemoResult) -> list[str]:
    """A sentence on the ratios that half of the weights in int8 should reach, if it ran."""
    engines = {each.name: each for each in result.engines}
    if HELD not in engines:
        return []
    parts = []
    for rival, least in ((result.engines[0], OVER_TORCH), (of_kind(result.engines, SPARSE)[0], OVER_FP32)):
        ratios = {batch: rival.times[batch].median / time.median for batch, time in engines[HELD].times.items()}
        named = ", ".join(f"{ratio:.2f}x at batch {batch}" for batch, ratio in ratios.items())
        outcome = "reached" if min(ratios.values()) >= least else "missed"
        parts.append(f"{named} over {rival.name} ({least:.1f}x is wanted: {outcome})")
    return [f"{HELD}: {'; '.join(parts)}."]


def _faster(first: Timing, second: Timing) -> int:
    """1 if the first is faster, -1 if slower, 0 if the medians lie too near each other for this run's spread."""
    within = second.low <= first.median <= second.high or first.low <= second.median <= first.high
    return 0 if within else _order(second.median / first.median, _SAME_TIME)


def _order(ratio: float, level: float) -> int:
    return 1 if ratio > level else -1 if ratio < 1 / level else 0


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# What to do next

# a step: a sentence, and the lines to type
Step = tuple[str, tuple[str, ...]]


def next_steps(result: DemoResult) -> list[Step]:
    """What to do with this model on this machine, then with one's own."""
    steps = [_choice(result)]
    if sparse_side(result.engines).quality.cosine < CLOSE:
        steps += _better_quality(result)
    steps.append(_own_model(result))
    return steps


def _choice(result: DemoResult) -> Step:
    engines, folder = result.engines, result.folder
    int8, sparse, dense = int8_side(engines), sparse_side(engines), dense_side(engines)
    take_sparse = (
        "import sparsecomp as sc",
        f"packed = '{folder}/minilm-{result.pattern.replace(':', 'of')}.onnx'",
        "session = sc.onnx_session(packed)  # or sc.load(...) into the torch model",
    )
    if int8 is None:
        return (
            "Measure dense int8 before you decide: it is what most users have. This run went without it:",
            ("pip install 'sparsecomp[demo]'", "make demo"),
        )
    ahead = [each for each in our_int8_sides(engines) if _ahead(each, int8)]
    if ahead:
        best = min(ahead, key=lambda each: math.prod(time.median for time in each.times.values()))
        sizes = f"{best.bytes / 1e6:.0f} MB against {int8.bytes / 1e6:.0f} MB"
        larger = f", though its file is larger ({sizes})" if _order(int8.bytes / best.bytes, _SAME_SIZE) < 0 else ""
        return (
            f"For this model on this machine, take {best.label}, which is faster than {int8.label} and as close to the "
            f"dense model{larger}{_but(best, dense)}:",
            _take_ours(best.label, result.method),
        )
    against = compare(int8, sparse)
    by_channel = ", per_channel=True" if "per_channel" in int8.what else ""
    take_int8 = (
        "from onnxruntime.quantization import quantize_dynamic",
        f"dense = '{folder}/minilm-dense.onnx'",
        f"quantize_dynamic(dense, 'int8.onnx'{by_channel})",
    )
    if against.wins:
        return (f"For this model on this machine, take dense int8 today{_but(int8, dense)}:", take_int8)
    if against.loses:
        return (f"For this model on this machine, take sparse fp32{_but(sparse, dense)}:", take_sparse)
    if compare(dense, sparse).wins:
        return ("For this model on this machine, sparse fp32 gains nothing; int8 is what is left to try:", take_int8)
    leaders = ", ".join(
        f"at batch {batch} {best.name} (cosine {best.quality.cosine:.3f})"
        for batch in result.batches
        for best in [fastest(engines, batch)]
    )
    smallest = min(engines, key=lambda each: each.bytes).name
    return (
        f"Choose by what counts: the fastest is {leaders}; the smallest file is that of {smallest}; the closest to the "
        "dense model, after fp32 itself, is "
        f"{max((e for e in engines if e.kind != DENSE), key=lambda e: e.quality.cosine).name}.",
        (),
    )


def _ahead(ours: Side, int8: Side) -> bool:
    """Faster at some batch, slower at none, and no farther from the dense model."""
    signs = [_faster(time, int8.times[batch]) for batch, time in ours.times.items()]
    return max(signs) > 0 and min(signs) >= 0 and ours.quality.cosine >= int8.quality.cosine - _SAME_COSINE


def _take_ours(weights: str, method: str) -> tuple[str, ...]:
    pruned = () if weights.startswith("16:16") else (f'           method="{method}",',)
    return (
        "import sparsecomp as sc",
        "calibration = sc.calibrate(model, batches)  # your data",
        f'sc.compile(model, "{weights}", where="everywhere",',
        *pruned,
        "           calibration=calibration)",
    )


def _but(taken: Side, dense: Side) -> str:
    """Where dense fp32 is the faster one all the same."""
    slower = [str(batch) for batch, time in taken.times.items() if _faster(dense.times[batch], time) > 0]
    return f" (though {dense.label} is faster at batch {_and(slower)})" if slower else ""


def _better_quality(result: DemoResult) -> list[Step]:
    worst = sorted(result.layers, key=lambda row: row.error, reverse=True)[:_SENSITIVE]
    names = [f'    "{row.name}",' for row in worst]
    return [
        (
            "To bring the sparse embeddings nearer to the dense ones, tune the kept weights, block by block, then as a "
            "whole (sc.prune_blocks, then sc.distill; docs/guides/recover_accuracy.md says how, and what it gained). "
            "For this model one command does it; it took 20 minutes where that was measured:",
            (f".venv/bin/python -m bench.pruning.quality --pattern {result.pattern}",),
        ),
        (
            "Or leave the layers dense whose error is largest:",
            (
                f'sc.compile(model, "{result.pattern}", method="{result.method}", calibration=calibration,',
                '           only=["encoder.*"], skip=[',
                *names,
                "])",
            ),
        ),
        (
            "Or choose from wider groups, or keep more; which of them is fast differs by processor. Measure it here:",
            tuple(f"make demo ARGS='--pattern {other}'" for other in ("8:16", "12:16") if other != result.pattern),
        ),
    ]


def _own_model(result: DemoResult) -> Step:
    return (
        "On your own model: a function that returns it, one that gives batches, one that gives an example. "
        "compile prints the plan first, with each layer's times; layers that would lose stay dense:",
        (
            f".venv/bin/sparsecomp compile shop.models:build --pattern {result.pattern} \\",
            "    --method fast --calibration shop.data:batches -o packed.safetensors",
            ".venv/bin/sparsecomp export packed.safetensors --model shop.models:build \\",
            "    --inputs shop.data:example -o model.onnx",
        ),
    )
