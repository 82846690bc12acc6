"""From a plain dict and `key=value` overrides to a checked config: messages, renamed keys, paths."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ValidationError

from detection.core.errors import UserError
from detection.core.text import closest_match
from detection.core.yaml_reader import SyntaxMistake, parse_yaml

MOST_MESSAGES = 10
RENAMED = {
    "optim.lr_batch": "optim.lr_reference_batch",
    "data.augment.close_share": "data.augment.no_mixing_last",
    "eval.candidates": "eval.pre_nms_top_k",
}
"""Key of version 0.1 -> today's key in the same section. In a user's file, an old key is an error that names the new
one; what the toolkit wrote itself (checkpoints, exported files, run folders) goes through `migrate`."""
DESCRIBE_DATA = ("images", "format", "split", "complete_classes")
"""Keys that describe the data that `annotations` names."""
BUDGETS = ("train.epochs", "train.minutes")
ONE, LIST = "<one>", "<list>"
"""Tags of a key that takes one section or a list of them. They are no part of the key in messages."""
LONGEST_NAME, LONGEST_PATH = 255, 4095
"""The most bytes that Linux, macOS and Windows allow in a file name and in a path."""

Schema = TypeVar("Schema", bound=BaseModel)


def check(
    schema: type[Schema],
    raw: dict[str, Any],
    source: str,
    lines: dict[str, int] | None = None,
    overrides: dict[str, str] | None = None,
) -> Schema:
    """Check a plain dict against a schema.

    Args:
        source: name of the config in messages.
        lines: the line of each key, if it was read from a file.
        overrides: the override of each key that the command line set.

    Raises:
        UserError: an unknown key (with the closest valid one) or a wrong value; the message names source, line and key.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        messages = []
        for item in error.errors(include_url=False)[:MOST_MESSAGES]:
            # Locations in a union also hold the names of its branches.
            key = ".".join(str(part) for part in item["loc"] if part not in (ONE, LIST))
            place = source
            # Checks of a whole section (say, the order of scale) have the key of the section.
            given = [text for name, text in (overrides or {}).items() if f"{name}.".startswith(f"{key}.")]
            if given:
                place = f"command line ({' '.join(text if len(text) <= 120 else f'{text[:100]}…' for text in given)})"
            elif lines and key in lines:
                place = f"{source}, line {lines[key]}"
            messages.append(f"{place}: {_explain(schema, key, item)}")
        if error.error_count() > MOST_MESSAGES:
            messages.append(f"{source}: and {error.error_count() - MOST_MESSAGES} more such mistakes")
        raise UserError("\n".join(dict.fromkeys(messages))) from None


