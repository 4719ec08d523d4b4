"""Dense wgmma in the simulator: A in registers and in shared memory, every swizzle, and each way to misuse it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels import ptxsim
from tests.kernels.ptx_snippets import run_snippet
from tests.kernels.ptxsim import SimulationError

_THREADS, _COLUMNS = 128, 16
_B_AT, _IMAGE = 8192, 10240  # bytes of shared memory: A, then B
_LAYOUTS = {128: 1, 64: 2, 32: 3}
_PRODUCT = "wgmma.mma_async.sync.aligned.m64n16k16.f32.{kind}.{kind} {{{sums}}}, {a}, %rd21, %p1, 1, 1{trans};"
_WAIT = "wgmma.wait_group.sync.aligned 0;"
_SUMS = ",".join(f"%r{40 + i}" for i in range(8))


def _body(kind: str, a: str, pitch: int, part: int) -> str:
    """Fill shared memory and the registers of A, multiply once on top of sums of 1, and store the sums."""

    def descriptor(start: int) -> int:
        return (start + 32 * part) >> 4 | (8 * pitch >> 4) << 32 | _LAYOUTS[pitch] << 62

    lines = ["mul.wide.u32 %rd6, %r1, 16;", "add.s64 %rd7, %rd1, %rd6;", "shl.b32 %r2, %r1, 4;"]
    for at in range(0, _IMAGE, 16 * _THREADS):
        lines.append(f"ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd7+{at}];")
        lines.append(f"st.shared.v4.b32 [%r2+{at}], {{%r10, %r11, %r12, %r13}};")
    lines += [
        f"ld.global.v4.b32 {{%r30, %r31, %r32, %r33}}, [%rd7+{_IMAGE}];",
        "bar.sync 0;",
        "fence.proxy.async.shared::cta;",
        f"mov.b64 %rd20, {descriptor(0)};",
        f"mov.b64 %rd21, {descriptor(_B_AT)};",
        "setp.ne.b32 %p1, 1, 0;",
        *(f"mov.b32 %r{40 + i}, 0x3f800000;" for i in range(8)),
        "wgmma.fence.sync.aligned;",
        _PRODUCT.format(kind=kind, sums=_SUMS, a=a, trans=", 0" if a.startswith("{") else ", 0, 0"),
        "wgmma.commit_group.sync.aligned;",
        _WAIT,
        "mul.wide.u32 %rd6, %r1, 32;",
        "add.s64 %rd8, %rd2, %rd6;",
        "st.global.v4.b32 [%rd8], {%r40, %r41, %r42, %r43};",
        "st.global.v4.b32 [%rd8+16], {%r44, %r45, %r46, %r47};",
    ]
    return "\n".join(lines)


def _image(matrix: np.ndarray, pitch: int, part: int, octets: np.ndarray) -> None:
    """Put rows of 32 bytes where the PTX manual's figures of the swizzled layouts have them."""
    chunks = pitch // 16
    for row, content in enumerate(matrix):
        for half in range(2):
            # 8 chunks: exchanged by the row; 4 chunks: by each two rows; 2 chunks: by each four
            chunk = 2 * part + half ^ row * pitch // 128 % 8 % chunks
            at = row * pitch + 16 * chunk
            octets[at : at + 16] = content[8 * half : 8 * half + 8].view(np.uint8)


