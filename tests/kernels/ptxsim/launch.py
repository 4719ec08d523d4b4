"""One call: a program, its arguments and memory in; the memory changed and a report out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# imported for their registrations
from tests.kernels.ptxsim import arithmetic, movement, tensor_core, warpgroup  # noqa: F401
from tests.kernels.ptxsim.machine import WARP, Machine
from tests.kernels.ptxsim.memory import GlobalMemory
from tests.kernels.ptxsim.parser import Program, SimulationError


@dataclass(frozen=True)
class Report:
    """``executed`` counts instructions by opcode, once however many threads ran them. ``races`` are in words."""

    executed: Counter[str]
    races: tuple[str, ...]


def simulate(
    program: Program,
    grid: tuple[int, int, int],
    threads: int,
    arguments: Sequence[int],
    memory: GlobalMemory,
    shared_bytes: int,
) -> Report:
    """Run ``grid`` blocks of ``threads`` threads, each with ``shared_bytes`` of dynamic shared memory.

    ``arguments`` are integers and addresses from ``memory.place``, in the order of the parameters; further parameters
    (the scratch pointers that Triton appends) are null. Raises SimulationError for a program that does what it must
    not; races are reported, since a run goes on after one.
    """
    if threads % WARP or program.threads not in (0, threads):
        raise SimulationError(f"{program.name} is made for {program.threads} threads a block, not {threads}")
    if len(arguments) > len(program.parameters):
        raise SimulationError(f"{program.name} takes {len(program.parameters)} arguments, got {len(arguments)}")
    given = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
    named = {name: value for (name, _), value in zip(program.parameters, given, strict=True)}
    machine = Machine(program, grid, threads, named, memory, shared_bytes)
    machine.run()
    return Report(machine.executed, tuple(machine.shared.races))
