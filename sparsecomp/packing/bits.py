"""Small unsigned integers <-> bytes, least significant bit first, each row padded to whole bytes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` integers of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack_positions(positions: Tensor, bits: int) -> Tensor:
    """uint8 [rows, count] with entries below 2**bits -> uint8 [rows, packed_bytes(count, bits)]."""
    rows, count = positions.shape
    # eight integers of b bits fill exactly b bytes, whatever b is
    words = functional.pad(positions, (0, -count % 8)).view(rows, -(-count // 8), 8)
    packed = torch.zeros(rows, words.shape[1], dtype=torch.int32, device=positions.device)
    for i in range(8):
        packed |= words[..., i].to(torch.int32) << (bits * i)
    octets = torch.stack([(packed >> (8 * k)).to(torch.uint8) for k in range(bits)], dim=2)
    return octets.flatten(1)[:, : packed_bytes(count, bits)].contiguous()


def unpack_positions(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of ``pack_positions``: uint8 [rows, packed_bytes(count, bits)] -> uint8 [rows, count]."""
    rows = packed.shape[0]
    octets = functional.pad(packed, (0, -packed.shape[1] % bits)).view(rows, -(-packed.shape[1] // bits), bits)
    words = torch.zeros(rows, octets.shape[1], dtype=torch.int32, device=packed.device)
    for k in range(bits):
        words |= octets[..., k].to(torch.int32) << (8 * k)
    mask = (1 << bits) - 1
    positions = torch.stack([((words >> (bits * i)) & mask).to(torch.uint8) for i in range(8)], dim=2)
    return positions.flatten(1)[:, :count].contiguous()
