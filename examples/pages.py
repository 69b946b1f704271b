"""The tables of the pages that commands write: a GPU machine, where some do, need not have a library for them."""

from collections.abc import Iterable


def table(header: Iterable[str], rows: Iterable[Iterable[object]], even: bool = False) -> str:
    """Return a Markdown table, with columns ``even`` to be read as text; "" if there are no rows."""
    rows = [[str(cell).replace("|", "/") for cell in row] for row in rows]
    if not rows:
        return ""
    lines = [list(header), *rows]
    widths = [max(3, *map(len, column)) if even else 0 for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * max(3, width) for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)
