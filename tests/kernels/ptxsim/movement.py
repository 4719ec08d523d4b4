"""Control flow, barriers, loads and stores, asynchronous copies, matrix loads and shuffles."""

from __future__ import annotations

import numpy as np

from tests.kernels.ptxsim.machine import WARP, Machine, operation, vector
from tests.kernels.ptxsim.parser import WIDTHS, Address, Immediate, Instruction, SimulationError, Symbol
from tests.kernels.ptxsim.values import UNSIGNED, Array, decode


@operation("bra")
def branch(machine: Machine, instruction: Instruction) -> None:
    """Threads go their own ways and meet where the smaller address waits for them."""
    (label,) = instruction.operands
    assert isinstance(label, Symbol)
    machine.jump(label.name)


@operation("ret", "exit")
def leave(machine: Machine, instruction: Instruction) -> None:
    """The thread ends."""
    machine.leave()


@operation("bar", "barrier")
def barrier(machine: Machine, instruction: Instruction) -> None:
    """bar.sync 0 of the whole block; bar.warp orders a warp, which runs in step here anyway."""
    if instruction.has("warp"):
        return
    if instruction.has("red", "arrive") or [*instruction.operands] != [Immediate(0)]:
        raise SimulationError("only barrier 0 of the whole block is known to the simulator")
    machine.wait_for_block()


@operation("membar", "fence")
def fence(machine: Machine, instruction: Instruction) -> None:
    """Every store is visible at once here, but to asynchronous products, which a proxy fence passes it on to."""
    if instruction.has("proxy") and instruction.has("async"):
        machine.shared.fence(machine.running)


def _space(instruction: Instruction) -> str:
    for name in ("param", "global", "shared"):
        if instruction.has(name):
            return name
    raise SimulationError("only param, global and shared memory are known to the simulator; is there a spill?")


@operation("ld")
def load(machine: Machine, instruction: Instruction) -> None:
    """One to four neighbouring values; a parameter is the same for every thread."""
    targets, width = vector(instruction.operands[0]), WIDTHS[instruction.type]
    source = instruction.operands[1]
    assert isinstance(source, Address)
    space = _space(instruction)
    if space == "param":
        assert isinstance(source.base, Symbol) and source.offset == 0 and len(targets) == 1
        value = machine.arguments[source.base.name] & ((1 << 8 * width) - 1)
        machine.write_bits(targets[0], np.full(machine.total, value, UNSIGNED[width]))
        return
    running = machine.running
    addresses = machine.addresses(source)[running]
    if space == "global":
        values = machine.memory.load(addresses, width, len(targets))
    else:
        values = machine.shared.load(running, addresses, width, len(targets), _place(instruction))
    for target, value in zip(targets, values, strict=True):
        if instruction.type[0] == "s":
            # a register wider than the type holds the sign on
            value = decode(value, instruction.type).astype(np.int64).view(np.uint64)
        machine.write_bits(target, _spread(machine, running, value))


@operation("st")
def store(machine: Machine, instruction: Instruction) -> None:
    """One to four neighbouring values."""
    sources, width, space = vector(instruction.operands[1]), WIDTHS[instruction.type], _space(instruction)
    running = machine.running
    addresses = machine.addresses(instruction.operands[0])[running]
    values = [machine.bits(source, width)[running] for source in sources]
    if space == "global":
        clash = machine.memory.store(addresses, values, running)
        if clash is not None:
            machine.shared.races.append(f"{clash}: {_place(instruction)}")
    else:
        machine.shared.store(running, addresses, values, _place(instruction))


@operation("cp")
def asynchronous_copy(machine: Machine, instruction: Instruction) -> None:
    """cp.async with its groups."""
    if not instruction.has("async") or instruction.has("bulk", "mbarrier"):
        raise SimulationError("of cp only cp.async with groups is known to the simulator")
    running, operands = machine.running, instruction.operands
    if instruction.has("commit_group"):
        machine.shared.commit(running)
    elif instruction.has("wait_group"):
        (outstanding,) = operands
        assert isinstance(outstanding, Immediate)
        machine.shared.wait(running, outstanding.bits, machine.memory, _place(instruction))
    elif instruction.has("wait_all"):
        machine.shared.commit(running)
        machine.shared.wait(running, 0, machine.memory, _place(instruction))
    else:
        assert isinstance(operands[2], Immediate)
        count = operands[2].bits
        read = machine.read(operands[3], "u32")[running] if len(operands) > 3 else np.full(len(running), count)
        if (read > count).any():
            raise SimulationError(f"the copy reads more than its {count} bytes")
        target, source = (machine.addresses(operand)[running] for operand in operands[:2])
        machine.shared.copy(running, target, source, read.astype(np.int64), count, _place(instruction))


@operation("ldmatrix")
def load_matrix(machine: Machine, instruction: Instruction) -> None:
    """8x8 matrices of 16-bit elements: lanes 8i to 8i+7 point at rows of matrix i; lane l gets row l/4, pair l%4."""
    targets = vector(instruction.operands[0])
    if not instruction.has("m8n8"):
        raise SimulationError("of ldmatrix only m8n8 is known to the simulator")
    warps = np.flatnonzero(machine.full_warps(instruction.text))
    addresses = machine.addresses(instruction.operands[1]).reshape(-1, WARP)[warps]
    for i, target in enumerate(targets):
        lanes = slice(8 * i, 8 * i + 8)
        threads = (warps[:, None] * WARP + np.arange(WARP)[lanes]).reshape(-1)
        rows = machine.shared.rows(threads, addresses[:, lanes].reshape(-1), _place(instruction)).reshape(-1, 8, 8)
        if instruction.has("trans"):
            rows = rows.transpose(0, 2, 1)
        words = np.ascontiguousarray(rows).view(np.uint32).reshape(-1)
        machine.write_bits(target, _spread(machine, machine.running, words))


@operation("shfl")
def shuffle(machine: Machine, instruction: Instruction) -> None:
    """Lanes of a whole warp exchange a register; segments narrower than a warp are not known."""
    machine.full_warps(instruction.text)
    mode = next(name for name in ("idx", "bfly", "up", "down") if instruction.has(name))
    target, source, lane = instruction.operands[:3]
    values = machine.bits(source, 4).reshape(-1, WARP)
    argument, own = machine.read(lane, "u32").reshape(-1, WARP).astype(np.int64), np.arange(WARP)
    wanted = {"idx": argument, "bfly": own ^ argument, "up": own - argument, "down": own + argument}[mode]
    wanted = np.where((wanted >= 0) & (wanted < WARP), wanted, own)
    machine.write_bits(target, np.take_along_axis(values, wanted, axis=1).reshape(-1))


_REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


@operation("redux")
def reduce_warp(machine: Machine, instruction: Instruction) -> None:
    """Integers of all lanes of a whole warp, combined."""
    machine.full_warps(instruction.text)
    target, source, _ = instruction.operands
    combine = next(function for name, function in _REDUCE.items() if instruction.has(name))
    values = machine.read(source, instruction.type).reshape(-1, WARP)
    combined = combine.reduce(values, axis=1, dtype=values.dtype)
    machine.write(target, np.repeat(combined, WARP), instruction.type)


def _spread(machine: Machine, running: Array, values: Array) -> Array:
    """Values of the running threads as a register of all."""
    if machine.all_active:
        return values
    whole = np.zeros(machine.total, values.dtype)
    whole[running] = values
    return whole


def _place(instruction: Instruction) -> str:
    return f"line {instruction.line}: {instruction.text}"
