"""Fragments, word by word, where CUTLASS's traits of wgmma.sp with the weight in registers expect them.

The layouts are what CuTe 4.2.0 prints of MMA_Traits<SM90::GMMA::SPARSE::GMMA_64x32x32_F32F16F16_RS>: they map thread
and value to row + 64 * column of a weight of 64 x 32, zeros included; a value of metadata stands for one column.
"""

from __future__ import annotations

import torch

from sparsecomp.packing.format import pack
from sparsecomp.packing.layouts.fragments import to_fragments

Layout = tuple[tuple[int, ...], tuple[int, ...]]
A_THREADS: Layout = ((4, 8, 4), (256, 1, 16))
A_VALUES: Layout = ((4, 2, 2), (64, 8, 1024))
E_THREADS: Layout = ((2, 2, 8, 4), (1024, 0, 1, 16))
E_VALUES: Layout = ((16, 2), (64, 8))


def _place(layout: Layout, index: int) -> int:
    """CuTe's rule: the first mode of a layout runs fastest."""
    place = 0
    for size, stride in zip(*layout, strict=True):
        place += index % size * stride
        index //= size
    return place


def test_words_are_where_cutlass_reads_them() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(64, 16, 4, generator=generator).argsort(dim=2) < 2).view(64, 64)
    packed = pack((torch.randn(64, 64, generator=generator) * mask).to(torch.float16), "2:4")
    fragments, metadata = to_fragments(packed)
    kept, positions = packed.values.view(torch.int16).view(64, 16, 2), packed.positions()
    for part in range(2):  # an instruction takes 32 columns, and the selector says which lanes hold their metadata
        for thread in range(128):
            warp, lane = thread // 32, thread % 32
            words = fragments[warp, part].view(32, 4)[lane]
            for value in range(16):
                index = _place(A_THREADS, thread) + _place(A_VALUES, value)
                row, group = index % 64, index // 64 // 4 + 8 * part
                # four columns of the weight are one register: the two values kept of them
                assert torch.equal(words[value // 4].view(1).view(torch.int16), kept[row, group])
            if lane // 2 % 2 != part:
                continue
            word = int(metadata.view(32, 4)[lane, warp]) & 0xFFFFFFFF
            for value in range(0, 32, 4):
                index = _place(E_THREADS, thread) + _place(E_VALUES, value)
                row, group = index % 64, index // 64 // 4 + 8 * part
                first, second = positions[row, group].tolist()
                assert word >> value & 15 == first | second << 2
