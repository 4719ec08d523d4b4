"""Runs a measuring process that may crash or hang, and starts it again without what brought it down.

A kernel that no GPU has run yet may fault, which spoils the process's CUDA context, or never end. The worker says what
it is about to do and what it found in a journal, a file of JSON lines. Standard library only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUIET_S = 75.0
"""A worker that writes nothing for so long hangs: no engine compiles and tunes for longer."""

_GRACE_S = 12.0
_POLL_S = 0.25
_MOST_STARTS = 12

Entry = dict[str, Any]


class Journal:
    """A file of JSON lines that one process writes and another reads; every line is on disk when ``add`` returns."""

    def __init__(self, path: Path) -> None:
        """The file need not exist."""
        self.path = path

    def add(self, **entry: Any) -> None:
        """Append one entry."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read(self) -> list[Entry]:
        """All entries; a line that a killed process left unfinished is passed over."""
        entries = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        return entries

    def of(self, name: str) -> list[Any]:
        """The values that were recorded under a name."""
        return [entry[name] for entry in self.read() if name in entry]


def supervise(command: Sequence[str], journal: Journal, deadline: float, quiet: float = QUIET_S) -> None:
    """Run ``command`` until it ends well or ``deadline`` (time.monotonic()) has passed by more than some grace.

    The worker records {"at": [engine, case]} before each engine's turn. One that dies or hangs there is recorded as
    {"failed": ...} and {"banned": engine}, or, when no engine can be named, as {"done": case}; workers read the journal
    and leave out what is banned or done.
    """
    for _ in range(_MOST_STARTS):
        how = _run(command, journal, deadline, quiet)
        if how is None:
            return
        places = journal.of("at")
        if not places or time.monotonic() > deadline or how == "":
            journal.add(failed=f"the measuring process {how or 'ran out of time'}")
            return
        engine, case = places[-1]
        journal.add(failed=f"{engine or 'all engines in turn'}, {case}: the process {how}; left out from here on")
        journal.add(**({"banned": engine} if engine else {"done": case}))
    journal.add(failed=f"the measuring process was started {_MOST_STARTS} times; given up")


def _run(command: Sequence[str], journal: Journal, deadline: float, quiet: float) -> str | None:
    """None if it ended well, else how it ended; "" if it was ended for lack of time."""
    # in the group of this process: whoever ends the one ends the other
    process = subprocess.Popen(command, stdout=sys.stderr)
    size, last = -1, time.monotonic()
    try:
        while (status := process.poll()) is None:
            time.sleep(_POLL_S)
            now, written = time.monotonic(), journal.path.stat().st_size if journal.path.exists() else 0
            if written != size:
                size, last = written, now
            if now > deadline + _GRACE_S:
                return ""
            if now - last > quiet:
                return f"said nothing for {quiet:g} s and was ended"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if status == 0:
        return None
    return f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"
