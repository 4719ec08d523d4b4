"""What a module with a packed weight holds, and how it is saved, copied, moved and loaded.

Takes a Kernel and keeps it as the module's only weight. Knows nothing of how the product is called.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.context import get_spawning_popen
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from sparsecomp.backends import registry
from sparsecomp.backends.base import Kernel, Weight
from sparsecomp.backends.choice import Choice
from sparsecomp.errors import ModelError, SparsecompError
from sparsecomp.modules.readonly import NO_WEIGHT_GRADIENT, PackedParameter, ReadOnly
from sparsecomp.modules.unpacked import Source
from sparsecomp.nn import operators
from sparsecomp.nn.eager.calls import EagerProduct, eager_product
from sparsecomp.packing.format import PackedWeight
from sparsecomp.packing.move import moved
from sparsecomp.packing.state import STATE_VERSION, packed_of_state, require_kind
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.numbers import INT8, Numbers, parse_weights, weights_name


def _pickled(packed: PackedWeight) -> PackedWeight:
    """``packed``, which was made to be pickled, kept for as long as a process that starts may ask for it."""
    process: Any = get_spawning_popen()
    if process is not None:  # what it inherits are numbers of open files, which end with their tensors
        vars(process).setdefault("_packed_weights", []).append(packed)
    return packed


def _parts_of(packed: PackedWeight) -> tuple[Any, ...]:
    packed = _pickled(packed)
    return weights_name(packed.pattern, packed.numbers), packed.shape, packed.dtype, *packed.parts.values()


def _parameter_of(weights: str, shape: tuple[int, int], dtype: torch.dtype, *parts: Tensor) -> PackedParameter:
    """What stands for a packed weight without a module around it: a pickled parameter comes back as this."""
    pattern, numbers = parse_weights(weights)
    if not numbers.has_scales and len(parts) == len(INT8.part_names):  # pickled when the name was the pattern's alone
        numbers = INT8
    packed = PackedWeight.of(parts, pattern, shape, dtype, numbers)
    facts = packed.shape, packed.dtype, packed.device
    return PackedParameter.of(Source(*facts, packed.unpack, lambda: (_parameter_of, _parts_of(packed))))


def _choice_of_older(state: dict[str, Any], numbers: Numbers) -> Choice:
    """The choice in the state of a module that was pickled before it held one, whose attributes are taken out."""
    pattern, rows = state.pop("pattern"), state.pop("dense_above")
    asked = Choice.asked(pattern, numbers, state.pop("_wanted"), state.pop("_preferred", None))
    return replace(asked, dense_above=rows)


def _kind(kernel: Kernel) -> tuple[object, ...]:
    return kernel.backend, kernel.dtype, kernel.tensors[0].device


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


# also where version 0.1.0 had it
torch.serialization.add_safe_globals([_parameter_of, (_parameter_of, "sparsecomp.packed_module._parameter_of")])

# made anew from the canonical form wherever the module is copied or unpickled
_OF_THE_KERNEL = ("kernel", "_eager", "_layout", "_name", "_packed_weight")


def _refuse_other_files() -> None:
    """ModelError where ``save_pretrained`` asks for the state: nothing reads back what it would write."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # adapters of peft ask as well, and leave the weights out
        if frame.f_code.co_name == "save_pretrained" and not frame.f_globals.get("__name__", "").startswith("peft"):
            raise ModelError(
                "save_pretrained would write packed weights, which from_pretrained does not read: it would make these "
                'layers anew, at random. Use sparsecomp.save(model, "model.safetensors"), and sparsecomp.load(...) '
                "into a model of this class"
            )
        frame = frame.f_back


