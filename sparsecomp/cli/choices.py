"""Patterns, methods and weights as named on the command line, checked before anything is measured.

Takes what was typed, gives what ``sparsecomp.plan``, ``prune`` and ``compile`` take. Refuses with options in its words.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from glob import escape
from typing import TYPE_CHECKING

from sparsecomp.cli.parser import UsageError
from sparsecomp.errors import CalibrationError, MethodError, ModelError, PatternError
from sparsecomp.reporting.terminal import listed, numbered, wrap

if TYPE_CHECKING:
    from torch import nn

    from sparsecomp.models.calibration import Calibration
    from sparsecomp.models.layers import LayerTable

AUTO = "auto"
# parts of names under which models keep the layer that turns features into scores
_HEADS = frozenset(
    {
        "lm_head",
        "classifier",
        "classification_head",
        "score",
        "scores",
        "head",
        "heads",
        "qa_outputs",
        "embed_out",
        "cls",
    }
)
# names under which a mixture keeps the layer that chooses experts
_ROUTERS = frozenset({"router", "gate", "switch"})
_SHOWN = 3


def add_pattern(parser: ArgumentParser, required: bool, otherwise: str = "") -> None:
    """Add --pattern, which may be repeated with globs on names."""
    parser.add_argument(
        "--pattern",
        required=required,
        action="append",
        metavar="[GLOB=]PATTERN",
        help='such as "2:4", "8:16", "2:4@v4", "auto" (half the weights in groups that suit this machine) or '
        f'"8:16+int8@a8" (integers); with a glob on layer names it may be repeated{otherwise}',
    )


def read_patterns(given: Sequence[str]) -> dict[str, str]:
    """Patterns by glob, in the order given, "*" being that of all other layers and the last.

    Raises UsageError for a pattern that is none and for two for one glob.
    """
    from sparsecomp.patterns.numbers import parse_weights

    patterns: dict[str, str] = {}
    # a pattern without a glob is for what no glob matches, wherever it stands
    for text in sorted(given, key=lambda each: "=" not in each):
        glob, _, pattern = text.rpartition("=")
        if "=" in text and not glob.strip():
            raise UsageError(f'--pattern "{text}" has no glob before "="; write GLOB=PATTERN, or the pattern alone')
        if (glob or "*") in patterns:
            raise UsageError(f'two patterns are given for "{glob or "*"}"; give one')
        if pattern != AUTO:
            try:
                parse_weights(pattern)
            except PatternError as error:
                raise UsageError(f"argument --pattern: {error}") from error
        patterns[glob or "*"] = pattern
    return patterns


def without_auto(patterns: Mapping[str, str], model: nn.Module) -> dict[str, str]:
    """The patterns, "auto" being the natural one where the model is; a line on standard error says which."""
    from sparsecomp.machine.device import detect

    natural = AUTO
    if AUTO in patterns.values():
        place = next((each.device for each in model.parameters() if each.device.type in ("cpu", "cuda")), "cpu")
        device = detect(str(place))
        natural = str(device.natural_pattern())
        say(f'pattern "{AUTO}" is {natural} here ({device.name}, {device.isa or device.kind})')
    return {glob: natural if each == AUTO else each for glob, each in patterns.items()}


def plain(patterns: Mapping[str, str]) -> str | Mapping[str, str]:
    """One pattern where it is that of all layers, else the mapping."""
    return patterns["*"] if list(patterns) == ["*"] else patterns


def by_layer(found: LayerTable, given: Mapping[str, str], recorded: Mapping[str, str] | None) -> dict[str, str]:
    """The pattern of each layer to be packed, with its numbers where it has any.

    ``recorded`` are the patterns that ``prune`` noted beside the weights: layers it left dense are then packed only
    where a glob names them, and the pattern without a glob is that of the pruned layers. Without any pattern given each
    layer has its recorded one.

    Raises ModelError for globs and names that match no layer, PatternError where no layer has a pattern and for one
    that cannot be packed.
    """
    from sparsecomp.planning.selection import choose_weights

    if recorded is None:
        chosen, _ = choose_weights(found, plain(given))
    else:
        every = {name: given.get("*", pattern) for name, pattern in recorded.items()}
        chosen, _ = choose_weights(found, exactly(every))
        if globs := {glob: pattern for glob, pattern in given.items() if glob != "*"}:
            chosen.update(choose_weights(found, globs)[0])
    if not chosen:
        raise PatternError("no layer has a pattern; name one in --pattern that matches a layer")
    for pattern in dict.fromkeys(choice.pattern for choice in chosen.values()):
        if pattern.mask_only:
            raise PatternError(f'"{pattern}" is a mask-only pattern that no kernel runs; choose N:M or block patterns')
    return {name: chosen[name].weights for name in found if name in chosen}


def rounds(chosen: Mapping[str, str]) -> bool:
    """Whether layers of these patterns round their inputs, of which a calibration tells how they bear it."""
    from sparsecomp.patterns.numbers import parse_weights

    return any(parse_weights(each)[1].activation_bits is not None for each in chosen.values())


def thinned(chosen: Mapping[str, str]) -> dict[str, str]:
    """Those of the layers that lose weights by their pattern."""
    from sparsecomp.patterns.numbers import parse_weights

    return {name: each for name, each in chosen.items() if parse_weights(each)[0].density < 1}


def override_note(chosen: Mapping[str, str], recorded: Mapping[str, str] | None, option: str) -> str | None:
    """A sentence on layers that get another pattern than ``prune`` noted for them; None where there are none."""
    from sparsecomp.patterns.numbers import parse_weights

    changed: dict[tuple[str, str], list[str]] = {}
    for name, pattern in chosen.items():
        noted = (recorded or {}).get(name)
        if noted is not None and parse_weights(noted)[0] != parse_weights(pattern)[0]:
            changed.setdefault((noted, pattern), []).append(name)
    if not changed:
        return None
    said = ", ".join(f"{listed(names)}: {before}, now {after}" for (before, after), names in changed.items())
    return f"note: {option} overrides what prune noted with the weights ({said})"


def times_note() -> str:
    """A sentence on where the times of a plan come from."""
    from sparsecomp.machine import cache

    place = cache.directory()
    if place is None:
        return "times were measured in this run; none are kept (SPARSECOMP_CACHE=off)"
    return f"times are measured once on a machine and kept in {place}; to measure anew, set SPARSECOMP_CACHE=off"


def say(note: str | None) -> None:
    """Print a note on standard error, as wide as the terminal; nothing for None."""
    if note is not None:
        print(wrap(note), file=sys.stderr)


def exactly(patterns: Mapping[str, str]) -> dict[str, str]:
    """Patterns by name as patterns by glob: brackets and stars in a name stand for themselves."""
    return {escape(name): pattern for name, pattern in patterns.items()}


def check_method(method: str | None, calibration: str | None) -> None:
    """UsageError for an unknown method, and for one that needs batches where none are named."""
    import sparsecomp.methods.weight  # noqa: F401  (registers the methods)
    from sparsecomp.methods.registry import get_method

    if method is None:
        return
    try:
        needs_gram = get_method(method).needs_gram
    except MethodError as error:
        raise UsageError(f"argument --method: {error}") from error
    if needs_gram and calibration is None:
        raise UsageError(f'method "{method}" needs calibration batches; name a factory: --calibration module:function')


def check_use(method: str | None, calibration: str | None, integers: bool) -> None:
    """UsageError for batches that nothing looks at: no method, and no layer that rounds its inputs."""
    if method is None and calibration is not None and not integers:
        raise UsageError(
            "--calibration is for pruning, with --method, and for patterns with @a8, whose inputs are rounded; give "
            "one of them as well, or leave it out"
        )


def check_calibration(method: str | None, calibration: Calibration | None, names: Sequence[str]) -> None:
    """CalibrationError naming the layers to be pruned that no batch reached."""
    if method is None or calibration is None:
        return
    if missing := [name for name in names if name not in calibration]:
        raise CalibrationError(
            f"no calibration batch reached {len(missing)} of {len(names)} layers ({listed(missing)}); give batches "
            "that reach them, or leave them dense with --skip"
        )


def check_finite(found: LayerTable, names: Sequence[str]) -> None:
    """ModelError for the first weight that holds NaN or Inf, with its place."""
    import torch

    for name in names:
        weight = found[name].get_weight()
        bad = ~torch.isfinite(weight)
        if bool(bad.any()):
            row, column = (int(each) for each in bad.nonzero()[0])
            raise ModelError(
                f'layer "{name}": weight[{row}, {column}] is {float(weight[row, column])}; repair the weights, or '
                f"leave the layer dense with --skip '{name}'"
            )


def check_fit(found: LayerTable, chosen: Mapping[str, str]) -> None:
    """PatternError naming every layer whose weight does not fit its pattern; layers of other dtypes are not asked."""
    from sparsecomp.packing.format import require_packable
    from sparsecomp.patterns.check import check_weight
    from sparsecomp.patterns.numbers import DTYPES, parse_weights

    refused: dict[str, str] = {}
    for name, weights in chosen.items():
        weight, pattern = found[name].get_weight(), parse_weights(weights)[0]
        if weight.dtype not in DTYPES:
            continue
        try:
            require_packable(weight, pattern)
            check_weight(weight, pattern)
        except PatternError as error:
            refused[name] = str(error).split("; prune it first")[0]
    if refused:
        first, reason = next(iter(refused.items()))
        skips = " ".join(f"--skip '{name}'" for name in list(refused)[:_SHOWN])
        more = " ..." if len(refused) > _SHOWN else ""
        raise PatternError(
            f'{len(refused)} of {len(chosen)} layers do not fit their pattern, such as "{first}": {reason}; prune them '
            f"first, for example with --method magnitude, or leave them dense: {skips}{more}"
        )


def heads(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of the layers that turn the model's features into its output: its own answer, or by their names."""
    own = None
    ask = getattr(model, "get_output_embeddings", None)
    if callable(ask):
        try:
            own = ask()
        except (AttributeError, NotImplementedError, TypeError):
            own = None
    modules = dict(model.named_modules())
    return [name for name in names if (own is not None and modules.get(name) is own) or _named_head(name)]


