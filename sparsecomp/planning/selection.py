"""Which pattern each layer of a model gets: one for all, by globs on names, or as a plan decided.

Takes layers and what a user asked for, gives patterns by name and reasons. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from sparsecomp.backends.choice import Choice
from sparsecomp.errors import BackendError, ModelError, PatternError
from sparsecomp.machine.device import detect
from sparsecomp.models.layers import LayerTable, LinearRef, check_globs
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.numbers import parse_weights
from sparsecomp.patterns.positions import group_columns
from sparsecomp.planning.plan import Plan

_UNITS = {"cpu": "cores", "cuda": "SMs"}


def choose_patterns(
    found: LayerTable, pattern: str | Pattern | Mapping[str, str | Pattern] | Plan
) -> tuple[dict[str, Pattern], dict[str, str]]:
    """The pattern of each layer to be pruned, and the reason for each that is not.

    Numbers behind a pattern's name say how the weight is stored afterwards, which pruning leaves alone. Raises as
    ``choose_weights``.
    """
    chosen, skipped = choose_weights(found, pattern)
    return {name: choice.pattern for name, choice in chosen.items()}, skipped


def choose_weights(
    found: LayerTable,
    pattern: str | Pattern | Mapping[str, str | Pattern] | Plan,
    quantize: str | None = None,
    activations: str | None = None,
) -> tuple[dict[str, Choice], dict[str, str]]:
    """Pattern and numbers of each layer to be packed, and the reason for each that is not.

    Convolutions with fewer input channels than a group has columns are none of them.
    ``quantize`` and ``activations`` are for all of them, as ``parse_weights`` takes them. Raises ModelError for a glob
    that matches no layer or decides none, and a plan of another model, PatternError for names that are none.
    """
    chosen, skipped = _chosen(found, pattern, quantize, activations)
    for name, choice in list(chosen.items()):
        if (reason := too_narrow(found[name], choice.pattern)) is not None:
            del chosen[name]
            skipped[name] = reason
    return chosen, skipped


def too_narrow(layer: LinearRef, pattern: Pattern) -> str | None:
    """Why a convolution has too few input channels for a pattern; None for one that has enough, and other layers."""
    columns = group_columns(pattern)
    if layer.kind != "conv2d" or layer.channels >= columns:
        return None
    count = f"{layer.channels} input channel{'s' if layer.channels > 1 else ''}"
    return f"the convolution has {count}, fewer than the {columns} columns that {pattern} judges side by side"


def _chosen(
    found: LayerTable,
    pattern: str | Pattern | Mapping[str, str | Pattern] | Plan,
    quantize: str | None,
    activations: str | None,
) -> tuple[dict[str, Choice], dict[str, str]]:
    skipped = dict(found.skipped)
    if isinstance(pattern, str | Pattern):
        return dict.fromkeys(found, Choice(*parse_weights(pattern, quantize, activations))), skipped
    if not isinstance(pattern, Mapping):
        return _planned(found, pattern, skipped)
    check_globs(pattern, [*found, *found.skipped], "pattern for")
    parsed = {glob: Choice(*parse_weights(each, quantize, activations)) for glob, each in pattern.items()}
    deciding = _deciding(found, parsed)
    skipped.update({name: "no pattern was given for it" for name in found if name not in deciding})
    return {name: parsed[glob] for name, glob in deciding.items()}, skipped


def choices_of(plan: Plan, found: LayerTable) -> dict[str, Choice]:
    """How each layer runs that the plan has go sparse, without layers that are left out here.

    Raises ModelError for a plan of another model: one that has layers which this model lacks.
    """
    for layer in plan:
        if layer.name not in found.skipped and (layer.name not in found or found[layer.name].shape != layer.shape):
            raise ModelError(
                f'the plan has a layer "{layer.name}" of shape {layer.shape}, which this model lacks; plan this model'
            )
    return {layer.name: layer.choice for layer in plan if layer.choice is not None and layer.name in found}


def made_elsewhere(plan: Plan) -> str | None:
    """A sentence on a plan that was made for another machine than this one, which it names; None for one of here."""
    try:
        here = detect(plan.device.place)
    except BackendError:
        here = detect("cpu")
    if here.fingerprint == plan.device.fingerprint:
        return None
    there, this = (f"{each.name} ({each.isa}, {each.cores} {_UNITS[each.kind]})" for each in (plan.device, here))
    return (
        f"the plan was made on another machine, {there}, and this is {this}; its times do not hold here, so that other "
        "layers may be worth making sparse: plan on this machine"
    )


def _deciding(found: LayerTable, patterns: Mapping[str, Choice]) -> dict[str, str]:
    """Which name or glob decides for each layer; ModelError for a glob that a broader one before it leaves nothing."""
    reach: dict[str, set[str]] = {glob: set() for glob in patterns}
    deciding: dict[str, str] = {}
    for name, layer in found.items():
        reached = (name, *layer.aliases)
        matching = [glob for glob in patterns if any(fnmatchcase(each, glob) for each in reached)]
        for glob in matching:
            reach[glob].add(name)
        if matching:
            deciding[name] = next((glob for glob in matching if glob in reached), matching[0])
    decided = set(deciding.values())
    for glob in [each for each in patterns if each not in decided]:
        for name in sorted(reach[glob]):
            first = deciding[name]
            # "*" after others is for what they leave, be it nothing; "*.up" after "*" can only be a mistake
            narrower = reach[glob] < reach[first] or fnmatchcase(glob, first)
            if narrower and patterns[glob] != patterns[first]:
                raise ModelError(
                    f'pattern for "{glob}" decides for no layer: "{first}" comes before it and gives "{name}" the '
                    f'pattern {patterns[first].weights}; put "{glob}" before "{first}", or leave it out'
                )
    return deciding


def _planned(found: LayerTable, plan: Plan, skipped: dict[str, str]) -> tuple[dict[str, Choice], dict[str, str]]:
    if not isinstance(plan, Plan):
        raise PatternError(
            f'pattern is a {type(plan).__name__}; allowed are a name such as "2:4", a Pattern, a mapping from globs to '
            "them, and a Plan"
        )
    choices = choices_of(plan, found)
    dense = {name: f"the plan leaves it dense: {reason}" for name, reason in plan.stayed_dense.items()}
    skipped.update({name: dense.get(name, "the plan does not have it") for name in found if name not in choices})
    return choices, skipped
