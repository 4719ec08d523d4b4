"""Objects in processes of their own: threads that one engine leaves spinning or pinned cannot disturb another's.

Takes factories, gives what their objects' methods answer. Knows nothing of what is measured.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

from sparsecomp.engines.timing import use_threads
from sparsecomp.errors import SparsecompError
from sparsecomp.onnx.threads import unbound

# a process that has not ended so long after its pipe closed is killed
_PATIENCE_S = 2.0
# libgomp leaves the placement of its threads to the kernel, which may wake a sleeping one on the core where the other
# waits for it: then a product takes until the next scheduler tick, 4 or 8 ms, whatever its size
_BOUND_TEAM = {"OMP_PROC_BIND": "true"}
_BINDINGS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")


class Worker:
    """An object that ``make`` builds in a new process, under ``use_threads(threads)``; it ends with its parent."""

    def __init__(
        self, name: str, make: Callable[[], object], threads: int, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start the process; the first ``answer`` is None, given when the object is there. ``make`` is pickled
        and names nothing of the program that runs.

        ``environment`` is added to the process's own, in time for libraries that read theirs when they load.
        """
        # no fork: the engines' pools do not survive one
        context = get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, threads), name=name, daemon=True)
        with _added(environment or {}), _main_of_its_own():
            self._process.start()
        theirs.close()

    def tell(self, method: str, *arguments: object) -> None:
        """Have it call a method. Raises SparsecompError if the process has ended."""
        try:
            self._pipe.send((method, arguments))
        except OSError as error:
            raise self._ended() from error

    def answer(self) -> Any:
        """What the method gave. Raises SparsecompError with the engine's name if it failed or the process ended."""
        try:
            value, failure = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if failure is not None:
            raise SparsecompError(f"{self.name} failed in its process: {failure}")
        return value

    def ask(self, method: str, *arguments: object) -> Any:
        """``tell`` and ``answer``."""
        self.tell(method, *arguments)
        return self.answer()

    def hang_up(self) -> None:
        """Close the pipe, whereupon the process ends by itself."""
        self._pipe.close()

    def wait(self) -> None:
        """Wait for the end of the process, and kill it if that takes long."""
        self._process.join(_PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ended(self) -> SparsecompError:
        self._process.join(_PATIENCE_S)
        return SparsecompError(
            f"the process of {self.name} ended with exit code {self._process.exitcode} before it answered; if it was "
            "killed (-9) for want of memory, measure smaller shapes, else leave its package out and report it there"
        )


@contextmanager
def _added(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _main_of_its_own() -> Iterator[None]:
    """Processes started within it do not run the caller's program again, which would plan or measure once more."""
    ours = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = ours


@contextmanager
def workers(
    makes: Mapping[str, Callable[[], object]], threads: int, openmp: Collection[str] = ()
) -> Iterator[dict[str, Worker]]:
    """One worker for each factory, all ready, for as long as the block runs.

    ``openmp`` names those whose threads are libgomp's. With more than one thread these are bound to cores.
    """
    started: dict[str, Worker] = {}
    try:
        with _free_cores():
            for name, make in makes.items():
                environment = _BOUND_TEAM if threads > 1 and name in openmp else None
                started[name] = Worker(name, make, threads, environment)
        for worker in started.values():
            worker.answer()
        yield started
    finally:
        for worker in started.values():
            worker.hang_up()
        for worker in started.values():
            worker.wait()


@contextmanager
def _free_cores() -> Iterator[None]:
    """Processes started within it have every core: OMP_PROC_BIND binds this one's thread, and they would inherit that.

    torch's own threads are bound in the processes of engines that use them.
    """
    kept = {name: os.environ.pop(name) for name in _BINDINGS if name in os.environ}
    try:
        with unbound():
            yield
    finally:
        os.environ.update(kept)


def ask_all(asked: Iterable[Worker], method: str, *arguments: object) -> dict[str, Any]:
    """The answers by name, of all at the same time."""
    listed = list(asked)
    for worker in listed:
        worker.tell(method, *arguments)
    return {worker.name: worker.answer() for worker in listed}


def answers(asked: Mapping[str, tuple[Worker, tuple[Any, ...]]], method: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The answers by name, of all at the same time, each to arguments of its own, and the reason for each failure."""
    given: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, (worker, arguments) in asked.items():
        try:
            worker.tell(method, *arguments)
        except SparsecompError as error:
            failed[name] = str(error)
    for name, (worker, _) in asked.items():
        if name in failed:
            continue
        try:
            given[name] = worker.answer()
        except SparsecompError as error:
            failed[name] = str(error)
    return given, failed


def _serve(pipe: Connection, make: Callable[[], object], threads: int) -> None:
    # Ctrl-C ends the parent, and with it this pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with use_threads(threads):
        subject: object = None
        failure = None
        try:
            subject = make()
        except Exception as error:  # every failure is the parent's to report
            failure = _sentence(error)
        try:
            pipe.send((None, failure))
            while True:
                method, arguments = pipe.recv()
                answer: tuple[Any, str | None]
                try:
                    answer = getattr(subject, method)(*arguments), None
                except Exception as error:  # as above
                    answer = None, _sentence(error)
                pipe.send(answer)
        except (EOFError, OSError):
            return


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, SparsecompError) else f"{type(error).__name__}: {error}"
