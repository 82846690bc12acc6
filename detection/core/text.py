"""Tables as text."""

from collections.abc import Sequence


def aligned(header: Sequence[str], cells: Sequence[Sequence[str]], left: int) -> str:
    """A table in plain text; the first `left` columns are aligned to the left, all others to the right."""
    widths = [max(len(line[i]) for line in (header, *cells)) for i in range(len(header))]
    lines = []
    for line in (header, *cells):
        padded = zip(line, widths, strict=True)
        columns = [cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(padded)]
        lines.append("  ".join(columns).rstrip())
    return "\n".join(lines)


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table; the first `left` columns are aligned to the left, all others to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *cells))