def migrate(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A copy of a config that an earlier version of the toolkit wrote, with today's keys.

    Raises:
        UserError: a key is given by its old name and by its new one; the message names `source` and both.
    """
    migrated = copy.deepcopy(dict(raw))
    for old, new in RENAMED.items():
        *parents, name = old.split(".")
        section: Any = migrated
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and name in section:
            new_name = new.rpartition(".")[2]
            if new_name in section:
                raise UserError(f"{source}: {old!r} is the old name of {new!r}, which is there too: remove {old!r}")
            section[new_name] = section.pop(name)
    return migrated


def apply_overrides(schema: type[BaseModel], raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Apply `overrides` to `raw` in their order.

    Values are parsed as YAML; what is not YAML is text. For a key that holds text (a path, a name), the value is taken
    literally unless it is null or quoted: `output_dir=2026`, `train.amp=off`, a folder named `a: #1`.

    Two overrides change other keys, unless these are overridden too:

    * `data.train.annotations=…` names other data and resets `images`, `format`, `split` and `complete_classes` of
      `data.train`. Likewise `data.val.annotations`, and `data.train.0.annotations` of a list.
    * `train.epochs=…` sets `train.minutes` to null, because a time budget has priority.

    Returns:
        The override of each key, for messages.

    Raises:
        UserError: an override is not of the form key=value, sets a key below a value, or both budgets are set.
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
    """The value of a dotted key, in which numbers are places in a list; None where there is none."""
    for part in key.split("."):
        if isinstance(raw, list):
            raw = raw[int(part)] if _is_place(part, raw) else None
        else:
            raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def _is_place(part: str, entries: list[Any]) -> bool:
    return part.isdecimal() and len(part) < 10 and int(part) < len(entries)


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
    place: Any = raw
    for number, parent in enumerate(parents):
        inner = _at(place, parent)
        if inner is None and isinstance(place, dict):
            inner = place[parent] = {}
        if not isinstance(inner, dict | list):
            raise UserError(f"override {quoted(override)}: {parent!r} holds a value, not keys")
        below = parents[number + 1] if number + 1 < len(parents) else name
        if isinstance(inner, list) and not _is_place(below, inner):
            above = ".".join(parents[: number + 1])
            raise UserError(
                f"override {quoted(override)}: {above} is a list of {len(inner)}; name one of its entries "
                f"({above}.0, …), or replace the list: {above}=[…]"
            )
        place = inner
    place[int(name) if isinstance(place, list) else name] = value


def valid_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of the schema."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in _sections(field.annotation):
            yield from valid_keys(inner, f"{prefix}{name}.")


def holds_text(section: type[BaseModel], key: str) -> bool:
    """Whether the value of a dotted key is text (or null) and nothing else."""
    name, _, rest = without_places(key).partition(".")
    field = section.model_fields.get(name)
    if field is None:
        return False
    if rest:
        return any(holds_text(inner, rest) for inner in _sections(field.annotation))
    return set(_kinds(field.annotation)) - {NoneType} == {str}


def without_places(key: str) -> str:
    """A dotted key without the numbers of entries of lists."""
    return ".".join(part for part in key.split(".") if not part.isdecimal())


def quoted(value: Any) -> str:
    """`repr`, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections in a union or annotation, those of lists included, each once."""
    found = []
    for kind in _kinds(annotation):
        entries = _kinds(get_args(kind)[0]) if get_origin(kind) is list else [kind]
        found += [entry for entry in entries if isinstance(entry, type) and issubclass(entry, BaseModel)]
    return list(dict.fromkeys(found))


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types in a union or annotation."""
    if get_origin(annotation) is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for inner in get_args(annotation):
            yield from _kinds(inner)
    elif get_origin(annotation) is Literal:
        yield from map(type, get_args(annotation))
    else:
        yield annotation


def _explain(schema: type[BaseModel], key: str, item: Any) -> str:
    if item["type"] == "extra_forbidden":
        known = list(valid_keys(schema))
        if key in RENAMED:
            hint = f": it is called {RENAMED[key]!r} now"
        elif key.endswith("num_classes"):
            hint = "; the number of classes comes from the data"
        else:
            parent, _, name = key.rpartition(".")
            siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == without_places(parent)]
            nearest: str | None
            if sibling := closest_match(name, siblings, cutoff=0.5):
                nearest = f"{parent}.{sibling}" if parent else sibling
            else:
                elsewhere = (k for k in known if k.rpartition(".")[2] == name)
                nearest = next(elsewhere, None) or closest_match(key, known)
            hint = f" (did you mean {nearest!r}?)" if nearest else f"; known here: {', '.join(siblings)}"
        return f"unknown key {key!r}{hint}"
    if item["type"] == "missing":
        return f"key {key!r} is missing"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if isinstance(item["input"], dict):
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, not {quoted(item['input'])}"


def usable_path(text: str) -> str:
    """Expand `~`. Raises ValueError if no file can have this name."""
    if not text.strip():
        raise ValueError("the path is empty")
    if "\0" in text:
        raise ValueError("the path holds a NUL character")
    path = os.path.expanduser(text)
    try:
        data = os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError("the path holds a character that no file system takes") from None
    longest = max(map(len, data.split(os.fsencode(os.sep))))
    if longest > LONGEST_NAME or len(data) > LONGEST_PATH:
        raise ValueError(
            f"the path is too long: {len(data)} bytes, its longest name {longest}; at most {LONGEST_PATH} and "
            f"{LONGEST_NAME} are possible"
        )
    return path


PathText = Annotated[str, AfterValidator(usable_path)]
"""A path, or a name that can replace one ("timm")."""
