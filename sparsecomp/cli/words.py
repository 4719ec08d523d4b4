"""Advice in an error's words for Python, said again in the options of the command line.

Takes and gives text. What it does not know it leaves as it is.
"""

from __future__ import annotations

import re

# advice that names an argument of a Python call -> the option that does the same
_OPTIONS = (
    (
        r"pass (?:calibration|gram|held_out)=[^,;:]*?(?:\([^()]*\)|\.gram)+"
        r"(?: of cal(?:ibration)? = sc\.calibrate\([^()]*\))?",
        "name batches: --calibration module:function",
    ),
    (r"pass sc\.calibrate\([^()]*\)", "name batches: --calibration module:function"),
    (r"pass example=batch", "name batches: --calibration module:function"),
    (r"pass forward=lambda model, batch: \.\.\. for anything else", "return such batches from the factory"),
    (
        r"say with forward=lambda model, batch: \.\.\. how it is run",
        "name what the model takes of it: --batch-item ITEM",
    ),
    (
        r"(?:pass|use) forward=\.\.\.(?: if the model is entered another way)?",
        "name part of a batch: --batch-item ITEM",
    ),
    (r"pass mask=lambda batch: \.\.\.", "call sparsecomp.calibrate in Python with mask=lambda batch: ..."),
    (r"skip=\[[^\]]*\]", "--skip NAME"),
    (r"only=\[[^\]]*\]", "--only NAME"),
    (r"\bskip=(['\"])(.+?)\1", r"--skip '\2'"),
    (r"for example with method=(['\"])(.+?)\1", r"for example with --method \2, or leave it dense with --skip NAME"),
    (r"\bmethod=(['\"])(.+?)\1", r"--method \2"),
    (r"\bpattern=(['\"])(.+?)\1", r"--pattern \2"),
    (r"where=(['\"])everywhere\1", "--everywhere"),
    (r"where=(['\"])faster\1", "no --everywhere"),
    (r"dynamic_shapes=\.\.\.", "sparsecomp.export_onnx(..., dynamic_shapes=...) in Python"),
    (r"\bheld_out=", "--held-out "),
    (r"\bseed=", "--seed "),
    (r"\blearning_rate=", "--learning-rate "),
    (r"\bbatch=\(([^()]*?),?\)", r"--batch \1"),
)


def in_words_of_the_command_line(text: str) -> str:
    """The same sentence with options in place of arguments of Python calls."""
    text = re.sub(r"say what the model gets with forward=lambda model, batch: model\(([^()]*)\)", _item, text)
    for pattern, option in _OPTIONS:
        text = re.sub(pattern, option, text)
    return text


def _item(advice: re.Match[str]) -> str:
    """--batch-item for the parts of a batch that a function in Python would take."""
    parts = re.findall(r"batch\[\"?([^\]\"]+)\"?\]", advice[1])
    return f"name what the model takes of it: --batch-item {','.join(parts) or 'ITEM'}"
