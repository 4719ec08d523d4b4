"""Runs the stages of a certification within a time limit: in phases, each stage a process group with a log of its own.

Standard library only, since it runs before anything is built. Knows nothing of what the stages do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_LEAST = 5.0  # a stage that would get less is not begun
_PATIENCE = 5.0  # between asking a process to end and killing it
_POLL = 0.2


@dataclass(frozen=True)
class Stage:
    """A command, how long it may take, and what must have gone well before.

    ``{seconds}`` in the command becomes what it may take. ``least`` seconds are kept free for it by the phases before.
    ``skip`` is a reason why it cannot run on this machine, known beforehand. ``judge`` takes the exit status and the
    log, and gives state, reason and whether that is a fault, as ``Outcome`` has them.
    """

    name: str
    command: tuple[str, ...]
    most: float
    least: float = 0.0
    needs: tuple[str, ...] = ()
    skip: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    judge: Callable[[int, str], tuple[str, str, bool]] = lambda status, log: by_status(status)


def by_status(status: int) -> tuple[str, str, bool]:
    """ "passed" with exit status 0, else "failed" and how."""
    how = f"exit status {status}" if status > 0 else f"signal {-status}"
    return ("failed", how, True) if status else ("passed", "", False)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: "passed", "failed", "cut short" or "not run", and why; ``fault``: something must be mended."""

    name: str
    state: str
    seconds: float
    reason: str = ""
    fault: bool = False

    def __str__(self) -> str:
        """A line of the summary."""
        return f"{self.name:<16} {self.state:<10} {self.seconds:>5.0f} s  {self.reason}".rstrip()


def run(
    phases: Sequence[Sequence[Stage]],
    end: float,
    logs: Path,
    report: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run the phases one after the other, the stages of each at the same time, until ``end`` (time.monotonic()).

    The log of a stage is ``logs``/NAME.log. ``report`` is called with all outcomes so far whenever a phase is over. A
    phase leaves to those after it the ``least`` of their longest stages, as long as it has its own.
    """
    outcomes: list[Outcome] = []
    for number, phase in enumerate(phases):
        kept = sum(max((stage.least for stage in later), default=0.0) for later in phases[number + 1 :])
        begun: list[_Running] = []
        good = {each.name for each in outcomes if each.state == "passed"}
        for stage in phase:
            unmet = [name for name in stage.needs if name not in good]
            left = end - time.monotonic()
            seconds = min(stage.most, max(left - kept, min(left, stage.least)))
            if stage.skip is not None:
                outcomes.append(Outcome(stage.name, "not run", 0, stage.skip))
            elif unmet:
                outcomes.append(Outcome(stage.name, "not run", 0, f"needs {', '.join(unmet)}"))
            elif seconds < _LEAST:
                outcomes.append(Outcome(stage.name, "not run", 0, "no time was left", True))
            else:
                begun.append(_Running(stage, seconds, logs / f"{stage.name}.log"))
        while any(each.outcome is None for each in begun):
            time.sleep(_POLL)
            for each in begun:
                each.look()
        outcomes += [each.outcome for each in begun if each.outcome is not None]
        report(outcomes)
    return outcomes


class _Running:
    """A stage under way."""

    def __init__(self, stage: Stage, seconds: float, log: Path) -> None:
        self.outcome: Outcome | None = None
        self._stage, self._seconds, self._log = stage, seconds, log
        self._begin = time.monotonic()
        self._asked: float | None = None
        command = [part.replace("{seconds}", f"{seconds:.0f}") for part in stage.command]
        with log.open("wb") as file:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **stage.environment},
                    start_new_session=True,
                )
            except OSError as error:
                self.outcome = Outcome(stage.name, "failed", 0, f"{command[0]} cannot be run: {error}", True)

    def look(self) -> None:
        """Notice that it ended, or end it: the whole group, so that no grandchild keeps the GPU busy."""
        if self.outcome is not None:
            return
        status, now = self._process.poll(), time.monotonic()
        passed = now - self._begin
        if status is None:
            if passed > self._seconds and self._asked is None:
                self._asked = now
                self._signal(signal.SIGTERM)
            elif self._asked is not None and now - self._asked > _PATIENCE:
                self._signal(signal.SIGKILL)
            return
        self._signal(signal.SIGKILL)
        if self._asked is not None:
            self.outcome = Outcome(self._stage.name, "cut short", passed, "ran out of its time", True)
        else:
            state, reason, fault = self._stage.judge(status, self._log.read_text(errors="replace"))
            self.outcome = Outcome(self._stage.name, state, passed, reason, fault)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            return  # the group is gone
