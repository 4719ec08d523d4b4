"""What README says of results: the table of the headline shape with dense int8, the machines beside each other."""

from __future__ import annotations

from typing import Any

import pytest

from bench.readme import block, by_machine, rewrite
from sparsecomp.errors import FormatError


def result(int8: bool, isa: str = "avx512") -> dict[str, Any]:
    """Rows of the headline shape at batches 1 and 8: 2:4 twice as fast as dense, int8 twice as fast as dense int8."""
    found = []
    for batch in (1, 8):
        case = {"out": 4096, "in": 4096, "batch": batch, "dtype": "fp32", "threads": 1, "weights": "cold"}
        kinds = [("torch", None, 1200.0, "fp32"), ("openvino", None, 1000.0, "fp32"), ("ours", "2:4", 500.0, "fp32")]
        if int8:
            kinds.insert(2, ("onnxruntime int8", None, 500.0, "int8"))
            kinds.append(("ours int8", "8:16+int8@a8", 250.0, "int8"))
        for engine, pattern, us, numbers in kinds:
            row = case | {
                "engine": engine,
                "pattern": pattern,
                "numbers": numbers,
                "us": us,
                "us_low": us,
                "us_high": us,
            }
            found.append(row | ({} if pattern is None else {"bound": 2.0, "bound_by": "memory"}))
    machine = {"cpu": "A cpu", "isa": isa}
    return {"machine": machine, "date": "2026-11-30", "rows": found, "missing": {}, "remarks": {}}


def test_dense_int8_stands_in_the_table() -> None:
    text = block(result(True))
    assert (
        "| 2:4 | 1 | cold | 0.50 ms | 1.00 ms (OpenVINO) | 2.00x | 2.00-2.00 | 2.00x | 1.00x (ONNX Runtime int8) |"
        in text
    )
    ours = "| 8:16+int8@a8 | 8 | cold | 0.25 ms | 0.50 ms (ONNX Runtime int8) | 2.00x | 2.00-2.00 | 2.00x |"
    assert f"{ours} 4.00x (OpenVINO) |" in text
    assert "the fastest of torch and OpenVINO in the same run, rows with int8 weights and activations" in text


def test_a_result_without_int8_has_no_column_for_it() -> None:
    text = block(result(False))
    assert (
        "| 2:4 | 1 | cold | 0.50 ms | 1.00 ms (OpenVINO) | 2.00x | 2.00-2.00 | 2.00x |\n" in text and "int8" not in text
    )


def test_machines_stand_beside_each_other_by_batch() -> None:
    results = {"a.json": result(True), "b.json": result(False, "avx2")}
    table = by_machine(list(results.values()))
    assert "| A cpu (avx512), 2026-11-30 | fp32 2:4 | 2.00x |  | 2.00x |  |  |" in table
    assert "| A cpu (avx512), 2026-11-30 | fp32 8:16+int8@a8 | 2.00x |  | 2.00x |  |  |" in table
    assert "| A cpu (avx2), 2026-11-30 | fp32 2:4 | 2.00x |" in table and table.count("avx2") == 1
    page = rewrite("before\n<!-- result: old -->\nold\n<!-- end -->\nafter\n", results)
    assert page.startswith("before\n<!-- result: a.json b.json -->\n") and table in page and page.endswith("after\n")
    alone = rewrite(page, {"a.json": results["a.json"]})
    assert "Geometric means over all shapes" not in alone
    with pytest.raises(FormatError, match="no block"):
        rewrite("nothing", results)
