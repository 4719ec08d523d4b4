"""The PTX simulator: instructions against Python's arithmetic, and what it refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests.kernels import ptxsim
from tests.kernels.ptx_snippets import TEMPLATE, run_snippet
from tests.kernels.ptxsim import GlobalMemory, SimulationError

_VALUES = np.array(
    [0, 1, 2, 3, 7, 8, 31, 32, 33, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32 - 7, 12345, 99]
    + [3 * 10**9 + 17 * i for i in range(12)],
    np.uint32,
)


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


def _truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


_INTEGER = {
    "add.s32 %r3, %r2, 77": lambda v: v + 77,
    "sub.s32 %r3, 5, %r2": lambda v: 5 - v,
    "mul.lo.s32 %r3, %r2, -3": lambda v: v * -3,
    "mul.hi.u32 %r3, %r2, 3000000000": lambda v: v * 3000000000 >> 32,
    "mul.hi.s32 %r3, %r2, -1000000000": lambda v: _signed(v) * -1000000000 >> 32,
    "div.s32 %r3, %r2, -7": lambda v: _truncated(_signed(v), -7),
    "rem.s32 %r3, %r2, 7": lambda v: _signed(v) - 7 * _truncated(_signed(v), 7),
    "div.u32 %r3, %r2, 7": lambda v: v // 7,
    "min.s32 %r3, %r2, -5": lambda v: min(_signed(v), -5),
    "max.u32 %r3, %r2, 70000": lambda v: max(v, 70000),
    "neg.s32 %r3, %r2": lambda v: -v,
    "not.b32 %r3, %r2": lambda v: ~v,
    "xor.b32 %r3, %r2, 0xff00ff": lambda v: v ^ 0xFF00FF,
    "shl.b32 %r3, %r2, 4": lambda v: v << 4,
    "shl.b32 %r3, %r2, 32": lambda v: 0,
    "shr.u32 %r3, %r2, 31": lambda v: v >> 31,
    "shr.u32 %r3, %r2, 40": lambda v: 0,
    "shr.s32 %r3, %r2, 3": lambda v: _signed(v) >> 3,
    "shr.s32 %r3, %r2, 40": lambda v: _signed(v) >> 31,
    "popc.b32 %r3, %r2": lambda v: v.bit_count(),
    "bfe.u32 %r3, %r2, 5, 7": lambda v: v >> 5 & 127,
    "bfe.s32 %r3, %r2, 28, 3": lambda v: (v >> 28 & 7) - (8 if v >> 30 & 1 else 0),
    "bfi.b32 %r3, %r2, 0x12345678, 8, 12": lambda v: 0x12345678 & ~0xFFF00 | (v & 0xFFF) << 8,
    "cvt.s8.s32 %r3, %r2": lambda v: (v & 255) - 2 * (v & 128),
    "cvt.s16.s32 %r3, %r2": lambda v: (v & 0xFFFF) - 2 * (v & 0x8000),
    "cvt.u8.u32 %r3, %r2": lambda v: v & 255,
    "abs.f16x2 %r3, %r2": lambda v: v & 0x7FFF7FFF,
    "neg.bf16x2 %r3, %r2": lambda v: v ^ 0x80008000,
    "prmt.b32 %r3, %r2, 0x44332211, 0x0415": lambda v: (0x22) | (v >> 8 & 255) << 8 | 0x11 << 16 | (v & 255) << 24,
}


def test_registers_of_a_scope_have_names_of_their_own() -> None:
    scope = """{
	.reg .b16 h<2>;
	.reg .b32 w<2>;
	mov.b32 {h0, h1}, %r2;
	mov.b32 w1, {h1, h0};
	add.s32 %r2, w1, 1;
	}"""
    got, _ = run_snippet(f"ld.global.b32 %r2, [%rd4];\n{scope}\n{scope}\nst.global.b32 [%rd5], %r2;", _VALUES)
    swapped = [(int(value) >> 16 | int(value) << 16) + 1 & 0xFFFFFFFF for value in _VALUES]
    assert got.tolist() == [((value >> 16 | value << 16) + 1) & 0xFFFFFFFF for value in swapped]
    with pytest.raises(ptxsim.SimulationError, match="two types"):
        run_snippet("{ .reg .b16 h<2>; } { .reg .b32 h<2>; }", _VALUES)


@pytest.mark.parametrize("instruction", _INTEGER)
def test_integers(instruction: str) -> None:
    got, _ = run_snippet(f"ld.global.b32 %r2, [%rd4];\n{instruction};\nst.global.b32 [%rd5], %r3;", _VALUES)
    assert got.tolist() == [_INTEGER[instruction](int(value)) % 2**32 for value in _VALUES]


def test_wide_products_and_comparisons_are_signed_where_they_say_so() -> None:
    body = """ld.global.b32 %r2, [%rd4];
	mul.wide.s32 %rd6, %r2, 2;
	shr.u64 %rd7, %rd6, 32;
	cvt.u32.u64 %r3, %rd7;
	setp.lt.s32 %p1, %r2, 0;
	setp.lt.u32 %p2, %r2, 100;
	selp.b32 %r4, 1000, 0, %p1;
	add.s32 %r3, %r3, %r4;
	@!%p2 add.s32 %r3, %r3, 5;
	st.global.b32 [%rd5], %r3;"""
    got, _ = run_snippet(body, _VALUES)
    wanted = [
        ((_signed(int(v)) * 2 >> 32) + (1000 if _signed(int(v)) < 0 else 0) + (0 if v < 100 else 5)) % 2**32
        for v in _VALUES
    ]
    assert got.tolist() == wanted


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_halves_round_as_torch_rounds(kind: str, dtype: torch.dtype) -> None:
    numbers = torch.randn(32) * 10.0 ** torch.randint(-6, 5, (32,)).float()
    numbers[:3] = torch.tensor([1 + 2.0**-9, 65519.0, -0.0])
    body = f"""ld.global.b32 %r2, [%rd4];
	cvt.rn.{kind}x2.f32 %r3, 0f3F800000, %r2;
	st.global.b32 [%rd5], %r3;"""
    got, _ = run_snippet(body, numbers.numpy().view(np.uint32))
    assert np.array_equal(got & 0xFFFF, numbers.to(dtype).view(torch.int16).numpy().view(np.uint16))
    assert set(got >> 16) == {int(torch.ones(1).to(dtype).view(torch.int16)[0])}


def test_a_register_that_nothing_writes_holds_poison() -> None:
    got, _ = run_snippet("mov.b32 %r2, {%rs1, %rs2};\nst.global.b32 [%rd5], %r2;", _VALUES)
    assert set(got.tolist()) == {0xCCCCCCCC}


def test_threads_that_part_meet_again() -> None:
    body = """mov.b32 %r2, 0;
	mov.b32 %r3, 0;
