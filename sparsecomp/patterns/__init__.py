"""Which weights are kept: patterns by name, their geometry, masks that obey them. Knows no layer and no kernel."""

from sparsecomp.patterns.grammar import (
    GROUP_SIZES,
    NM,
    VNM,
    VNM_KEPT_COLUMNS,
    Block,
    Pattern,
    Unstructured,
    parse,
    row_nm,
    rows_together,
)

__all__ = [
    "GROUP_SIZES",
    "NM",
    "VNM",
    "VNM_KEPT_COLUMNS",
    "Block",
    "Pattern",
    "Unstructured",
    "parse",
    "row_nm",
    "rows_together",
]
