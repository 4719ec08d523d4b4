"""A pruning report as one self-contained HTML page: what matters first, its plots as inline SVG.

Takes a ``PruneReport``, gives text that refers to nothing outside itself. Computes nothing but what it shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsecomp.pruning.page import charts, layers, masks, summary
from sparsecomp.reporting.markup import section, text

if TYPE_CHECKING:
    from sparsecomp.pruning.report import PruneReport


def page(report: PruneReport, title: str | None = None) -> str:
    """The whole page; ``title`` by default says the model and the pattern."""
    shown = summary.default_title(report) if title is None else title
    parts = [
        summary.heading(report, shown),
        summary.verdict(report),
        summary.totals(report),
        charts.stages(report),
        summary.definitions(report),
        section("Layers", layers.layer_table(report), "layers"),
        layers.notes(report),
        layers.left_dense(report),
        layers.unpermuted(report),
        charts.depth(report),
        charts.tunings(report),
        masks.positions(report),
        masks.maps(report),
        summary.provenance(report),
    ]
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(shown)}</title>",
        f"<style>\n{_asset('style.css')}{layers.card_style(report)}</style></head>",
        "<body>",
        *filter(None, parts),
        f"<script>\n{_asset('table.js')}</script>",
        "</body></html>",
        "",
    ]
    return "\n".join(lines)


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