def _product(
    kind: str = "f16", in_registers: bool = True, pitch: int = 128, part: int = 0, change: tuple[str, str] = ("", "")
) -> tuple[np.ndarray, np.ndarray, ptxsim.Report]:
    """The sums [64, 16] that were made and those that should be, and the report."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    generator = torch.Generator().manual_seed(pitch + part)
    a, b = (torch.randint(-8, 9, (rows, 16), generator=generator).to(dtype) for rows in (64, _COLUMNS))
    bits = [each.view(torch.int16).numpy().view(np.uint16) for each in (a, b)]
    octets = np.full(_IMAGE, 0xFF, np.uint8)
    _image(bits[0], pitch, part, octets[:_B_AT])
    _image(bits[1], pitch, part, octets[_B_AT:])
    fragments = np.zeros((_THREADS, 4, 2), np.uint16)
    for thread in range(_THREADS):
        warp, lane = divmod(thread, 32)
        for register in range(4):
            for e in range(2):
                row = 16 * warp + lane // 4 + 8 * (register % 2)
                fragments[thread, register, e] = bits[0][row, 2 * (lane % 4) + 8 * (register // 2) + e]
    words = np.concatenate([octets.view(np.uint32), fragments.reshape(-1).view(np.uint32)])
    body = _body(kind, "{%r30, %r31, %r32, %r33}" if in_registers else "%rd20", pitch, part)
    assert change[0] in body
    got, report = run_snippet(
        body.replace(*change) if change[0] else body, words, 8 * _THREADS, _THREADS, shared=_IMAGE
    )
    sums = np.zeros((64, _COLUMNS), np.float32)
    for thread, numbers in enumerate(got.view(np.float32).reshape(_THREADS, 8)):
        warp, lane = divmod(thread, 32)
        for i in range(8):
            sums[16 * warp + lane // 4 + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2] = numbers[i]
    return sums, (a.double() @ b.double().T + 1).numpy(), report


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("in_registers", [True, False])
@pytest.mark.parametrize(("pitch", "part"), [(128, 0), (128, 1), (128, 3), (64, 0), (64, 1), (32, 0)])
def test_a_product_of_integers_is_exact(kind: str, in_registers: bool, pitch: int, part: int) -> None:
    sums, wanted, report = _product(kind, in_registers, pitch, part)
    assert np.array_equal(sums, wanted) and report.races == ()
    assert report.executed["wgmma"] == 4


@pytest.mark.parametrize(
    "change",
    [
        (f"{1 << 62 | 64 << 32 | _B_AT >> 4}", f"{1 << 62 | 32 << 32 | _B_AT >> 4}"),
        (f"{1 << 62 | 64 << 32 | _B_AT >> 4}", f"{2 << 62 | 64 << 32 | _B_AT >> 4}"),
    ],
    ids=["stride", "swizzle"],
)
def test_another_descriptor_gives_another_product(change: tuple[str, str]) -> None:
    sums, wanted, _ = _product(change=change)
    assert not np.array_equal(sums, wanted)


@pytest.mark.parametrize(
    ("change", "race"),
    [
        (("fence.proxy.async.shared::cta;", ""), "no fence.proxy.async"),
        (("bar.sync 0;", ""), "another warp's write"),
        (
            ("wgmma.commit_group.sync.aligned;", "wgmma.commit_group.sync.aligned; st.shared.b32 [%r2+0], %r10;"),
            "reads",
        ),
        (
            (
                "wgmma.wait_group.sync.aligned 0;",
                "bar.sync 0; wgmma.wait_group.sync.aligned 0; st.shared.b32 [8192], %r10;",
            ),
            "another warp's read",
        ),
    ],
    ids=["proxy", "barrier", "still reads", "no barrier after the wait"],
)
def test_memory_out_of_order_is_a_race(change: tuple[str, str], race: str) -> None:
    *_, report = _product(in_registers=False, change=change)
    assert any(race in each for each in report.races)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("wgmma.fence.sync.aligned;", ""), r"%r[34]\d was written after the last wgmma.fence"),
        ((_WAIT, ""), "is read before the product that uses it was waited for"),
        (("wait_group.sync.aligned 0;", "wait_group.sync.aligned 1;"), "is read before the product"),
        (("wgmma.commit_group.sync.aligned;", "mov.b32 %r30, 0;"), "%r30 is written before the product"),
        ((", 1, 1, 0;", ", 1, 1, 1;"), "negated and transposed"),
        ((", 1, 1, 0;", ", 1, -1, 0;"), "negated and transposed"),
        (("m64n16k16.f32", "m64n16k16.f16"), "of wgmma only the shapes of f16 and bf16"),
        (("m64n16k16", "m64n16k32"), "of wgmma only the shapes of f16 and bf16"),
        (("wgmma.fence", "setp.lt.u32 %p2, %r1, 64; @%p2 wgmma.fence"), "was written after"),
        (("wgmma.mma_async", "setp.lt.u32 %p2, %r1, 64; @%p2 wgmma.mma_async"), "only a part of four warps"),
        ((f"{1 << 62 | 64 << 32 | _B_AT >> 4}", f"{64 << 32 | _B_AT >> 4}"), "begins at offset 0"),
        (("setp.ne.b32 %p1", "cvt.u64.u32 %rd22, %r1; add.s64 %rd21, %rd21, %rd22; setp.ne.b32 %p1"), "share a desc"),
    ],
    ids=str,
)
def test_misuse_is_refused(change: tuple[str, str], error: str) -> None:
    with pytest.raises(SimulationError, match=error):
        _product(change=change)


def test_a_product_nobody_waits_for_is_refused() -> None:
    body = _body("f16", "{%r30, %r31, %r32, %r33}", 128, 0)
    body = body[: body.index("wgmma.wait_group")]
    with pytest.raises(SimulationError, match="never waited for"):
        run_snippet(body, np.zeros(_IMAGE // 4 + 4 * _THREADS, np.uint32), 8 * _THREADS, _THREADS, shared=_IMAGE)
