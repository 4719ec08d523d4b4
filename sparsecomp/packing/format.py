"""The canonical packed format: a weight that fits its pattern -> values + metadata, and back exactly.

docs/format.md is the specification this file implements. Knows nothing of kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.errors import FormatError, PatternError
from sparsecomp.packing.bits import pack_positions, packed_bytes, unpack_positions
from sparsecomp.patterns import NM, Block, Pattern, parse, row_nm
from sparsecomp.patterns.check import check_weight
from sparsecomp.patterns.numbers import ACTIVATION_BITS, DTYPES, FLOAT, INT8, LARGEST_INT8, LAYER_DTYPES, Numbers


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [out, in] in canonical form.

    N:M and V:N:M: ``values`` [out, groups*N] and ``metadata`` uint8 [ceil(out/mask_rows), bytes].
    Block: ``values`` [kept, rows, cols] in row-major block order and ``metadata`` uint8
    [block rows, ceil(block columns / 8)], a bitmap of the kept blocks, least significant bit first.

    Quantised N:M weights have int8 ``values`` and ``scales`` fp32 [out], one for each row, and stand for
    ``values * scales`` in ``dense_dtype``; both are None otherwise. ``activation_bits`` is 8 where the product rounds
    its input to int8 as well, and None otherwise; ``metadata`` has no columns then if N equals M.
    """

    values: Tensor
    metadata: Tensor
    pattern: Pattern
    shape: tuple[int, int]
    scales: Tensor | None = None
    dense_dtype: torch.dtype | None = None
    activation_bits: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weight this stands for; that of ``values`` unless it is quantised."""
        return self.dense_dtype or self.values.dtype

    @property
    def numbers(self) -> Numbers:
        """How the weights are stored and multiplied: as they are, or as int8 with row scales."""
        if self.scales is None:
            return FLOAT
        return INT8 if self.activation_bits is None else replace(INT8, activation_bits=self.activation_bits)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors by name, as files and state_dict hold them."""
        return {name: getattr(self, name) for name in self.numbers.part_names}

    @classmethod
    def of(
        cls, parts: Sequence[Tensor], pattern: Pattern, shape: tuple[int, int], dtype: torch.dtype, numbers: Numbers
    ) -> PackedWeight:
        """The weight of canonical tensors in the order of ``numbers.part_names``; ``dtype`` is what it stands for.

        Nothing is checked but their count, which raises FormatError: see ``validate``.
        """
        if len(parts) != len(numbers.part_names):
            raise FormatError(
                f"a weight in {numbers} has the tensors {', '.join(numbers.part_names)}, got {len(parts)} of them; "
                f"give all of them, in this order"
            )
        values, metadata, *scales = parts
        quantised = (scales[0], dtype, numbers.activation_bits) if numbers.has_scales else ()
        return cls(values, metadata, pattern, shape, *quantised)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense weight [out, in] of the same dtype."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PackedWeight:
        """The same weight elsewhere or in another of the supported dtypes (rounded as ``Tensor.to`` rounds).

        A quantised weight keeps its integers and scales; only what it stands for changes its dtype.
        """
        if dtype is not None and dtype not in DTYPES:
            raise PatternError(f"dtype {dtype} cannot be packed; use one of {_dtype_names()}")
        moved = replace(self, values=self.values.to(device=device), metadata=self.metadata.to(device=device))
        if self.scales is not None:
            moved = replace(moved, scales=self.scales.to(device=device))
        if dtype is None or dtype == self.dtype:
            return moved
        if self.scales is not None:
            if dtype not in LAYER_DTYPES:
                raise PatternError(f"a quantised weight stands for a floating dtype, not for {dtype}")
            return replace(moved, dense_dtype=dtype)
        values = moved.values.to(dtype)
        if not bool(torch.isfinite(values).all()):
            raise PatternError(f"the weights overflow {values.dtype}; keep {self.dtype} or use torch.bfloat16")
        if bool(((values == 0) & (moved.values != 0)).any()):
            # a weight rounded to zero frees its slot, and free slots have a place of their own
            return pack(moved.unpack().to(dtype), self.pattern)
        return replace(moved, values=values)

    def unpack(self) -> Tensor:
        """The dense weight [out, in]: the exact inverse of ``pack`` (-0.0 having become +0.0).

        Of a quantised weight: integers times scales, a product that fp32 rounds once, then in ``dtype``.
        """
        if self.scales is not None:
            return dequantize(self.integers().unpack(), self.scales, self.dtype)
        if isinstance(self.pattern, Block):
            return _unpack_block(self, self.pattern)
        positions = self.positions()
        out, columns = self.shape
        nm = _stored_nm(self.pattern)
        dense = torch.zeros(out, nm.groups(columns), nm.m, dtype=self.dtype, device=self.device)
        dense.scatter_(2, positions.to(torch.int64), self.values.view(out, nm.groups(columns), nm.n))
        return dense.flatten(1)[:, :columns].contiguous()

    def integers(self) -> PackedWeight:
        """The stored values as a weight of their own, without scales; one of int8 names every position."""
        plain = replace(self, scales=None, dense_dtype=None, activation_bits=None)
        nm = row_nm(self.pattern)
        if nm is None or self.numbers.position_bits(nm) == nm.index_bits:
            return plain
        return replace(plain, metadata=pack_positions(self.positions()[:: nm.mask_rows].flatten(1), nm.index_bits))

    def positions(self) -> Tensor:
        """In-group positions, uint8 [out, groups, N], ascending in each group. N:M and V:N:M only."""
        nm = _stored_nm(self.pattern)
        out, columns = self.shape
        bits = self.numbers.position_bits(nm)
        if bits == 0:
            return torch.arange(nm.m, dtype=torch.uint8, device=self.device).expand(out, nm.groups(columns), nm.m)
        positions = unpack_positions(self.metadata, nm.slots(columns), bits)
        positions = positions.view(self.metadata.shape[0], nm.groups(columns), nm.n)
        return positions.repeat_interleave(nm.mask_rows, dim=0)[:out]

    def validate(self) -> PackedWeight:
        """This weight, once every invariant of the format has been checked.

        Raises FormatError for shapes, dtypes, positions or values that no packer writes.
        """
        out, columns = self.shape
        if self.values.dtype not in DTYPES or self.metadata.dtype != torch.uint8:
            raise FormatError(
                f"packed tensors are {self.values.dtype} values and {self.metadata.dtype} metadata; "
                f"values must be one of {_dtype_names()} and metadata torch.uint8"
            )
        if any(each is not None for each in (self.scales, self.dense_dtype, self.activation_bits)):
            _validate_scales(self)
        if isinstance(self.pattern, Block):
            _validate_block(self, self.pattern)
        else:
            nm = _stored_nm(self.pattern, FormatError)
            slots = nm.slots(columns)
            bits = self.numbers.position_bits(nm)
            want = ((out, slots), (-(-out // nm.mask_rows), packed_bytes(slots, bits)))
            got = (tuple(self.values.shape), tuple(self.metadata.shape))
            if got != want:
                raise FormatError(
                    f"packed tensors have shapes {got[0]} and {got[1]}; a {self.pattern} weight of shape "
                    f"{self.shape} has values {want[0]} and metadata {want[1]}"
                )
            positions = self.positions()
            if not bool((positions[..., 1:] > positions[..., :-1]).all()):
                raise FormatError("metadata holds positions that do not ascend within a group; the file is damaged")
        if not bool(torch.isfinite(self.values).all()):
            raise FormatError("values hold NaN or Inf; the file is damaged or was not written by this package")
        self._check_canonical()
        return self

    def _check_canonical(self) -> None:
        """Tails, fill rule, -0.0, unused bits and shared columns: exactly one packed form belongs to a weight."""
        stored = self.integers()
        try:
            again = pack(stored.unpack(), self.pattern)
        except PatternError as error:
            raise FormatError(f"the packed tensors hold no {self.pattern} weight ({error})") from error
        same = torch.equal(_bits(again.values), _bits(stored.values)) and torch.equal(again.metadata, stored.metadata)
        if not same:
            raise FormatError(
                f"the packed tensors are not the canonical form of a {self.pattern} weight; pack the dense weight again"
            )


def pack(weight: Tensor, pattern: str | Pattern) -> PackedWeight:
    """Pack a dense weight [out, in] (fp32, fp16, bf16 or int8) that fits ``pattern``.

    ``in`` that is no multiple of the group is padded with zeros inside the packed form only.
    Raises PatternError for a weight that breaks the pattern, naming the first offending group; nothing is dropped.
    """
    pattern = parse(pattern)
    require_packable(weight, pattern)
    weight = weight.detach()
    _check_finite(weight)
    check_weight(weight, pattern)
    if isinstance(pattern, Block):
        return _pack_block(weight, pattern)
    return _pack_nm(weight, _stored_nm(pattern), pattern)


def require_packable(weight: Tensor, pattern: Pattern) -> None:
    """Raises PatternError for a weight or a pattern that ``pack`` refuses whatever the values are."""
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise PatternError(f"pack takes a weight of shape [out, in], got {got}; reshape it to two dimensions")
    if weight.dtype not in DTYPES:
        raise PatternError(f"pack takes dtypes {_dtype_names()}, got {weight.dtype}; convert the weight first")
    if weight.layout is not torch.strided or weight.is_meta:
        got = "a meta tensor without content" if weight.is_meta else f"the layout {weight.layout}"
        raise PatternError(f"pack takes a dense tensor with content, got {got}; load it or call .to_dense() first")
    if pattern.mask_only:
        raise PatternError(
            f'"{pattern}" is a mask-only pattern and has no packed form; '
            "keep the layer dense or choose an N:M or block pattern"
        )


def scales_of(packed: PackedWeight) -> tuple[Tensor, ...]:
    """The parts beside values and metadata, in the order of ``numbers.part_names``: none of floating weights."""
    return tuple(packed.parts.values())[2:]


def dequantize(integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``integers`` [out, columns] times ``scales`` [out], rounded to fp32 (exact in float64), then to ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    return (integers.to(wide) * scales[:, None].to(wide)).to(dtype)


def _pack_nm(weight: Tensor, nm: NM, pattern: Pattern) -> PackedWeight:
    out, columns = weight.shape
    groups = nm.groups(columns)
    missing = groups * nm.m - columns
    padded = (functional.pad(weight, (0, missing)) if missing else weight).reshape(out, groups, nm.m)
    used = _pad_rows(padded != 0, nm.mask_rows)
    if nm.mask_rows > 1:
        used = used.view(used.shape[0] // nm.mask_rows, nm.mask_rows, groups, nm.m).any(dim=1)
    codes = _group_codes(used)
    positions = _position_table(nm.n, nm.m).to(weight.device).index_select(0, codes.flatten()).view(*codes.shape, nm.n)
    metadata = pack_positions(positions.flatten(1), nm.index_bits)
    if nm.mask_rows > 1:
        positions = positions.repeat_interleave(nm.mask_rows, dim=0)[:out]
    values = padded.gather(2, positions.to(torch.int64)).flatten(1)
    return PackedWeight(_positive_zero(values), metadata, pattern, (out, columns))


def _check_finite(weight: Tensor) -> None:
    if not weight.dtype.is_floating_point or weight.numel() == 0:
        return
    # one pass and no temporary; NaN wins both reductions, and torch.stack would fail on fp16 under autocast
    if all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(weight)):
        return
    row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
    raise PatternError(
        f"weight[{row}, {column}] is {weight[row, column].item()}; "
        "packed weights must be finite, repair the weight first"
    )


def _positive_zero(values: Tensor) -> Tensor:
    return values + 0  # IEEE 754: -0.0 + 0 is +0.0, every other value is unchanged


def _group_codes(used: Tensor) -> Tensor:
    """Bool [rows, groups, M] -> int32 [rows, groups]: bit j says that position j is in use."""
    codes = torch.zeros(used.shape[:2], dtype=torch.int32, device=used.device)
    for j in range(used.shape[2]):
        codes |= used[..., j].to(torch.int32) << j
    return codes


@cache
def _position_table(n: int, m: int) -> Tensor:
    """For every group code of at most N used positions, the N positions stored: uint8 [2**M, N].

    Free slots are filled at the lowest unused positions, so that positions ascend strictly.
    """
    bits = torch.arange(m, device="cpu")
    used = (torch.arange(2**m, device="cpu").unsqueeze(1) >> bits) & 1
    # unused positions sort behind the used ones, in ascending order; the first N are the ones stored
    order = torch.where(used == 1, bits, bits + m).sort(dim=1).values[:, :n] % m
    return order.sort(dim=1).values.to(torch.uint8)


def _pad_rows(tensor: Tensor, multiple: int) -> Tensor:
    missing = -tensor.shape[0] % multiple
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def _pack_block(weight: Tensor, pattern: Block) -> PackedWeight:
    out, columns = weight.shape
    down, across = pattern.grid(out, columns)
    padded = functional.pad(weight, (0, across * pattern.cols - columns, 0, down * pattern.rows - out))
    blocks = padded.view(down, pattern.rows, across, pattern.cols).transpose(1, 2)
    kept = (blocks != 0).flatten(2).any(dim=2)
    metadata = pack_positions(kept.to(torch.uint8), 1)
    return PackedWeight(_positive_zero(blocks[kept]), metadata, pattern, (out, columns))


def _kept_blocks(packed: PackedWeight, pattern: Block) -> Tensor:
    _, across = pattern.grid(*packed.shape)
    return unpack_positions(packed.metadata, across, 1).to(torch.bool)


def _unpack_block(packed: PackedWeight, pattern: Block) -> Tensor:
    out, columns = packed.shape
    down, across = pattern.grid(out, columns)
    blocks = torch.zeros(down, across, pattern.rows, pattern.cols, dtype=packed.dtype, device=packed.device)
    blocks[_kept_blocks(packed, pattern)] = packed.values
    dense = blocks.transpose(1, 2).reshape(down * pattern.rows, across * pattern.cols)
    return dense[:out, :columns].contiguous()


def _validate_block(packed: PackedWeight, pattern: Block) -> None:
    down, across = pattern.grid(*packed.shape)
    want = (down, packed_bytes(across, 1))
    if tuple(packed.metadata.shape) != want:
        raise FormatError(f"block metadata has shape {tuple(packed.metadata.shape)}; this weight needs {want}")
    kept = int(_kept_blocks(packed, pattern).sum())
    want_values = (kept, pattern.rows, pattern.cols)
    if tuple(packed.values.shape) != want_values or kept > pattern.kept_blocks(*packed.shape):
        raise FormatError(f"block values have shape {tuple(packed.values.shape)}; the bitmap names {want_values}")


def _validate_scales(packed: PackedWeight) -> None:
    scales, out = packed.scales, packed.shape[0]
    if packed.activation_bits not in (None, *ACTIVATION_BITS):
        raise FormatError(f"activations of {packed.activation_bits!r} bits are not known; use 8, or None to leave them")
    if scales is None or packed.dense_dtype not in LAYER_DTYPES or packed.values.dtype != torch.int8:
        raise FormatError("row scales belong to int8 values that stand for a floating dtype; quantise the weight again")
    if scales.dtype != torch.float32 or tuple(scales.shape) != (out,):
        raise FormatError(
            f"scales have shape {tuple(scales.shape)} and dtype {scales.dtype}; "
            f"this weight needs ({out},) of torch.float32"
        )
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise FormatError("scales hold a number that is not positive and finite; the file is damaged")
    if bool((packed.values < -LARGEST_INT8).any()):
        raise FormatError(f"quantised values hold -128; they are symmetric, {-LARGEST_INT8} to {LARGEST_INT8}")
    _stored_nm(packed.pattern, FormatError)


def _stored_nm(pattern: Pattern, error: Callable[[str], Exception] = PatternError) -> NM:
    nm = row_nm(pattern)
    if nm is None:
        raise error(f'"{pattern}" is not stored as N:M groups; it has no in-group positions')
    return nm


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.numel() else tensor


def _dtype_names() -> str:
    return ", ".join(str(dtype) for dtype in DTYPES)
