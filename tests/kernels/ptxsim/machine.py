"""All threads of a launch: their registers, where each of them is, and what runs next.

Knows no instruction: families register theirs with ``operation``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from tests.kernels.ptxsim.memory import GlobalMemory, SharedMemory
from tests.kernels.ptxsim.parser import (
    WIDTHS,
    Address,
    Immediate,
    Instruction,
    Operand,
    Program,
    Register,
    SimulationError,
    Symbol,
    Vector,
)
from tests.kernels.ptxsim.values import UNSIGNED, Array, decode, encode, resize

WARP = 32
_POISON = 0xCCCC_CCCC_CCCC_CCCC
_MOST_STEPS = 2_000_000

Handler = Callable[["Machine", Instruction], None]
OPERATIONS: dict[str, Handler] = {}


def operation(*opcodes: str) -> Callable[[Handler], Handler]:
    """Register the meaning of some opcodes."""

    def register(handler: Handler) -> Handler:
        OPERATIONS.update(dict.fromkeys(opcodes, handler))
        return handler

    return register


@dataclass
class Flight:
    """An asynchronous product that some threads have not waited for: registers it uses, shared memory it reads.

    ``threads`` are bools, ``groups`` the number of the group that each thread has put it in; ``readers`` and
    ``addresses`` are pairs of a thread and 16 bytes of its block's shared memory.
    """

    threads: Array
    groups: Array
    registers: frozenset[str]
    readers: Array
    addresses: Array
    what: str


class Machine:
    """State of a launch of ``grid`` blocks of ``threads`` threads, a multiple of 32."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        threads: int,
        arguments: Mapping[str, int],
        memory: GlobalMemory,
        shared_bytes: int,
    ) -> None:
        self.program, self.arguments, self.memory = program, arguments, memory
        self.threads_per_block = threads
        blocks = grid[0] * grid[1] * grid[2]
        self.total = blocks * threads
        self.shared = SharedMemory(blocks, max(shared_bytes, 16), threads)
        self.executed: Counter[str] = Counter()
        self.active = np.ones(self.total, bool)
        self._registers: dict[str, Array] = _special_registers(grid, threads)
        self._targets = {
            part.name
            for instruction in program.instructions
            if instruction.operands
            for part in vector(instruction.operands[0])
            if isinstance(part, Register)
        }
        self._position = np.zeros(self.total, np.int64)
        self._alive = np.ones(self.total, bool)
        self._waiting = np.zeros(self.total, bool)
        self._block = np.arange(self.total) // threads
        self.flights: list[Flight] = []
        self._asynchronous = False
        self._committed = np.zeros(self.total, np.int64)
        self._unfenced: dict[str, Array] = {}

    # --- operands ---------------------------------------------------------------------------------------------------

    def bits(self, operand: Operand, width: int) -> Array:
        """The bits of a scalar operand for every thread."""
        if isinstance(operand, Register):
            self._check_flights(operand.name, "read")
            if operand.name not in self._registers:
                if operand.name in self._targets:
                    raise SimulationError(f"register {operand.name} is read before it is written")
                # nothing ever writes it: the compiler's way to say that any value will do
                return np.full(self.total, _POISON & ((1 << 8 * width) - 1), UNSIGNED[width])
            return resize(self._registers[operand.name], width)
        if isinstance(operand, Immediate):
            return np.full(self.total, operand.bits & ((1 << 8 * width) - 1), UNSIGNED[width])
        if isinstance(operand, Symbol):  # the block's shared memory starts at 0
            return np.zeros(self.total, UNSIGNED[width])
        raise SimulationError(f"{operand} is no scalar")

    def read(self, operand: Operand, kind: str) -> Array:
        """A scalar operand as numbers of a PTX type."""
        return decode(self.bits(operand, WIDTHS[kind]), kind)

    def predicate(self, operand: Operand) -> Array:
        """A predicate register, or the constant 0 or 1, as bools."""
        if isinstance(operand, Immediate):
            return np.full(self.total, bool(operand.bits & 1))
        assert isinstance(operand, Register)
        return self._registers[operand.name]

    def write(self, operand: Operand, numbers: Array, kind: str) -> None:
        """Write numbers of a PTX type to a register of the active threads."""
        self.write_bits(operand, encode(numbers, kind))

    def write_bits(self, operand: Operand, bits: Array) -> None:
        """Write raw bits to a register of the active threads, at the register's own width."""
        assert isinstance(operand, Register)
        name = operand.name
        if name == "_":
            return
        self._check_flights(name, "written")
        if not self._asynchronous and name in self.program.asynchronous:
            self._unfenced[name] = self._unfenced.get(name, False) | self.active
        if bits.dtype != bool:
            bits = resize(bits, self.program.widths[name.rstrip("0123456789")])
        if self.all_active:
            self._registers[name] = bits
            return
        before = self._registers.get(name)
        if before is None:
            poison = _POISON & ((1 << 8 * bits.dtype.itemsize) - 1)
            before = np.full(self.total, bool(poison) if bits.dtype == bool else poison, bits.dtype)
        self._registers[name] = np.where(self.active, bits, before)

    def addresses(self, operand: Operand) -> Array:
        """What [base + offset] points to, uint64, for every thread."""
        assert isinstance(operand, Address)
        return self.bits(operand.base, 8) + np.uint64(operand.offset & ((1 << 64) - 1))

    def full_warps(self, what: str) -> Array:
        """Bools [warps]: which of them are active. An instruction of whole warps must not find parts of one."""
        lanes = self.active.reshape(-1, WARP)
        whole = lanes.all(axis=1)
        if (lanes.any(axis=1) & ~whole).any():
            raise SimulationError(f"only a part of a warp reaches: {what}")
        return whole

    # --- asynchronous products --------------------------------------------------------------------------------------

    @contextmanager
    def asynchronous(self) -> Iterator[None]:
        """While a product is issued: such products keep their own order, and need no wait between them."""
        self._asynchronous = True
        try:
            yield
        finally:
            self._asynchronous = False

    def issue(self, registers: frozenset[str], readers: Array, addresses: Array, what: str) -> None:
        """Note a product of the active threads, in the open group of each of them."""
        for name in registers:
            if name in self._unfenced and (self._unfenced[name] & self.active).any():
                raise SimulationError(f"{name} was written after the last wgmma.fence")
        self.shared.begin_reading(readers, addresses, what)
        self.flights.append(Flight(self.active.copy(), self._committed.copy(), registers, readers, addresses, what))

    def fence_registers(self) -> None:
        """What the active threads have written to registers is there for asynchronous products."""
        self._unfenced = {name: left for name, mask in self._unfenced.items() if (left := mask & ~self.active).any()}

    def commit(self) -> None:
        """Close the group of the active threads."""
        self._committed[self.active] += 1

    def wait(self, outstanding: int) -> None:
        """End the products of the active threads, but for their latest ``outstanding`` closed groups."""
        kept = []
        for flight in self.flights:
            due = flight.threads & self.active & (flight.groups < self._committed - outstanding)
            chosen = due[flight.readers]
            if chosen.any():
                self.shared.end_reading(flight.readers[chosen], flight.addresses[chosen], flight.what)
            flight.threads = flight.threads & ~due
            flight.readers, flight.addresses = flight.readers[~chosen], flight.addresses[~chosen]
            if flight.threads.any():
                kept.append(flight)
        self.flights = kept

    def _check_flights(self, name: str, verb: str) -> None:
        if self._asynchronous:
            return
        for flight in self.flights:
            if name in flight.registers and (flight.threads & self.active).any():
                raise SimulationError(f"{name} is {verb} before the product that uses it was waited for")

    @property
    def running(self) -> Array:
        """Indices of the active threads."""
        return np.flatnonzero(self.active)

    # --- order of execution -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Execute until every thread has left."""
        instructions = self.program.instructions
        for _ in range(_MOST_STEPS):
            ready = self._alive & ~self._waiting
            if not ready.any():
                if not self._alive.any():
                    self.shared.finish()
                    if self.flights:
                        raise SimulationError("a wgmma was never waited for")
                    return
                self._release()
                continue
            position = int(self._position[ready].min()) if not ready.all() else int(self._position.min())
            if position >= len(instructions):
                raise SimulationError("execution runs past the last instruction")
            self._step(instructions[position], ready & (self._position == position))
        raise SimulationError(f"no end after {_MOST_STEPS} steps")

    def _step(self, instruction: Instruction, here: Array) -> None:
        self._position[here] += 1
        self.active = here
        if instruction.guard is not None:
            name, negated = instruction.guard
            self.active = here & (self._registers[name] ^ negated)
            if not self.active.any():
                return
        self.all_active = bool(self.active.all())
        self.executed[instruction.opcode] += 1
        handler = OPERATIONS.get(instruction.opcode)
        if handler is None:
            raise SimulationError(f"line {instruction.line}: {instruction.text} is not known to the simulator")
        try:
            handler(self, instruction)
        except SimulationError as error:
            raise SimulationError(f"line {instruction.line}: {instruction.text}: {error}") from error

    def jump(self, label: str) -> None:
        """Continue the active threads at a label."""
        self._position[self.active] = self.program.labels[label]

    def leave(self) -> None:
        """End the active threads."""
        self._alive &= ~self.active

    def wait_for_block(self) -> None:
        """Hold the active threads until all threads of their block wait at the same barrier."""
        self._waiting |= self.active

    def _release(self) -> None:
        """Nobody can run: every block that still lives must wait, whole, at one barrier."""
        by_block = (-1, self.threads_per_block)
        alive, position = self._alive.reshape(by_block), self._position.reshape(by_block)
        blocks = np.flatnonzero(alive.any(axis=1))
        if not alive[blocks].all() or (position[blocks] != position[blocks][:, :1]).any():
            raise SimulationError("a barrier is not reached by every thread of its block")
        self._waiting[:] = False
        self.shared.barrier(blocks)

    all_active = True


def vector(operand: Operand) -> tuple[Operand, ...]:
    """The parts of {a, b, ...}, or the operand alone."""
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _special_registers(grid: tuple[int, int, int], threads: int) -> dict[str, Array]:
    blocks = grid[0] * grid[1] * grid[2]
    thread = np.tile(np.arange(threads, dtype=np.uint32), blocks)
    block = np.repeat(np.arange(blocks, dtype=np.uint32), threads)
    ones, zeros = np.ones_like(thread), np.zeros_like(thread)
    index = (block % grid[0], block // grid[0] % grid[1], block // (grid[0] * grid[1]))
    registers = {"%laneid": thread % WARP, "%warpid": thread // WARP}
    for axis, name in enumerate("xyz"):
        registers[f"%tid.{name}"] = thread if axis == 0 else zeros
        registers[f"%ntid.{name}"] = ones * np.uint32(threads if axis == 0 else 1)
        registers[f"%ctaid.{name}"] = index[axis].astype(np.uint32)
        registers[f"%nctaid.{name}"] = ones * np.uint32(grid[axis])
    return registers
