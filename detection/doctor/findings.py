"""`Finding`: one kind of fault in one set, with examples."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from detection.doctor.rules import KINDS, SEVERITIES, Severity

MOST_EXAMPLES = 24
"""Kept of each finding: enough for a contact sheet."""


@dataclass(frozen=True)
class Example:
    """Where a fault is to be seen. `annotation` is its id in the file (of VOC and YOLO, its number)."""

    image: str | None = None
    image_id: int | None = None
    annotation: int | None = None
    box: tuple[float, float, float, float] | None = None
    """xywh as it stands in the file."""
    text: str = ""
    other: str | None = None
    """The second image of a pair."""


@dataclass(frozen=True)
class Finding:
    """One kind of fault in one set.

    Attributes:
        code: see `KINDS`.
        split: "train", "val", "train and val" for what concerns both, or "data" for a set that stands alone.
        count: how many; `total` is how many there could be.
        detail: what the count and the examples do not say.
        examples: at most `MOST_EXAMPLES`.
    """

    code: str
    split: str
    count: int
    examples: tuple[Example, ...] = ()
    detail: str = ""
    total: int | None = None
    severity: Severity = field(default="note")
    remedy: str = ""

    @property
    def message(self) -> str:
        """As in "3 of 292 images that end early: …"."""
        of = f" of {self.total}" if self.total is not None else ""
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.count or 'no'}{of} {KINDS[self.code].title}{detail}"

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a JSON file; what an example does not have is left out."""
        examples = [{k: v for k, v in asdict(e).items() if v not in (None, "")} for e in self.examples]
        return {
            "severity": self.severity,
            "code": self.code,
            "split": self.split,
            "message": self.message,
            "remedy": self.remedy,
            "count": self.count,
            "total": self.total,
            "examples": examples,
        }


def make_finding(
    code: str,
    split: str,
    count: int,
    examples: Sequence[Example] = (),
    *,
    detail: str = "",
    total: int | None = None,
    severity: Severity | None = None,
) -> Finding:
    """A finding with severity and remedy of its kind; too many examples are thinned out evenly."""
    kind = KINDS[code]
    chosen = spread(examples, MOST_EXAMPLES)
    return Finding(code, split, int(count), tuple(chosen), detail, total, severity or kind.severity, kind.remedy)


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, from all over the sequence."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Errors first, then in the order of the table; train before val."""
    codes = list(KINDS)
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), codes.index(f.code), f.split != "train"))