class PackedModule(nn.Module):
    """A weight [out_features, in_features] in one backend's layout, a bias, and what stands for the dense weight.

    The layout's tensors are buffers that are not saved; ``state_dict`` holds the canonical form. Among the parameters
    there is a ``weight`` of the dense shape, dtype and device, so that whoever asks a model for them, or counts, is
    told what nn.Linear would tell. It is a PackedParameter: reading its values unpacks, writing raises.
    """

    _version = STATE_VERSION
    _sparsecomp_packed = True  # who looks for layers knows a packed one by it
    choice: Choice
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    kernel: Kernel
    _activation: str
    _layout: tuple[str, ...] = ()
    _name: str
    _eager: EagerProduct
    _packed_weight: PackedParameter

    def packed(self) -> PackedWeight:
        """The canonical form of the weight, exactly; treat its tensors as read-only."""
        return registry.backends()[self.kernel.backend].restore(self.kernel)

    @property
    def pattern(self) -> Pattern:
        """The pattern of the weight."""
        return self.choice.pattern

    @property
    def dense_above(self) -> int | None:
        """Rows from which the weight is unpacked for a dense product, None for never; ModelError for another value."""
        return self.choice.dense_above

    @dense_above.setter
    def dense_above(self, rows: int | None) -> None:
        self.choice = replace(self.choice, dense_above=rows)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of x and y, and of the weight unless it is quantised."""
        return self.kernel.dtype

    @property
    def numbers(self) -> Numbers:
        """How the weight is stored and multiplied; ``str()`` names it."""
        return self.kernel.numbers

    @property
    def quantized(self) -> bool:
        """Whether the weight is stored as integers with scales."""
        return self.kernel.numbers.has_scales

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.kernel.tensors[0].device

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in], for reading only: its values are unpacked when they are asked for.

        Shape, dtype and device cost nothing. From the second time on that values are read, a dense copy is kept.
        Writing it, in whatever way, and training it raise ModelError.
        """
        if is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return operators.to_dense(self._tensors(), *self._facts())
        weight: Tensor | None = self._parameters.get("weight")
        return self._packed_weight if weight is None else weight

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a new ``weight``; ModelError says why."""
        if name == "weight":
            if self.__dict__.get("_is_replica"):  # DataParallel sets what it copied; a replica computes from its layout
                return
            raise ModelError(f"layer.weight cannot be set: {NO_WEIGHT_GRADIENT}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Refuse to delete ``weight``; ModelError says why."""
        if name == "weight":
            raise ModelError(f"layer.weight cannot be deleted: {NO_WEIGHT_GRADIENT}")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse a ``weight``, and what would compute one, as pruning and normalisation of torch.nn.utils do."""
        if name == "weight" or name.startswith("weight_"):
            if "_packed_weight" in self.__dict__:  # some of them have taken it away already
                self._show_weight()
            raise ModelError(f'"{name}" cannot be registered on a packed layer: {NO_WEIGHT_GRADIENT}')
        super().register_parameter(name, param)

    def requires_grad_(self, requires_grad: bool = True) -> PackedModule:
        """Set requires_grad of the bias. The packed weight never has a gradient; to train it, train ``to_linear()``."""
        return super().requires_grad_(requires_grad)

    # --- the kernel -------------------------------------------------------------------------------------------------

    def _prepared(self, weight: Weight) -> Kernel:
        """The layout of ``weight``, packed or dense, for its device and dtype; nothing of the module changes."""
        return registry.prepared(weight, self.choice)

    def _hold(self, kernel: Kernel, shared: bool = False) -> None:
        """Make ``kernel`` the module's only weight."""
        if shared:  # before anybody sees the kernel: its storages are replaced
            for tensor in kernel.tensors:
                tensor.share_memory_()  # type: ignore[no-untyped-call]
        for name in self._layout:
            del self._buffers[name]
        before = self.__dict__.get("kernel")
        if before is not None and _kind(before) != _kind(kernel):
            self.choice = replace(self.choice, dense_above=None)  # it was measured with the other
        self.kernel = kernel
        self._layout = tuple(f"layout_{index}" for index in range(len(kernel.tensors)))
        self._name = weights_name(kernel.pattern, kernel.numbers)
        # torch.fx asks a module, not its class, whether it is of torch.nn and therefore one node of a graph
        self.__dict__["__module__"] = f"torch.nn.{type(self).__module__}"
        self._eager = eager_product(kernel, self._activation)
        for name, tensor in zip(self._layout, kernel.tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self._stand_for(kernel)

    def _follow(self, choice: Choice) -> None:
        """Keep what was decided; rows that were measured with another backend than the kernel's say nothing of it."""
        measured = choice.backend is None or choice.backend == self.kernel.backend
        self.choice = choice if measured else replace(choice, dense_above=None)

    def _stand_for(self, kernel: Kernel) -> None:
        facts = kernel.shape, kernel.dtype, kernel.tensors[0].device
        backend = registry.backends()[kernel.backend]
        source = (
            *(lambda: backend.dense(kernel), lambda: (_parameter_of, _parts_of(backend.restore(kernel)))),
            lambda: tuple(_version(each) for each in kernel.tensors),
        )
        known = self.__dict__.get("_packed_weight")
        if known is not None and (tuple(known.shape), known.dtype, known.device) == facts:
            known.source.set(*facts, *source)  # whoever holds the parameter sees the weight that was loaded
        else:
            # not by setattr, which would register it under this name
            self.__dict__["_packed_weight"] = PackedParameter.of(Source(*facts, *source))
        self._show_weight()

    def _show_weight(self) -> None:
        """Put the parameter before the bias, as nn.Linear has them; the module knows the name as a property."""
        rest = {name: each for name, each in self._parameters.items() if name != "weight"}
        self._parameters.clear()
        self._parameters.update({"weight": self._packed_weight, **rest})  # type: ignore[dict-item]

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._layout]

    def _facts(self) -> tuple[str, str, int, int, torch.dtype]:
        return self.kernel.backend, self._name, self.out_features, self.in_features, self.kernel.dtype

    @contextmanager
    def _only_the_rest(self) -> Iterator[None]:
        """Let torch's own code see the parameters that are what they seem: all but the packed weight."""
        rest = {name: each for name, each in self._parameters.items() if name != "weight"}
        whole, self.__dict__["_parameters"] = self._parameters, rest
        try:
            yield
        finally:
            whole.update(rest)
            self.__dict__["_parameters"] = whole

    # --- saved, copied, moved ---------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """Move or convert through the canonical form; ``fn`` is asked on one element where it leads."""
        probe = fn(torch.empty(1, dtype=self.dtype, device=self.device))
        shared = probe.is_cpu and probe.is_shared()  # type: ignore[no-untyped-call]
        kernel = None
        if shared or probe.dtype != self.dtype or probe.device != self.device:
            kernel = self._prepared(moved(self.packed(), probe.device, probe.dtype))
        layout = {name: self._buffers.pop(name) for name in self._layout}
        try:
            with self._only_the_rest():
                super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(layout)
        if kernel is not None:
            self._hold(kernel, shared)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The module with the canonical form in place of the layout."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state["_buffers"] = {name: value for name, value in self._buffers.items() if name not in self._layout}
        state["_parameters"] = {name: value for name, value in self._parameters.items() if name != "weight"}
        state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set - set(self._layout)
        state["packed"] = _pickled(self.packed())
        for name in _OF_THE_KERNEL:
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Prepare the layout anew for this machine."""
        state = dict(state)
        packed = state.pop("packed")
        choice = state.pop("choice", None) or _choice_of_older(state, packed.numbers)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._layout, self.choice = (), choice
        self._hold(self._prepared(packed))
        self._follow(choice)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        _refuse_other_files()
        # made for this call: what is written into them would be lost
        parts = {prefix + part: ReadOnly.view_of(tensor) for part, tensor in self.packed().parts.items()}
        destination.update(parts)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "weight", None)  # nothing of the module changes: threads may save it at once
        # the shapes alone do not always tell two patterns apart
        notes = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if notes is not None:
            notes["pattern"] = str(self.pattern)
            notes["numbers"] = str(self.numbers)
            notes["activation"] = self._activation

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the canonical form, checked; whatever is wrong is reported and the module stays as it was."""
        names = [prefix + part for part in self.numbers.part_names]
        rest = {key: value for key, value in state_dict.items() if key not in names}
        absent = [name for name in names if name not in state_dict]
        if absent and prefix + "weight" in state_dict:
            error_msgs.append(
                f'While loading "{prefix[:-1]}": the state holds a dense weight, this layer a packed one; load it into '
                "the dense model and pack that with sparsecomp.compile"
            )
            return
        missing_keys.extend(absent)
        kernel = None
        try:
            if not absent:
                kernel = self._loaded([state_dict[name].detach() for name in names], local_metadata)
            elif names[0] in state_dict:  # a state of floating weights has no scales
                require_kind(state_dict[names[0]], self.numbers)
        except (SparsecompError, RuntimeError) as error:
            error_msgs.append(f'While loading "{prefix[:-1]}": {error}')
            return
        errors: list[str] = []
        with self._only_the_rest():
            super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        error_msgs.extend(errors)
        if kernel is not None and not errors:
            self._hold(kernel)

    def _loaded(self, parts: list[Tensor], notes: dict[str, Any]) -> Kernel:
        shape = self.out_features, self.in_features
        packed = packed_of_state(parts, notes, self.pattern, shape, self.dtype, self.numbers, self._activation)
        if notes.get("assign_to_params_buffers", False):
            return self._prepared(packed)
        if self.device.type == "meta":
            warnings.warn("loading into a layer on the meta device does nothing; pass assign=True", stacklevel=4)
            return self.kernel
        return self._prepared(moved(packed, self.device, self.dtype))
