"""Text tables, and suggestions for misspelt names."""

import difflib
import re
from collections.abc import Iterable, Sequence


def closest_match(name: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice that is most similar to `name`; None if the similarity (0 to 1) of all is below `cutoff`."""
    return next(iter(difflib.get_close_matches(name, list(choices), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """ " (did you mean 'x'?)" for an error message; "" where no choice is similar."""
    match = closest_match(name, choices, cutoff)
    return f" (did you mean {match!r}?)" if match else ""


def normalized_name(name: str) -> str:
    """The name of a class for comparisons: without case, with spaces in place of `_` and `-`."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def text_table(header: Sequence[str], cells: Sequence[Sequence[str]], left: int) -> str:
    """A table in plain text; the first `left` columns are aligned to the left, all others to the right."""
    widths = [max(len(line[i]) for line in (header, *cells)) for i in range(len(header))]
    lines = []
    for line in (header, *cells):
        padded = zip(line, widths, strict=True)
        columns = [cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(padded)]
        lines.append("  ".join(columns).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table; the first `left` columns are aligned to the left, all others to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *cells))