$loop:
	add.s32 %r3, %r3, %r2;
	add.s32 %r2, %r2, 1;
	setp.le.s32 %p1, %r2, %r1;
	@%p1 bra $loop;
	setp.lt.s32 %p2, %r1, 3;
	@%p2 bra $small;
	add.s32 %r3, %r3, 1000;
$small:
	st.global.b32 [%rd5], %r3;"""
    got, report = run_snippet(body, _VALUES)
    assert got.tolist() == [i * (i + 1) // 2 + (0 if i < 3 else 1000) for i in range(32)]
    assert report.executed["st"] == 1


def test_matrices_are_loaded_and_transposed() -> None:
    body = """ld.global.b32 %r2, [%rd4];
	shl.b32 %r4, %r1, 2;
	st.shared.b32 [%r4], %r2;
	bar.sync 0;
	and.b32 %r5, %r1, 7;
	shl.b32 %r5, %r5, 4;
	ldmatrix.sync.aligned.m8n8.x1.{trans}shared.b16 {{%r6}}, [%r5];
	st.global.b32 [%rd5], %r6;"""
    words = np.arange(64, dtype=np.uint16).view(np.uint32)
    straight, _ = run_snippet(body.format(trans=""), words)
    turned, _ = run_snippet(body.format(trans="trans."), words)
    assert np.array_equal(straight, words)
    assert np.array_equal(turned.view(np.uint16).reshape(8, 8), np.arange(64).reshape(8, 8).T)


@pytest.mark.parametrize(("kind", "wanted"), [("s8", 2**32 - 7), ("u8", 249), ("b8", 249), ("s16", 2**32 - 7)])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_a_wider_register_holds_the_sign_of_what_is_loaded(kind: str, wanted: int, space: str) -> None:
    words = np.full(32, 2**32 - 7, np.uint32)
    through = {
        "global": f"ld.global.{kind} %r2, [%rd4];",
        "shared": "shl.b32 %r3, %r1, 2;\nld.global.b32 %r4, [%rd4];\nst.shared.b32 [%r3], %r4;\n"
        f"ld.shared.{kind} %r2, [%r3];",
    }[space]
    assert set(run_snippet(f"{through}\nst.global.b32 [%rd5], %r2;", words)[0].tolist()) == {wanted}


def test_a_shuffle_moves_registers_between_lanes() -> None:
    body = "shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;\nst.global.b32 [%rd5], %r2;"
    assert run_snippet(body, _VALUES)[0].tolist() == [i ^ 5 for i in range(32)]


@pytest.mark.parametrize(("kind", "wanted"), [("max.s32", 2**31 - 1), ("min.s32", -(2**31)), ("max.u32", 2**32 - 1)])
def test_a_warp_combines_its_integers(kind: str, wanted: int) -> None:
    body = f"ld.global.b32 %r2, [%rd4];\nredux.sync.{kind} %r3, %r2, -1;\nst.global.b32 [%rd5], %r3;"
    assert set(run_snippet(body, _VALUES)[0].tolist()) == {wanted % 2**32}


_REFUSED = {
    "out of bounds": "ld.global.b32 %r2, [%rd4+64];",
    "in the gap before a buffer": "ld.global.b32 %r2, [%rd1+-4];",
    "misaligned": "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd4];",
    "shared out of bounds": "shl.b32 %r2, %r1, 2;\nst.shared.b32 [%r2+4096], %r1;",
    "shared misaligned": "st.shared.b32 [%r1], %r1;",
    "barrier": "setp.lt.s32 %p1, %r1, 7;\n@%p1 bra $end;\nbar.sync 0;\n$end:",
    "part of a warp": "setp.lt.s32 %p1, %r1, 7;\n@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];",
    "spill": "ld.local.b32 %r2, [%r1];",
    "not known": "dp4a.u32.u32 %r2, %r1, %r1, %r1;",
    "read before it is written": "add.s32 %r2, %r98, 1;\nmov.b32 %r98, 0;",
    "runs past": "bra $end;\nret;\n$end:\n",
    "no end": "$loop:\nbra $loop;",
}


@pytest.mark.parametrize("name", _REFUSED)
def test_what_a_program_must_not_do_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.kernels.ptxsim.machine._MOST_STEPS", 1000)
    body = _REFUSED[name]
    text = TEMPLATE.format(body=body, threads=32)
    if name == "runs past":
        text = re.sub(r"ret;\s*\}\s*$", "}", text)
    memory = GlobalMemory()
    source, target = (memory.place(np.zeros(32, np.uint32)) for _ in range(2))
    reason = {
        "in the gap before a buffer": "out of bounds",
        "misaligned": "not aligned",
        "shared out of bounds": "out of bounds",
        "shared misaligned": "not aligned",
        "spill": "is there a spill",
        "barrier": "barrier is not reached",
    }.get(name, name)
    with pytest.raises(SimulationError, match=reason):
        ptxsim.simulate(ptxsim.parse(text), (1, 1, 1), 32, [source, target], memory, 4096)


_EXCHANGE = """shl.b32 %r2, %r1, 2;
	xor.b32 %r3, %r2, {other};
	st.shared.b32 [%r2], %r1;
	{barrier}
	ld.shared.b32 %r4, [%r3];
	st.global.b32 [%rd5], %r4;"""


def test_a_missing_barrier_between_warps_is_a_race() -> None:
    # the result is right even so: here a warp runs on only when all have stored
    for other, barrier, races in ((128, "bar.sync 0;", 0), (128, "", 1), (64, "", 0)):
        got, report = run_snippet(_EXCHANGE.format(other=other, barrier=barrier), _VALUES, threads=64)
        assert got.tolist() == [i ^ (other // 4) for i in range(64)]
        assert len(report.races) == races


@pytest.mark.parametrize(("value", "races"), [("%r4", 0), ("%r1", 1)])
def test_warps_may_store_the_same_value_to_one_place_but_no_other(value: str, races: int) -> None:
    body = f"""and.b32 %r4, %r1, 31;
	shl.b32 %r2, %r4, 2;
	st.shared.b32 [%r2], {value};
	bar.sync 0;
	ld.shared.b32 %r3, [%r2];
	st.global.b32 [%rd5], %r3;"""
    got, report = run_snippet(body, _VALUES, threads=64)
    assert len(report.races) == races
    assert races or got.tolist() == [i % 32 for i in range(64)]


_PIPELINE = """shl.b32 %r2, %r1, 4;
	cvt.u64.u32 %rd6, %r2;
	add.s64 %rd7, %rd1, %rd6;
	cp.async.cg.shared.global [%r2], [%rd7], 0x10, 0x10;
	cp.async.commit_group;
	cp.async.cg.shared.global [%r2+1024], [%rd7+1024], 0x10, {read};
	cp.async.commit_group;
	cp.async.wait_group {outstanding};
	{barrier}
	xor.b32 %r3, %r2, 512;
	ld.shared.b32 %r4, [%r3];
	{overwrite}
	{wait}
	st.global.b32 [%rd5], %r4;"""


def _pipeline(
    read: str = "0x10", outstanding: int = 1, barrier: str = "bar.sync 0;", overwrite: str = "", wait: bool = True
) -> tuple[np.ndarray, ptxsim.Report]:
    text = "cp.async.wait_group 0;" if wait else ""
    body = _PIPELINE.format(read=read, outstanding=outstanding, barrier=barrier, overwrite=overwrite, wait=text)
    return run_snippet(body, np.arange(512, dtype=np.uint32), threads=64)


def test_copies_land_with_their_group() -> None:
    got, report = _pipeline()
    assert report.races == () and got.tolist() == [4 * (i ^ 32) for i in range(64)]


def test_zeros_fill_what_a_copy_does_not_read() -> None:
    got, _ = _pipeline(read="0", outstanding=0, overwrite="ld.shared.b32 %r4, [%r3+1024];")
    assert not got.any()


@pytest.mark.parametrize(
    ("change", "race"),
    [
        ({"outstanding": 2}, "a read meets a copy in flight"),
        ({"barrier": ""}, "a read meets another warp's write"),
        ({"overwrite": "st.shared.b32 [%r2+1024], %r4;"}, "a write meets a copy in flight"),
        ({"overwrite": "st.shared.b32 [%r2], %r4;"}, "a write meets another warp's read"),
        ({"wait": False}, "a cp.async was never waited for"),
    ],
)
def test_each_fault_of_a_pipeline_is_a_race(change: dict[str, object], race: str) -> None:
    _, report = _pipeline(**change)  # type: ignore[arg-type]
    assert any(found.startswith(race) for found in report.races), report.races


def test_blocks_have_shared_memory_of_their_own_and_two_stores_to_one_place_are_a_race() -> None:
    body = "shl.b32 %r2, %r1, 2;\nst.shared.b32 [%r2], %r1;\nld.shared.b32 %r3, [%r2];\nst.global.b32 [%rd5], %r3;"
    got, report = run_snippet(body, _VALUES, blocks=2)
    assert got.tolist() == list(range(32))
    assert len(report.races) == 1 and "stored by two threads" in report.races[0]


def test_a_text_without_a_kernel_is_refused() -> None:
    with pytest.raises(SimulationError, match=r"no \.entry"):
        ptxsim.parse(".version 8.7")


def test_a_launch_of_other_threads_or_too_many_arguments_is_refused() -> None:
    program = ptxsim.parse(TEMPLATE.format(body="", threads=64))
    with pytest.raises(SimulationError, match="64 threads a block, not 32"):
        ptxsim.simulate(program, (1, 1, 1), 32, [], GlobalMemory(), 0)
    with pytest.raises(SimulationError, match="takes 3 arguments, got 4"):
        ptxsim.simulate(program, (1, 1, 1), 64, [0, 0, 0, 0], GlobalMemory(), 0)


@pytest.mark.parametrize("opcode", ["add", "sub", "mul"])
def test_packed_halves_are_rounded_each(opcode: str) -> None:
    numbers = torch.tensor([[1.0, -3.5], [2.0**-9, 257.0], [torch.inf, 0.1]] * 11)[:32].to(torch.bfloat16)
    other = torch.tensor([1.5, 3.0]).to(torch.bfloat16)
    word = int(other.view(torch.int32)[0])
    body = (
        f"ld.global.b32 %r2, [%rd4];\nmov.b32 %r3, {word};\n{opcode}.bf16x2 %r4, %r2, %r3;\nst.global.b32 [%rd5], %r4;"
    )
    got, _ = run_snippet(body, numbers.view(torch.int32).flatten().numpy().view(np.uint32))
    wanted = getattr(torch, opcode)(numbers, other)
    assert torch.equal(torch.from_numpy(got.view(np.int32).copy()).view(torch.bfloat16).view(32, 2), wanted)
