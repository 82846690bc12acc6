"""`Finding`: all violations of one rule in one dataset, with examples."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from detection.doctor.rules import RULES, SEVERITIES, Severity

MAX_EXAMPLES = 24
"""Examples that each finding keeps."""


@dataclass(frozen=True)
class Example:
    """One violation of a rule. `annotation` is an id in the file (in VOC and YOLO, a running number)."""

    image: str | None = None
    image_id: int | None = None
    annotation: int | None = None
    box: tuple[float, float, float, float] | None = None
    """xywh, as in the file"""
    text: str = ""
    other: str | None = None
    """the second image of a pair"""


@dataclass(frozen=True)
class Finding:
    """All violations of one rule in one dataset.

    Attributes:
        code: key of `RULES`.
        split: "train", "val", "train and val" if the rule compares both, or "data" for a single dataset, "train.0" and
            so on for the sets of a list.
        count: number of violations, out of `total` (None if there is no natural total).
        detail: further information for the message.
        examples: at most `MAX_EXAMPLES`.
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
        """For example "3 of 292 truncated images: …"."""
        of = f" of {self.total}" if self.total is not None else ""
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.count or 'no'}{of} {RULES[self.code].title}{detail}"

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file; empty fields of examples are omitted."""
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
    """Create a finding with the severity and remedy of its rule, and at most `MAX_EXAMPLES` of the examples."""
    rule = RULES[code]
    chosen = evenly_spaced(examples, MAX_EXAMPLES)
    return Finding(code, split, int(count), tuple(chosen), detail, total, severity or rule.severity, rule.remedy)


def evenly_spaced(items: Sequence[Any], max_items: int) -> list[Any]:
    """At most `max_items` of the items, evenly spaced over the sequence."""
    if len(items) <= max_items:
        return list(items)
    return [items[i * len(items) // max_items] for i in range(max_items)]


def sort_findings(findings: Sequence[Finding]) -> list[Finding]:
    """Sort by severity, then in the order of `RULES`; train before val."""
    codes = list(RULES)

    def order(found: Finding) -> tuple[int, int, bool, str]:
        in_val = not found.split.startswith("train")
        return SEVERITIES.index(found.severity), codes.index(found.code), in_val, found.split

    return sorted(findings, key=order)
