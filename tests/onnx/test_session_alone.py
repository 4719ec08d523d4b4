"""A session in a process of its own: without torch, and where OpenMP has bound the thread that makes it."""

import os
import subprocess
import sys

import pytest
import torch

from sparsecomp.activations import ACTIVATIONS
from sparsecomp.onnx import export_onnx, session
from sparsecomp.onnx.function import FLOATS, OPERATORS
from tests.onnx.onnx_models import random_sparse_layer

pytestmark = pytest.mark.slow  # starts programs

# the cores each new thread may use, as the kernel tells them
_MASKS = """
import os
def masks():
    found = {}
    for thread in os.listdir("/proc/self/task"):
        text = open(f"/proc/self/task/{thread}/status").read()
        found[thread] = text.split("Cpus_allowed_list:")[1].split()[0]
    return found
"""


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("session") / "m.onnx"
    export_onnx(random_sparse_layer(8, 16, "2:4", activation="relu"), (torch.randn(2, 16),), path)
    return path


def run_alone(code, path, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(path)],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_neither_a_session_nor_a_check_needs_torch(packed_file):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, sparsecomp as sc\n"
        "from sparsecomp.onnx import verify\n"
        "made = sc.onnx_session(sys.argv[1])\n"
        "y = made.run(None, {made.get_inputs()[0].name: np.ones((3, 16), np.float32)})[0]\n"
        "print(*y.shape, verify(sys.argv[1]).fits)"
    )
    assert run_alone(code, packed_file) == ["3", "8", "True"]


@pytest.mark.skipif(session.library_path() is None, reason="the operator library is not built")
def test_the_library_needs_nothing_of_this_package(packed_file):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['sparsecomp'] = None\n"
        "import numpy as np, onnxruntime\n"
        "options = onnxruntime.SessionOptions()\n"
        f"options.register_custom_ops_library({str(session.library_path())!r})\n"
        "made = onnxruntime.InferenceSession(sys.argv[1], options)\n"
        "print(*made.run(None, {made.get_inputs()[0].name: np.ones((3, 16), np.float32)})[0].shape)"
    )
    assert run_alone(code, packed_file) == ["3", "8"]


def test_operators_are_those_of_the_activations_in_their_order():
    assert tuple(activation for kind, activation in OPERATORS.values() if kind == FLOATS) == ACTIVATIONS


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("how", ["session", "stock"])
def test_threads_of_a_session_get_the_cores_that_openmp_does_not_hold(packed_file, how):
    code = _MASKS + (
        "import sys, torch, onnxruntime, sparsecomp as sc\n"
        "own = os.sched_getaffinity(0); assert len(own) == 1, own\n"
        "before = set(masks())\n"
        "if '" + how + "' == 'session':\n"
        "    made = sc.onnx_session(sys.argv[1], intra_op_num_threads=2)\n"
        "else:\n"
        "    options = onnxruntime.SessionOptions(); options.intra_op_num_threads = 2\n"
        "    made = onnxruntime.InferenceSession(sys.argv[1], options)\n"
        "assert os.sched_getaffinity(0) == own\n"
        "print(*own, *[mask for thread, mask in masks().items() if thread not in before])"
    )
    own, *workers = run_alone(code, packed_file, OMP_PROC_BIND="true", OMP_NUM_THREADS="2")
    if how == "stock":  # what the session is spared: it shares the one core of the thread that made it
        assert workers == [own]
    else:
        assert len(workers) == 1
        allowed = {str(core) for core in os.sched_getaffinity(0)}
        assert workers[0] != own and (workers[0] in allowed or set(workers[0]) & set("-,"))


@pytest.mark.parametrize("bind", ["true", ""])
def test_cores_the_user_chose_are_kept(packed_file, bind):
    core = min(os.sched_getaffinity(0))
    code = _MASKS + (
        f"import sys; os.sched_setaffinity(0, {{{core}}})\n"
        "import torch, sparsecomp as sc\n"
        "before = set(masks())\n"
        "made = sc.onnx_session(sys.argv[1], intra_op_num_threads=2)\n"
        "print(*{mask for thread, mask in masks().items() if thread not in before})"
    )
    environment = {"OMP_PROC_BIND": bind} if bind else {}
    assert run_alone(code, packed_file, **environment) == [str(core)]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_thread_bound_by_hand_after_openmp_is_left_alone(packed_file):
    cores = sorted(os.sched_getaffinity(0))[:2]
    code = (
        "import os, sys, torch\n"
        "from sparsecomp.onnx.threads import unbound\n"
        f"os.sched_setaffinity(0, {set(cores)})\n"
        "with unbound() as others: print(len(others), *sorted(os.sched_getaffinity(0)))"
    )
    assert run_alone(code, packed_file, OMP_PROC_BIND="true") == ["0", *map(str, cores)]
