"""Global memory with bounds, and the shared memory of every block with a race check between its barriers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.kernels.ptxsim.parser import SimulationError
from tests.kernels.ptxsim.values import UNSIGNED, Array

_BASE = 0x7F00_0000_0000
_GAP = 256
POISON = 0xCC
GRANULE = 2
"""Bytes of shared memory watched as one: two warps that touch the same granule touch the same memory."""

_NOBODY, _SEVERAL = -1, -2


class GlobalMemory:
    """Buffers with guard gaps between them, in one array. A byte that two threads store is reported as a race."""

    def __init__(self) -> None:
        self._bytes = np.zeros(0, np.uint8)
        self._inside = np.zeros(0, bool)
        self._owner = np.zeros(0, np.int32)
        self._sizes: dict[int, int] = {}

    def place(self, content: Array) -> int:
        """Copy a contiguous array in; its address, a multiple of 256."""
        raw = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
        offset, end = self._bytes.size, raw.size + _GAP + -raw.size % _GAP
        # what lies between buffers reads as poison in case bounds are ever computed wrongly here
        self._bytes = np.concatenate([self._bytes, raw, np.full(end - raw.size, POISON, np.uint8)])
        self._inside = np.concatenate([self._inside, np.arange(end) < raw.size])
        self._owner = np.full(self._bytes.size, _NOBODY, np.int32)
        self._sizes[_BASE + offset] = raw.size
        return _BASE + offset

    def fetch(self, address: int) -> Array:
        """The bytes of the buffer placed there, uint8."""
        offset = address - _BASE
        return self._bytes[offset : offset + self._sizes[address]].copy()

    def load(self, addresses: Array, width: int, count: int) -> list[Array]:
        """``count`` neighbouring values of ``width`` bytes at each address."""
        index = self._offsets(addresses, width * count) // width
        values = self._bytes.view(UNSIGNED[width])
        return [values[index + i] for i in range(count)]

    def store(self, addresses: Array, values: list[Array], threads: Array) -> str | None:
        """Write neighbouring values at each address; the reason if another thread has stored there too."""
        width = values[0].dtype.itemsize
        offsets = self._offsets(addresses, width * len(values))
        whole = self._bytes.view(UNSIGNED[width])
        for i, value in enumerate(values):
            whole[offsets // width + i] = value
        # the first byte of each value stands for all: accesses are aligned
        marks = np.concatenate([offsets + i * width for i in range(len(values))])
        threads = np.tile(threads, len(values))
        before = self._owner[marks]
        self._owner[marks] = threads
        clash = (before != _NOBODY) & (before != threads) | (self._owner[marks] != threads)
        return f"global byte {marks[clash][0]:#x} is stored by two threads" if clash.any() else None

    def read_bytes(self, addresses: Array, count: int) -> Array:
        """[addresses, count] bytes, for copies to shared memory."""
        return self._bytes[self._offsets(addresses, count)[:, None] + np.arange(count)]

    def _offsets(self, addresses: Array, size: int) -> Array:
        offsets = addresses.astype(np.int64) - _BASE
        if (offsets % size).any():
            raise SimulationError(f"a global access of {size} bytes is not aligned")
        if offsets.size and (
            offsets.min() < 0
            or offsets.max() + size > self._inside.size
            or not (self._inside[offsets] & self._inside[offsets + size - 1]).all()
        ):
            raise SimulationError(f"a global access of {size} bytes is out of bounds")
        return offsets


@dataclass
class _Copies:
    """cp.async of one instruction: per thread a destination, a source, how many bytes it reads, and its group."""

    threads: Array
    destinations: Array
    sources: Array
    bytes_read: Array
    groups: Array
    count: int

    def part(self, chosen: Array) -> _Copies:
        """Those of some of the threads."""
        fields = (self.threads, self.destinations, self.sources, self.bytes_read, self.groups)
        return _Copies(*(each[chosen] for each in fields), self.count)


class SharedMemory:
    """``size`` bytes for each block. An epoch of a block ends with each of its barriers.

    Products read it by a path of their own (the async proxy), from their issue to the wait for them: what was written
    since the last fence.proxy.async is not there for them.

    A race is two warps that touch the same granule in one epoch, one of them writing, unless both write the same value:
    compilers let warps that hold the same data store it. So is any touch of a granule that a cp.async still writes, and
    a write to one that a product still reads. A copy lands as late as it may: when its thread waits for its group.
    """

    def __init__(self, blocks: int, size: int, threads_per_block: int) -> None:
        self.size = size + -size % 16
        total = blocks * threads_per_block
        self._bytes = np.full(blocks * self.size, POISON, np.uint8)
        self._block = np.arange(total) // threads_per_block
        self._warp = np.arange(total) // 32
        self._epoch = np.arange(blocks, dtype=np.int64)
        self._last_epoch = blocks
        self._committed = np.zeros(total, np.int64)
        self._pending: list[_Copies] = []
        granules = self._bytes.size // GRANULE
        self._writer, self._reader = (np.full(granules, _NOBODY, np.int64) for _ in range(2))
        self._write_epoch, self._read_epoch = (np.full(granules, _NOBODY, np.int64) for _ in range(2))
        self._in_flight = np.zeros(granules, bool)
        self._being_read = np.zeros(granules, np.int32)
        self._unfenced = np.zeros(granules, bool)
        self.races: list[str] = []

    def barrier(self, blocks: Array) -> None:
        """Begin a new epoch in each of these blocks."""
        self._epoch[blocks] = self._last_epoch + np.arange(len(blocks))
        self._last_epoch += len(blocks)

    def load(self, threads: Array, addresses: Array, width: int, count: int, what: str) -> list[Array]:
        """``count`` neighbouring values of ``width`` bytes at each address, which counts from the block's start."""
        offsets = self._offsets(threads, addresses, width * count)
        self._read(threads, offsets, width * count, what)
        values = self._bytes.view(UNSIGNED[width])
        return [values[offsets // width + i] for i in range(count)]

    def store(self, threads: Array, addresses: Array, values: list[Array], what: str) -> None:
        """Write neighbouring values at each address."""
        width = values[0].dtype.itemsize
        offsets = self._offsets(threads, addresses, width * len(values))
        whole = self._bytes.view(UNSIGNED[width])
        places = [offsets // width + i for i in range(len(values))]
        repeated = np.all([whole[place] == value for place, value in zip(places, values, strict=True)], axis=0)
        for place, value in zip(places, values, strict=True):
            whole[place] = value
        agreed = np.all([whole[place] == value for place, value in zip(places, values, strict=True)], axis=0)
        self._write(threads, offsets, width * len(values), what, repeated, agreed)

    def rows(self, threads: Array, addresses: Array, what: str) -> Array:
        """[addresses, 8] 16-bit values: the rows of 16 bytes that ldmatrix reads."""
        self._read(threads, self._offsets(threads, addresses, 16), 16, what)
        return self.peek(threads, addresses)

    def peek(self, threads: Array, addresses: Array) -> Array:
        """What ``rows`` gives, for a product whose reading was noted."""
        offsets = self._offsets(threads, addresses, 16)
        return self._bytes.view(np.uint16)[offsets[:, None] // 2 + np.arange(8)]

    def copy(self, threads: Array, addresses: Array, sources: Array, bytes_read: Array, count: int, what: str) -> None:
        """cp.async: ``bytes_read`` bytes from global memory, zeros up to ``count``; it lands with its group."""
        destinations = self._offsets(threads, addresses, count)
        self._write(threads, destinations, count, what)
        self._in_flight[_granules(destinations, count)] = True
        self._pending.append(
            _Copies(threads, destinations, sources, bytes_read, self._committed[threads].copy(), count)
        )

    def commit(self, threads: Array) -> None:
        """Close the current group of each thread."""
        self._committed[threads] += 1

    def wait(self, threads: Array, outstanding: int, memory: GlobalMemory, what: str) -> None:
        """Land what these threads copied, but for their latest ``outstanding`` closed groups (and the open one)."""
        waiting = np.zeros(self._committed.size, bool)
        waiting[threads] = True
        kept = []
        for copies in self._pending:
            due = waiting[copies.threads] & (copies.groups < self._committed[copies.threads] - outstanding)
            if due.any():
                self._land(copies.part(due), memory, what)
            if not due.all():
                kept.append(copies.part(~due))
        self._pending = kept

    def begin_reading(self, threads: Array, addresses: Array, what: str) -> None:
        """A product of these threads, which reads 16 bytes at each address until ``end_reading``."""
        offsets = self._offsets(threads, addresses, 16)
        self._read(threads, offsets, 16, what)
        at = _granules(offsets, 16)
        if self._unfenced[at].any():
            self._note("a product reads what no fence.proxy.async has passed on", what)
        np.add.at(self._being_read, at, 1)

    def end_reading(self, threads: Array, addresses: Array, what: str) -> None:
        """The threads have waited for it, in this epoch."""
        offsets = self._offsets(threads, addresses, 16)
        np.add.at(self._being_read, _granules(offsets, 16), -1)
        self._read(threads, offsets, 16, what)

    def fence(self, threads: Array) -> None:
        """What was written to the blocks of these threads is there for products."""
        self._unfenced.reshape(-1, self.size // GRANULE)[np.unique(self._block[threads])] = False

    def finish(self) -> None:
        """Note copies that nobody waited for."""
        if self._pending:
            self._note("a cp.async was never waited for", "exit")

    def _land(self, copies: _Copies, memory: GlobalMemory, what: str) -> None:
        self._in_flight[_granules(copies.destinations, copies.count)] = False
        self._write(copies.threads, copies.destinations, copies.count, what)
        content = np.zeros((len(copies.threads), copies.count), np.uint8)
        for size in np.unique(copies.bytes_read):
            if size:
                chosen = copies.bytes_read == size
                content[chosen, :size] = memory.read_bytes(copies.sources[chosen], int(size))
        self._bytes[copies.destinations[:, None] + np.arange(copies.count)] = content

    def _offsets(self, threads: Array, addresses: Array, size: int) -> Array:
        local = addresses.astype(np.int64)
        if (local % size).any():
            raise SimulationError(f"a shared access of {size} bytes is not aligned")
        if local.size and (local.min() < 0 or local.max() + size > self.size):
            raise SimulationError(f"a shared access of {size} bytes is out of bounds ({self.size} bytes)")
        return local + self._block[threads] * self.size

    def _read(self, threads: Array, offsets: Array, size: int, what: str) -> None:
        at, warp, epoch = self._touched(threads, offsets, size)
        if self._in_flight[at].any():
            self._note("a read meets a copy in flight", what)
        if ((self._write_epoch[at] == epoch) & (self._writer[at] != warp)).any():
            self._note("a read meets another warp's write", what)
        shared = (self._read_epoch[at] == epoch) & (self._reader[at] != warp)
        self._reader[at] = np.where(shared, _SEVERAL, warp)
        # two warps of this very instruction: the last one has overwritten the others
        crowded = at[(self._reader[at] != warp) & ~shared]
        self._reader[crowded] = _SEVERAL
        self._read_epoch[at] = epoch

    def _write(
        self,
        threads: Array,
        offsets: Array,
        size: int,
        what: str,
        repeated: Array | None = None,
        agreed: Array | None = None,
    ) -> None:
        """``repeated``: the thread writes what was there; ``agreed``: what it wrote is there after all have written."""
        at, warp, epoch = self._touched(threads, offsets, size)
        none = np.zeros(len(threads), bool)
        per_thread = at.size // max(len(threads), 1)
        repeated, agreed = (np.repeat(none if each is None else each, per_thread) for each in (repeated, agreed))
        if self._in_flight[at].any():
            self._note("a write meets a copy in flight", what)
        if self._being_read[at].any():
            self._note("a write meets a product that still reads", what)
        self._unfenced[at] = True
        if ((self._write_epoch[at] == epoch) & (self._writer[at] != warp) & ~repeated).any():
            self._note("a write meets another warp's write", what)
        if ((self._read_epoch[at] == epoch) & (self._reader[at] != warp)).any():
            self._note("a write meets another warp's read", what)
        self._writer[at] = warp
        if ((self._writer[at] != warp) & ~agreed).any():
            self._note("two warps write at once", what)
        self._write_epoch[at] = epoch

    def _touched(self, threads: Array, offsets: Array, size: int) -> tuple[Array, Array, Array]:
        at = _granules(offsets, size)
        shape = (len(threads), at.size // max(len(threads), 1))
        warp = np.broadcast_to(self._warp[threads][:, None], shape).reshape(-1)
        epoch = np.broadcast_to(self._epoch[self._block[threads]][:, None], shape).reshape(-1)
        return at, warp, epoch

    def _note(self, race: str, what: str) -> None:
        self.races.append(f"{race}: {what}")


def _granules(offsets: Array, size: int) -> Array:
    return (offsets[:, None] // GRANULE + np.arange(-(-size // GRANULE))).reshape(-1)
