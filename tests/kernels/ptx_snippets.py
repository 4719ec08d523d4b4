"""A kernel around a few lines of PTX, run by the simulator."""

from __future__ import annotations

import numpy as np

from tests.kernels import ptxsim
from tests.kernels.ptxsim import GlobalMemory

TEMPLATE = """
.version 8.7
.target sm_80
.extern .shared .align 16 .b8 buffer[];
.visible .entry test(
	.param .u64 .ptr .global .align 1 test_param_0,
	.param .u64 .ptr .global .align 1 test_param_1,
	.param .u32 test_param_2
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<99>;
	.reg .b64 %rd<99>;
	ld.param.b64 %rd1, [test_param_0];
	ld.param.b64 %rd2, [test_param_1];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd3, %r1, 4;
	add.s64 %rd4, %rd1, %rd3;
	add.s64 %rd5, %rd2, %rd3;	// where this thread reads and writes its word
	{body}
	ret;
}}
"""


def run_snippet(
    body: str, words: np.ndarray, out_words: int | None = None, threads: int = 32, shared: int = 4096, blocks: int = 1
) -> tuple[np.ndarray, ptxsim.Report]:
    """Run ``body``; the output words, and the report. %rd4 points to the thread's input word, %rd5 to its output."""
    memory = GlobalMemory()
    source = memory.place(words.astype(np.uint32))
    target = memory.place(np.zeros(out_words or threads, np.uint32))
    program = ptxsim.parse(TEMPLATE.format(body=body, threads=threads))
    report = ptxsim.simulate(program, (blocks, 1, 1), threads, [source, target, len(words)], memory, shared)
    return memory.fetch(target).view(np.uint32), report
