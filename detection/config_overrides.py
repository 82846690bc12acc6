"""`key.sub=value` from the command line, put into the plain dict of a config."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from detection.config_check import holds_text, quoted
from detection.core.errors import UserError
from detection.core.yaml_reader import SyntaxMistake, parse_yaml

DESCRIBE_DATA = ("images", "format", "split")
"""Keys beside `annotations`, which describe the data that it names."""
BUDGETS = ("train.epochs", "train.minutes")


def apply_overrides(schema: type[BaseModel], raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Put `overrides` into `raw`, in their order.

    Values are YAML, and text where they are none. For a key that holds text (a path, a name) a value is text as it
    stands, unless it is null or in quotes: `output_dir=2026`, `train.amp=off` and a folder named `a: #1` are meant so.

    Two keys change others that the overrides leave alone:

    * `data.train.annotations=…` names other data, so `images`, `format` and `split` of `data.train` go back to their
      defaults (`images` to where the format has them). Likewise `data.val`.
    * `train.epochs=…` sets `train.minutes` to null, as a time budget would win against it.

    Returns:
        The overrides by key, for messages.

    Raises:
        UserError: not of this form, a value where keys are expected, or both budgets.
    """
    given: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"override {quoted(override)} is not of the form key=value, like optim.lr=0.01")
        given[key] = override
        _put(raw, key, _value(schema, key, value, override), override)
    for key in given:
        section, _, name = key.rpartition(".")
        if name == "annotations" and isinstance(source := _at(raw, section), dict):
            for sibling in DESCRIBE_DATA:
                if not any(f"{section}.{sibling}.".startswith(f"{other}.") for other in given):
                    source.pop(sibling, None)
    budgets = [key for key in BUDGETS if key in given and _at(raw, key) is not None]
    if len(budgets) > 1:
        raise UserError(f"{' and '.join(given[key] for key in budgets)}: both say how long to train; give one of them")
    if budgets == ["train.epochs"]:
        _at(raw, "train")["minutes"] = None
    return given


def _at(raw: Any, key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    for part in key.split("."):
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def _value(schema: type[BaseModel], key: str, text: str, override: str) -> Any:
    literal = holds_text(schema, key) and not text.strip().startswith(("'", '"'))
    if literal and text.strip() not in ("", "null", "~"):
        return text
    try:
        return parse_yaml(text, f"override {quoted(override)}")[0]
    except SyntaxMistake:
        return text


def _put(raw: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, name = key.split(".")
    place = raw
    for parent in parents:
        inner = place.get(parent)
        if inner is None:
            inner = place[parent] = {}
        if not isinstance(inner, dict):
            raise UserError(f"override {quoted(override)}: {parent!r} holds a value, not keys")
        place = inner
    place[name] = value
