"""What a reader sees first: title, verdict, totals, and what the figures mean.

The reference scale is what docs/design/pruning_methods.md and docs/guides/recover_accuracy.md show of one model. It
orders errors; it does not promise a quality.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sparsecomp.methods.registry import get_method, methods
from sparsecomp.reporting.figures import count_text, error_text, geometric_mean, ratio_text, seconds_text, share_text
from sparsecomp.reporting.markup import name_text, pairs, section, text
from sparsecomp.reporting.terminal import quoted

if TYPE_CHECKING:
    from sparsecomp.pruning.report import LayerReport, PruneReport

# mean layer error of the 36 encoder layers of all-MiniLM-L6-v2 at 2:4, the method, and the mean cosine of the pruned
# model's embeddings with the dense model's
REFERENCES = ((0.236, "wanda", 0.73), (0.155, "sparsegpt", 0.89), (0.124, "fast", 0.92), (0.113, "balanced", 0.94))

# up to which mean error each word holds, and what to do then
LEVELS = (
    (0.05, "small", "The model may do as it is; check it on your own task."),
    (0.15, "moderate", "Expect the model to answer a little differently; tune it before you rely on it."),
    (0.25, "large", "Without tuning, expect answers to differ plainly from the dense model\u2019s."),
    (math.inf, "very large", "Expect the model to be of little use before it is tuned or trained."),
)
_SCALE = (0.01, 1.0)
_PATTERNS_NAMED = 3


def level(error: float) -> tuple[str, str]:
    """The word for a mean error, and the advice."""
    return next((word, advice) for limit, word, advice in LEVELS if error < limit or limit == math.inf)


def default_title(report: PruneReport) -> str:
    """The model and what was done to it."""
    model = "Pruning report" if report.provenance is None else f"{report.provenance.model.name}, pruned"
    patterns = report.patterns
    if not patterns:
        return model
    if len(patterns) > _PATTERNS_NAMED:
        return f"{model} to {len(patterns)} patterns"
    *first, last = patterns
    return f"{model} to {', '.join(first)} and {last}" if first else f"{model} to {last}"


def heading(report: PruneReport, title: str) -> str:
    """The title, and below it when, how and by what."""
    told = report.provenance
    words = [f"method {report.method}"]
    if told is not None:
        day, _, hour = told.created.partition("T")
        words.insert(0, f"{day} {hour[:5]} UTC")
        if told.model.source:
            words.insert(0, f"loaded from {told.model.source}")
        words.append(f"sparsecomp {told.versions.get('sparsecomp', '?')}")
    said = " \u00b7 ".join(map(text, words))
    return f'<header>\n<h1>{text(title)}</h1>\n<p class="byline">{said}</p>\n</header>'


def verdict(report: PruneReport) -> str:
    """How large the errors are, in a sentence, a scale and its references."""
    layers = list(report.layers.values())
    changed = [layer for layer in layers if layer.error > 0.0 or not math.isfinite(layer.error)]
    if not changed:
        said = "No layer was pruned." if not layers else "The pruned layers answer as before: no weight was lost."
        return section("Verdict", f'<p class="verdict">{said}</p>', "verdict")
    odd = [layer for layer in changed if not math.isfinite(layer.error)]
    if odd:
        return section(
            "Verdict",
            f'<p class="verdict"><strong>{_count(len(odd), "layer")} without a finite error</strong>, such as '
            f"{name_text(quoted(odd[0].name))}: on the calibration rows the dense layer gave zero, and the "
            "pruned one does not. Look at them before you use the model.</p>",
            "verdict",
        )
    weights_only = [layer for layer in changed if layer.measured_on == "weight"]
    if len(weights_only) == len(changed):
        parts = [_of_weights(report)]
    else:
        flattered = [layer for layer in changed if layer.few_rows and not _held_out(layer)]
        # an error on rows that the method fitted has no place on a scale
        parts = [_of_few_rows(changed)] if flattered else [_of_outputs(report, changed), _scale(changed)]
        if weights_only:
            parts.append(
                f"<p>{_count(len(weights_only), 'layer')} had no calibration data; for those the error is that of the "
                "weights alone, and the mean mixes both.</p>"
            )
    few = [layer for layer in layers if layer.few_rows]
    if few:
        parts.append(_warning(few, len(layers)))
    return section("Verdict", "\n".join(parts), "verdict")


def _of_weights(report: PruneReport) -> str:
    return (
        f'<p class="verdict"><strong>{report.mean_error:.0%} of the weights\u2019 norm was removed</strong> in the '
        "mean over layers. There were no calibration data, so nothing here says how much that changes the outputs: "
        "calibrate and prune again, or compare the model with the dense one.</p>"
    )


def _of_outputs(report: PruneReport, changed: list[LayerReport]) -> str:
    errors = _judged(changed)
    judged = geometric_mean(errors.values())
    word, advice = level(judged)
    unseen = " on data the method had not seen" if report.mean_held_out_error is not None else ""
    worst = max(errors, key=lambda name: errors[name])
    sentences = [
        f'<p class="verdict"><strong>The mean error of a layer is {error_text(judged)}: {word}.</strong> '
        f"What pruning changed in a layer\u2019s output{unseen} has {judged:.1%} of that output\u2019s norm "
        f"({judged**2:.1%} of its energy), in the geometric mean over {_count(len(changed), 'layer')}; "
        f"the worst is {name_text(quoted(worst))} with {error_text(errors[worst])}."
        f"{'' if report.tunings else ' ' + advice}</p>"
    ]
    if judged >= LEVELS[1][0] and report.method in methods() and get_method(report.method).only_chooses:
        sentences.append(
            f"<p><code>{text(report.method)}</code> only chooses weights. Methods that also change the kept ones "
            "do better: on the model of the scale below <code>balanced</code> had half the error of "
            "<code>wanda</code>.</p>"
        )
    if report.tunings:
        gained = [each for each in report.tunings if math.isfinite(each.held_out_after) and each.best_step]
        helped = f"{len(gained)} of {_count(len(report.tunings), 'tuning')} lowered the held-out loss"
        sentences.append(
            f"<p>These errors are from before tuning, which then changed the kept weights: {helped}. "
            "Judge the tuned model by its answers, not by this scale.</p>"
        )
    if report.stages:
        sentences.append("<p>What was measured on the whole model says more; it is below, stage by stage.</p>")
    return "\n".join(sentences)


def _of_few_rows(changed: list[LayerReport]) -> str:
    mean = error_text(geometric_mean(_judged(changed).values()))
    return (
        f'<p class="verdict"><strong>How much the outputs changed cannot be told.</strong> The mean error of a layer, '
        f"{mean}, is that on the calibration rows, and these were so few that the method can have fitted them.</p>"
    )


def _held_out(layer: LayerReport) -> bool:
    return layer.held_out_error is not None and math.isfinite(layer.held_out_error)


def _judged(layers: Sequence[LayerReport]) -> dict[str, float]:
    """The error of each layer to judge by: that on unseen rows where there is one."""
    errors = {}
    for layer in layers:
        held_out = layer.held_out_error
        errors[layer.name] = layer.error if held_out is None or not math.isfinite(held_out) else held_out
    return errors


def _scale(changed: list[LayerReport]) -> str:
    """Where the layers and their mean stand between 0.01 and 1, on a logarithmic scale."""
    start, zones = _SCALE[0], []
    for limit, word, _ in LEVELS:
        end = min(limit, _SCALE[1])
        place = f"left:{_place(start):.1f}%;width:{_place(end) - _place(start):.1f}%"
        zones.append(f'<span class="zone" style="{place}">{word}</span>')
        start = end
    errors = _judged(changed).values()
    low, high = _place(min(errors)), _place(max(errors))
    marks = "".join(
        f'<span class="end" style="left:{_place(each):.1f}%">{each:g}</span>'
        for each in (_SCALE[0], *(limit for limit, _, _ in LEVELS if limit < _SCALE[1]), _SCALE[1])
    )
    *known, last = [f"{cosine:.2f} at {error:.2f} ({method})" for error, method, cosine in REFERENCES]
    mean = geometric_mean(errors)
    return (
        f'<div class="scale" role="img" aria-label="mean error {error_text(mean)} on a scale from 0.01 to 1; layers '
        f'from {error_text(min(errors))} to {error_text(max(errors))}">'
        f'{"".join(zones)}<span class="range" style="left:{low:.1f}%;width:{max(high - low, 0.3):.1f}%"></span>'
        f'<span class="mean" style="left:{_place(mean):.1f}%"></span>{marks}</div>\n'
        '<p class="note">Mark: the mean; bar: from the best layer to the worst. For scale: with the 36 encoder layers '
        "of all-MiniLM-L6-v2 pruned to 2:4 and not tuned, the mean cosine between the embeddings of the pruned and of "
        f"the dense model was {', '.join(known)} and {last}. That is one model: the words are a guide, and errors of "
        "layers do not add up to the quality of a task. Measure yours.</p>"
    )


def _place(error: float) -> float:
    low, high = (math.log10(each) for each in _SCALE)
    inside = min(max(error, _SCALE[0]), _SCALE[1])
    return 100.0 * (math.log10(inside) - low) / (high - low)


def _warning(few: list[LayerReport], count: int) -> str:
    worst = min(few, key=lambda each: each.rows_per_input or 0.0)
    return (
        f'<p class="warning"><strong>Too little calibration.</strong> {len(few)} of {_count(count, "layer")} saw fewer '
        f"than 4 rows for each input, the least {name_text(quoted(worst.name))}: {worst.rows or 0:,} rows for "
        f"{worst.shape[1]:,} inputs. Their masks fit these rows, and their errors look better than they are; "
        "calibrate on more.</p>"
    )


def totals(report: PruneReport) -> str:
    """What was pruned and what was not, in figures."""
    layers = list(report.layers.values())
    items = [("layers pruned", f"<b>{len(layers)}</b>{_left(report)}")]
    kept = f"<b>{report.density:.1%}</b> of {count_text(report.weights)}"
    items.append(("weights kept", kept))
    if report.provenance is not None and report.provenance.model.parameters:
        items.append(("share of the model", _share(report)))
    if layers:
        items.append(("error, mean (worst)", _errors(layer.error for layer in layers)))
        held = [layer.held_out_error for layer in layers if layer.held_out_error is not None]
        if held:
            items.append(("held out, mean (worst)", _errors(held)))
        ratios = [layer.rows_per_input for layer in layers if layer.rows_per_input is not None]
        if ratios:
            items.append(("rows for each input", f"<b>{ratio_text(min(ratios))}</b> at least"))
    items.append(("time for the layers", f"<b>{seconds_text(report.seconds)}</b>"))
    note = (
        f'<p class="note">{_covered(report)}Zeros in dense weights make nothing smaller or faster by themselves: '
        "<code>sparsecomp compile</code> packs them, and measures what that is worth on a machine.</p>"
    )
    return section("Totals", pairs(items, "cards") + "\n" + note, "totals")


def _left(report: PruneReport) -> str:
    return f", {len(report.skipped)} left dense" if report.skipped else ""


def _share(report: PruneReport) -> str:
    assert report.provenance is not None
    parameters = report.provenance.model.parameters
    return f"<b>{text(share_text(report.weights, parameters))}</b> of {count_text(parameters)} parameters"


def _covered(report: PruneReport) -> str:
    """The share of what could be pruned, where embeddings are a part of the model."""
    if report.provenance is None:
        return ""
    model = report.provenance.model
    others = model.matrix_weights - model.embedding_weights
    if not model.embedding_weights or others <= 0:
        return ""
    return (
        f"Embeddings hold {count_text(model.embedding_weights)} of the parameters; of all other matrices "
        f"{text(share_text(report.weights, others))} were pruned. "
    )


def _errors(errors: Iterable[float]) -> str:
    values = list(errors)
    return f"<b>{error_text(geometric_mean(values))}</b> ({error_text(max(values))})"


def definitions(report: PruneReport) -> str:
    """What the figures mean, those that this report has."""
    layers = list(report.layers.values())
    measures = {layer.measured_on for layer in layers}
    items = []
    if "gram" in measures:
        items.append(
            (
                "error",
                "||(W\u2212V)X|| / ||WX||: how much the output of the layer changed on the calibration rows X, beside "
                "the size of the output itself. W are the weights before, V after. 0 is unchanged, 1 as wrong as "
                "answering 0. Each layer is judged on its own.",
            )
        )
    if "weight" in measures:
        items.append(
            (
                "error without data (*)",
                "||W\u2212V|| / ||W||: how much of the weights is gone, whatever the inputs are.",
            )
        )
    if any(layer.held_out_error is not None for layer in layers):
        items.append(
            (
                "held-out error",
                "The same on rows that the method has not seen. If it is far above the error, the rows "
                "were too few: the method fitted them.",
            ),
        )
    items.append(("kept (density)", "Share of a layer\u2019s weights that are not pruned."))
    if any(layer.rows is not None for layer in layers):
        items.append(
            (
                "rows for each input",
                "Rows of calibration (tokens) over the layer\u2019s inputs. Below 4, marked !, the error flatters.",
            ),
        )
    if any(layer.permuted for layer in layers):
        items.append(
            (
                "permuted",
                "The layer\u2019s input channels were reordered, with the layers before it; the model computes "
                "the same.",
            )
        )
    if any(layer.runs_dense for layer in layers):
        items.append(
            (
                "runs dense",
                "A convolution larger than 1x1, or padded: it stays dense in execution: no kernel skips its zeros.",
            )
        )
    return section("What the figures mean", pairs(items, "terms"), "definitions")


def provenance(report: PruneReport) -> str:
    """Everything one needs to do it again."""
    told = report.provenance
    if told is None:
        return ""
    items = [("model", text(told.model.name) + (f" ({text(told.model.source)})" if told.model.source else ""))]
    items.append(("parameters", f"{told.model.parameters:,}"))
    items.append(("made", text(told.created.replace("T", " ").replace("+00:00", " UTC"))))
    items.append(("method", text(report.method)))
    if report.patterns:
        items.append(("patterns", text(", ".join(report.patterns))))
    if told.seed is not None:
        items.append(("seed", str(told.seed)))
    if data := _data(report):
        items.append(("calibration", data))
    items.append(("versions", text(", ".join(f"{name} {version}" for name, version in told.versions.items()))))
    isa = f", {told.isa}" if told.isa else ""
    items.append(("machine", text(f"{told.processor}{isa}, {_count(told.threads, 'thread')}, {told.os}")))
    if told.command is not None:
        items.append(("command", f"<code>{text(told.command)}</code>"))
    return section("How this was made", pairs(items, "facts"), "provenance")


def _data(report: PruneReport) -> str:
    told = report.provenance
    assert told is not None
    rows = [layer.rows for layer in report.layers.values() if layer.rows is not None]
    words = [told.data] if told.data is not None else []
    if told.batches is not None:
        words.append(f"{told.batches:,} batch{'' if told.batches == 1 else 'es'}")
    if told.held_out_batches:
        words.append(f"{told.held_out_batches:,} held out")
    if rows:
        words.append(f"up to {max(rows):,} rows into a layer")
    return text(", ".join(words))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
