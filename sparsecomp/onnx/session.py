"""An ONNX file -> an ONNX Runtime session with our operator library registered, or the stock session and a warning.

Must not import torch: a server that runs the file need not have it.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsecomp.errors import BackendError, FormatError
from sparsecomp.onnx.extra import require
from sparsecomp.onnx.threads import unbound

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
    runs the same file dense, and a RuntimeWarning says so. Where OMP_PROC_BIND has bound the calling thread to a core,
    the threads of the session get the others.

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
    wanted = list(providers or ["CPUExecutionProvider"])
    try:
        with unbound() as cores:
            _spread(settings, cores)
            # a second try on the CPU helps no session that was to run there, and prints to standard output
            fallback = int(wanted != ["CPUExecutionProvider"])
            return ort.InferenceSession(str(path), settings, providers=wanted, enable_fallback=fallback)
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        raise FormatError(f"ONNX Runtime cannot load {path} ({_short(error)}); {_advice(error, path)}") from error


def runs_stock(path: str | Path) -> bool:
    """Whether ONNX Runtime loads the file on a CPU without the operator library; True if it is not installed."""
    try:
        ort = require("onnxruntime")
    except BackendError:
        return True
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    try:
        ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception:  # whatever ONNX Runtime raises
        return False
    return True


def _spread(settings: Any, cores: frozenset[int]) -> None:
    """Let the threads of the pool use ``cores`` only, where they are enough for the threads that were asked for.

    The thread that calls ``run`` is one of the threads; what ONNX Runtime chooses by itself is bound by itself.
    """
    workers = settings.intra_op_num_threads - 1
    if 0 < workers <= len(cores):
        ids = ",".join(str(core + 1) for core in sorted(cores))  # counted from 1
        settings.add_session_config_entry("session.intra_op_thread_affinities", ";".join([ids] * workers))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _advice(error: Exception, path: str | Path) -> str:
    """What to do about a file that ONNX Runtime does not load."""
    text = str(error)
    if "Could not find an implementation" in text:
        if _holds_bfloat16(path):
            return (
                "it has few CPU kernels for bfloat16; export model.float() or model.half() instead, or run the file "
                "with a provider that computes in bfloat16"
            )
        return "it has no kernel of that operator and dtype for these providers; use another dtype or a newer version"
    for said, advice in _ADVICE.items():
        if said in text:
            return advice
    return "onnx.checker.check_model may say more"


_ADVICE = {
    "INVALID_PROTOBUF": "the file is no ONNX model or was cut short; export it again",
    "sparsecomp::NMLinear": "a packed layer was edited after its export; export the model again",
    "IR version": "this version is too old for the file; update onnxruntime",
    "is under development": "this version is too old for the file; update onnxruntime or export with a lower opset",
    "xternal data": "a large model has its weights in a second file; keep both in one folder",
    "is not a registered function/op": "it uses an operator of another library; register that library as well",
}


def _holds_bfloat16(path: str | Path) -> bool:
    try:
        onnx = require("onnx")
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # only what an error says depends on it
        return False
    wanted = onnx.TensorProto.BFLOAT16
    graph = model.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    return any(value.type.tensor_type.elem_type == wanted for value in values) or any(
        tensor.data_type == wanted for tensor in graph.initializer
    )


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
