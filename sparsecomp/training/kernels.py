"""Layers of a model under masks, put on sparse kernels for training and taken off again.

Takes masks by layer name and gives, for each layer, what its kernels compute. Knows no optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from sparsecomp.errors import MethodError, PatternError, naming
from sparsecomp.models.layers import check_globs
from sparsecomp.modules.carry import why_not_carried
from sparsecomp.nn.training import SparseTrainingLinear
from sparsecomp.patterns import Pattern
from sparsecomp.reporting.terminal import by_reason
from sparsecomp.training.layers import TrainedLayer
from sparsecomp.training.rules import Rule
from sparsecomp.training.schedule import Schedule

BOTH = "y and the gradient of x are sparse"
# packing a changed mask takes about as long as sparse kernels save in so many steps, beside a fast dense library
SELDOM = 20


def accelerate(model: nn.Module, masks: Mapping[str, Tensor], patterns: Mapping[str, Pattern]) -> dict[str, str]:
    """Have the layers of these masks (bool [out, in], in a pattern by the same name) train by sparse CPU kernels.

    A layer becomes a SparseTrainingLinear in place, and one that is already takes the new mask. Gives a sentence for
    each name: ``BOTH``, or what stays dense and why. A layer of which nothing can be sparse, as where its mask does not
    fit the pattern yet, is what it was before, an nn.Linear.

    Raises ModelError for a name that is no layer of the model, and for a mask of another shape or dtype.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    check_globs(masks, modules, "the mask of")
    return {name: _accelerated(model, name, modules[name], mask, patterns[name]) for name, mask in masks.items()}


def restore(model: nn.Module) -> None:
    """Make every layer of ``model`` that ``accelerate`` changed what it was before; Parameters and all else stay."""
    for module in model.modules():
        if isinstance(module, SparseTrainingLinear):
            module.give_back()


class TrainingKernels:
    """The sparse kernels of a training: they follow its masks. Without layers it does nothing and says nothing."""

    def __init__(self, model: nn.Module, layers: Iterable[TrainedLayer]) -> None:
        """``layers`` are those of ``model`` that train; each goes to kernels at the first ``follow``."""
        self._model = model
        self._layers = list(layers)
        self._said: dict[str, str] = {}

    def follow(self, changed: bool = False) -> None:
        """Pack the masks of all layers, or of those whose last choice ``changed`` them.

        A layer whose mask does not fit its pattern yet stays dense till it does.
        """
        floats = [each for each in self._layers if not each.numbers.has_scales and (each.changed or not changed)]
        masks = {each.name: each.matrix(each.mask) for each in floats}
        said = accelerate(self._model, masks, {each.name: each.pattern for each in floats})
        rest = {each.name: f"dense: it trains in {each.numbers}" for each in self._layers if each.numbers.has_scales}
        self._said |= said | rest

    def describe(self) -> list[str]:
        """A line for each thing that kernels compute, with the layers of which they do."""
        # where a mask breaks its pattern differs from layer to layer
        return by_reason("kernels", {name: each.split(" in row ")[0] for name, each in self._said.items()})

    def release(self) -> None:
        """Make the layers what they were."""
        if self._layers:
            restore(self._model)
        self._layers, self._said = [], {}


def require_seldom(rule: Rule, schedule: Schedule) -> None:
    """Raises MethodError for a rule that changes masks so often that packing takes more than kernels save."""
    if rule.changes_masks and schedule.every < SELDOM:
        raise MethodError(
            f'kernels=True packs every mask that "{rule.name}" changes, here after every {schedule.every} steps; '
            f'allowed are "fixed" and schedules that change masks after every {SELDOM} steps or less often, so leave '
            f'kernels out or give schedule=Schedule("{schedule.curve}", every={5 * SELDOM}, ...)'
        )


def _accelerated(model: nn.Module, name: str, module: nn.Module, mask: Tensor, pattern: Pattern) -> str:
    if (reason := _why_not(model, module)) is not None:
        return f"dense: {reason}"
    assert isinstance(module, nn.Linear)
    try:
        with naming(name):
            layer = SparseTrainingLinear.take(module, mask, pattern)
    except PatternError as error:
        reason = str(error).removeprefix(f"{name}: ")
    else:
        reason = layer.why_dense()
        if reason is None:
            rest = layer.why_dense_gradient()
            return BOTH if rest is None else f"y is sparse, the gradient of x dense: {rest}"
    if isinstance(module, SparseTrainingLinear):
        module.give_back()
    return f"dense: {reason}"


def _why_not(model: nn.Module, module: nn.Module) -> str | None:
    if isinstance(module, SparseTrainingLinear):
        return None
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} layers have no sparse training kernel"
    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention) and any(child is module for child in parent.children()):
            return "nn.MultiheadAttention reads its weight and never calls it"
    return why_not_carried(module, nn.Linear)
