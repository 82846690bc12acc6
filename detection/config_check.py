"""A plain dict against a schema: what is wrong, in the words and places of the user."""

import copy
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from detection.core.errors import UserError
from detection.core.text import closest_match

MOST_MESSAGES = 10
RENAMED = {
    "optim.lr_batch": "optim.lr_reference_batch",
    "data.augment.close_share": "data.augment.no_mixing_last",
    "eval.candidates": "eval.pre_nms_top_k",
}
"""Key of version 0.1 -> today's key in the same section. In a user's file, an old key is an error that names the new
one; what the toolkit wrote itself (checkpoints, exported files, run folders) goes through `migrate`."""
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
        source: what messages call it.
        lines: the line of each key, where it is of a file.
        overrides: by key, what the command line put into it.

    Raises:
        UserError: an unknown key (with the nearest valid one), a wrong value; the message names source, line and key.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        messages = []
        for item in error.errors(include_url=False)[:MOST_MESSAGES]:
            # Locations of a union hold the names of its branches; only real keys are shown.
            key = ".".join(str(part) for part in item["loc"])
            place = source
            # A check of a whole section (scale's order, say) carries the section's key.
            given = [text for name, text in (overrides or {}).items() if f"{name}.".startswith(f"{key}.")]
            if given:
                place = f"command line ({' '.join(text if len(text) <= 120 else f'{text[:100]}…' for text in given)})"
            elif lines and key in lines:
                place = f"{source}, line {lines[key]}"
            messages.append(f"{place}: {_explain(schema, key, item)}")
        if error.error_count() > MOST_MESSAGES:
            messages.append(f"{source}: and {error.error_count() - MOST_MESSAGES} more such mistakes")
        raise UserError("\n".join(dict.fromkeys(messages))) from None


def migrate(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config that an earlier version of the toolkit wrote, with today's keys."""
    migrated = copy.deepcopy(dict(raw))
    for old, new in RENAMED.items():
        *parents, name = old.split(".")
        section: Any = migrated
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and name in section:
            section.setdefault(new.rpartition(".")[2], section.pop(name))
    return migrated


def valid_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of the schema."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in _sections(field.annotation):
            yield from valid_keys(inner, f"{prefix}{name}.")


def holds_text(section: type[BaseModel], key: str) -> bool:
    """Whether the value of a dotted key is text (or null) and nothing else."""
    name, _, rest = key.partition(".")
    field = section.model_fields.get(name)
    if field is None:
        return False
    if rest:
        return any(holds_text(inner, rest) for inner in _sections(field.annotation))
    return set(_kinds(field.annotation)) - {NoneType} == {str}


def quoted(value: Any) -> str:
    """`repr`, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def _sections(annotation: Any) -> list[type[BaseModel]]:
    return [kind for kind in _kinds(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that a value may have, out of unions and annotations."""
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
            siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent]
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
