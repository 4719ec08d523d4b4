"""Executes compiled PTX on the CPU, exactly enough to tell whether a GEMM kernel is right.

Triton and Gluon emit PTX for a GPU that need not be there; ``simulate`` runs it. All blocks of a grid run at once:
every register is a numpy array with an element for each thread of the launch, and the instruction with the smallest
address that some thread waits at is executed next for all threads that wait there, so that divergent threads meet
again.

What it proves: indexing, layouts, predicates, tails, metadata, the order of a pipeline. What it checks beyond the
result: bounds and alignment of each access, shared memory races between warps, copies read while in flight, bytes of
global memory that two threads store, barriers that not every thread reaches, metadata that does not ascend, registers
and shared memory that an asynchronous product still uses or that no fence has passed on to it.

What it knows nothing of: time, caches, bank conflicts, races between threads of one warp, TMA, mbarriers, clusters and
weak memory order. Tensor-core products are summed exactly and rounded once to fp32, which no hardware promises; a test
must allow the error of an fp32 sum. An instruction it does not know is an error, never skipped.

Modules: ``parser`` (text to instructions), ``values`` (bits to numbers), ``memory`` (global and shared), ``machine``
(threads, registers, order of execution), and one for each family of instructions: ``arithmetic``, ``movement``,
``tensor_core``, ``warpgroup``.
"""

from tests.kernels.ptxsim.launch import Report, simulate
from tests.kernels.ptxsim.memory import GlobalMemory
from tests.kernels.ptxsim.parser import Program, SimulationError, parse

__all__ = ["GlobalMemory", "Program", "Report", "SimulationError", "parse", "simulate"]