def routers(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of the layers that choose the experts of a mixture: by their names, with experts or a mixture around."""
    modules = dict(model.named_modules())

    def chooses(name: str) -> bool:
        around, _, last = name.rpartition(".")
        if last == "classifier":
            around, _, last = around.rpartition(".")
        return last in _ROUTERS and any(each.startswith("expert") for each, _ in modules[around].named_children())

    return [name for name in names if chooses(name)]


def router_note(model: nn.Module, chosen: Mapping[str, object]) -> str | None:
    """A sentence on routers of a mixture of experts among the layers; None where there are none."""
    found = routers(model, list(chosen))
    if not found:
        return None
    globs = dict.fromkeys(kind for kind, _ in numbered(found))
    skips = " ".join(f"--skip '{glob}'" for glob in list(globs)[:_SHOWN])
    return (
        f"note: {listed(found)} choose{'s' if len(found) == 1 else ''} the experts of a mixture; a pruned router sends "
        f"tokens elsewhere, and its weights are few, so leave it dense: {skips}"
    )


def _named_head(name: str) -> bool:
    for part in name.split("."):
        if part.isdigit():
            return False
        if part in _HEADS:
            return True
    return False


def head_note(model: nn.Module, chosen: Mapping[str, object], method: str | None, calibrated: bool) -> str | None:
    """A sentence on output heads that are pruned by what no data has informed; None where there is nothing to say."""
    found = heads(model, list(chosen))
    if not found or calibrated:
        return None
    how = "would have to be pruned" if method is None else f"is pruned by {method}, without calibration"
    skips = " ".join(f"--skip '{name}'" for name in found[:_SHOWN])
    return (
        f"note: the output head ({listed(found)}) {how}, and a model's quality hangs on it; to leave it dense: {skips}"
    )
