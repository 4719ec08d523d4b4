"""Which kernel runs a layer and why, for people: the choice, the bound, the times, what was rejected.

Takes kernels, bounds and measurements that exist, gives printable values. Decides and measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsecomp.backends import registry
from sparsecomp.backends.base import Kernel
from sparsecomp.backends.choice import Choice, unpacks
from sparsecomp.backends.gpu.cuda import uncertified
from sparsecomp.errors import ModelError
from sparsecomp.machine.bound import Bound, known_bound
from sparsecomp.machine.device import detect
from sparsecomp.machine.request import Request
from sparsecomp.machine.timings import lookup
from sparsecomp.reporting.figures import microseconds

BY_NAME = "asked for by name"
FASTEST = "the fastest of the backends that run it, measured when the model was planned"


@dataclass(frozen=True)
class Explanation:
    """Which kernel runs a request, and why; ``str()`` is for people.

    ``seconds`` holds what was measured on this machine before, by candidate, or None. ``rejected`` names every other
    backend with the reason. ``epilogue`` says how an activation is applied, if the layer has one; ``notes`` are what
    else should be known. ``bound`` is None where the peaks of the device could not be measured.
    """

    request: Request
    kernel: str
    reason: str
    bound: Bound | None
    seconds: Mapping[str, float] | None
    rejected: tuple[tuple[str, str], ...]
    epilogue: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Some lines: the request, the kernel, the bound, the times, the rejected."""
        out, columns = self.request.shape
        numbers = self.request.numbers
        weights = f", {numbers.product_in_words}," if numbers.has_scales else ""
        lines = [
            f"{out}x{columns} {self.request.pattern} {self.request.dtype}{weights} on {self.request.device}, "
            f"batch {self.request.batch}",
            f"  kernel    {self.kernel}: {self.reason}",
        ]
        if self.epilogue:
            lines.append(f"  epilogue  {self.epilogue}")
        if self.bound is not None:
            lines.append(f"  bound     {self.bound} over dense, on the measured peaks of this machine")
        if self.seconds is None:
            lines.append("  measured  not yet on this machine; sparsecomp.compiler.summary measures it")
        else:
            times = ", ".join(f"{name} {microseconds(value)}" for name, value in self.seconds.items())
            lines.append(f"  measured  {times}")
        lines += [f"  note      {note}" for note in self.notes]
        lines += [f"  rejected  {name}: {reason}" for name, reason in self.rejected]
        return "\n".join(lines)


def explain_kernel(kernel: Kernel, batch: int, choice: Choice, activation: str = "none") -> Explanation:
    """Why ``kernel`` runs a batch of that many rows in a layer that follows ``choice``."""
    if not isinstance(batch, int) or batch < 0:
        raise ModelError(f"batch={batch!r} is not a number of rows; use 0 or more")
    device = str(kernel.tensors[0].device)
    request = Request(kernel.pattern, kernel.shape, kernel.dtype, device, batch, kernel.numbers)
    if device == "meta":
        return Explanation(request, "none", "the layer is on the meta device and has no values", None, None, ())
    answers = {**dict(registry.explain(request)), **dict(kernel.refused)}
    chosen = kernel.backend
    unpacked = unpacks(choice.dense_above, batch)
    if choice.pinned:
        reason = BY_NAME
    elif unpacked:
        reason = (
            f"from {choice.dense_above} rows on, unpacking the weight and a dense product was measured to be faster"
        )
    elif chosen == choice.backend:
        reason = FASTEST
    else:
        reason = "the first backend, in order of preference, that runs this request"
    runs = "runs it too"
    if not choice.pinned:
        after = f"comes after {chosen} in the order of preference"
        runs += f", {'was not the fastest' if chosen == choice.backend else after}"
    rejected = tuple((name, why or runs) for name, why in answers.items() if name != chosen)
    where = detect(device)
    known = lookup(request, chosen, where)
    limit = known_bound(request, where, warm=known is None or not known.cold)
    epilogue = ""
    if activation != "none":
        fused = registry.backends()[chosen].fuses_activations and not unpacked
        epilogue = f"{activation}, {'inside the kernel' if fused else 'by torch, after the product'}"
    seconds = None if known is None else dict(known.seconds)
    notes: list[str] = []
    if where.kind == "cuda" and not registry.backends()[chosen].of_a_vendor:
        notes += filter(None, [uncertified(device)])
    if kernel.numbers.activation_bits is not None and (unpacked or chosen == "dense"):
        notes.append("the dense weight is multiplied, by x as it is: activations are not rounded")
    if limit is None:
        notes.append("the bound is unknown: measuring the peaks of the device needs more memory than is free")
    return Explanation(request, chosen, reason, limit, seconds, rejected, epilogue, tuple(notes))
