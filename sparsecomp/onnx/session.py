"""An ONNX file -> an ONNX Runtime session with our operator library registered, or the stock session and a warning."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsecomp.errors import BackendError, FormatError
from sparsecomp.onnx.extra import require

LIBRARY_NAME = "libsparsecomp_ort.so"


def library_path() -> Path | None:
    """Where the operator library is installed, or None if it was not built."""
    import sparsecomp

    # an editable install keeps compiled files apart from the sources, in another folder of the package's path
    found = (Path(folder) / LIBRARY_NAME for folder in sparsecomp.__path__)
    return next((path for path in found if path.is_file()), None)


def onnx_session(path: str | Path, *, providers: Sequence[Any] | None = None, **options: Any) -> Any:
    """An ``onnxruntime.InferenceSession`` for ``path`` that runs packed layers on the sparse CPU kernels.

    ``options`` are attributes of ``onnxruntime.SessionOptions``, such as ``intra_op_num_threads=1``; the sparse kernels
    run on the threads of the session. ``providers`` is ONNX Runtime's own list; without it, CPUExecutionProvider.
    Where the operator library is missing or cannot be registered, the session is the stock one, which
    runs the same file dense, and a RuntimeWarning says so.

    Raises BackendError for an option that SessionOptions does not have or does not take, or if onnxruntime is missing,
    and FormatError for a file that is not there or that ONNX Runtime cannot load.
    """
    ort = require("onnxruntime")
    if not Path(path).is_file():
        raise FormatError(f"{path} is not a file; give the path of an ONNX model")
    settings = _session_options(ort, options)
    warning = _register(settings)
    if warning is not None:
        warnings.warn(warning, RuntimeWarning, stacklevel=2)
    try:
        return ort.InferenceSession(str(path), settings, providers=list(providers or ["CPUExecutionProvider"]))
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        reason = " ".join(str(error).split())[:500]
        raise FormatError(
            f"ONNX Runtime cannot load {path} ({reason}); check it with onnx.checker or export it again"
        ) from error


def _session_options(ort: Any, options: dict[str, Any]) -> Any:
    settings = ort.SessionOptions()
    known = [name for name in dir(settings) if not name.startswith("_") and not callable(getattr(settings, name))]
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known
            raise BackendError(f'SessionOptions has no attribute "{name}"; did you mean one of {", ".join(near)}?')
        try:
            setattr(settings, name, value)
        except (TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise BackendError(f"SessionOptions.{name} does not take {value!r} ({reason})") from error
    return settings


def _register(settings: Any) -> str | None:
    """None once the library is registered, else the reason in words."""
    library = library_path()
    if library is None:
        return (
            f"packed layers run dense: {LIBRARY_NAME} is not installed beside the package; "
            "install sparsecomp with a C++ compiler at hand"
        )
    try:
        settings.register_custom_ops_library(str(library))
    except Exception as error:  # a loader error, or whatever ONNX Runtime raises
        return f"packed layers run dense: {library} cannot be registered ({error})"
    return None
