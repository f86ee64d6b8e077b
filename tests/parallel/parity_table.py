"""docs/parity.md: what the parity grid measured, families by layouts."""

from collections.abc import Mapping

Errors = Mapping[str, Mapping[str, float]]

INTRODUCTION = """\
# What is proven of each family, in which layout

Written by `tests/parallel/test_parity.py`, which runs all of it again. Each row is a tiny random fp32 checkpoint that
transformers made; each column a layout. In every cell: the checkpoint loaded and exported again bit for bit; logits,
loss and gradient norm of one step, and every weight after one plain SGD step, equal transformers' on the same tokens,
each sample alone, packed or padded here. The number is the largest error of a logit (logits are of the order of 1; the
test allows 1e-4). An empty cell was not run: every family goes through the layouts that mix the axes, a few families
through all.
"""


def render(errors: Errors) -> str:
    """The whole page."""
    layouts = _layouts(errors)
    lines = [
        INTRODUCTION,
        "| family | " + " | ".join(layouts) + " |",
        "| --- |" + " --- |" * len(layouts),
    ]
    for variant, row in errors.items():
        cells = [f"{row[layout]:.0e}" if layout in row else "" for layout in layouts]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def missing_rows(page: str, errors: Errors) -> list[str]:
    """Cells that were measured and that the page does not show, as 'family layout'; and rows nobody measured."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    header, shown = (rows[0], {row[0]: row for row in rows[2:]}) if rows else ([], {})
    filled = {
        (name, layout)
        for name, row in shown.items()
        for layout, cell in zip(header[1:], row[1:], strict=True)
        if cell
    }
    measured = {(variant, layout) for variant, row in errors.items() for layout in row}
    return [" ".join(cell) for cell in sorted(filled ^ measured)]


def _layouts(errors: Errors) -> list[str]:
    """Columns in the order in which a run meets them."""
    return list(dict.fromkeys(layout for row in errors.values() for layout in row))
