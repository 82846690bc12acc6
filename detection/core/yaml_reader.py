"""Reads YAML: configs, overrides and the data.yaml of YOLO.

Limits on size, depth and number of nodes (including nodes that aliases repeat) are checked before values are created.
Only plain values are created (text, numbers, booleans, null, lists, mappings). A date stays text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from detection.core.errors import UserError
from detection.core.files import read_file, shown

LARGEST_FILE = 4 << 20
"""Bytes. A data.yaml with the 21,841 class names of ImageNet has half a megabyte."""
DEEPEST = 50
"""Levels of nested mappings and lists, also through aliases."""
MOST_NODES = 50_000
"""Keys and values, including those that aliases repeat."""
LONGEST_NUMBER = 400
"""Characters. Python parses a number in quadratic time."""

KeyLines = dict[str, int]
"""Dotted key -> line, counted from 1."""


class SyntaxMistake(UserError):
    """The text is not YAML at all."""


def read_yaml(path: Path, what: str) -> tuple[Any, KeyLines]:
    """Read a YAML file.

    Args:
        what: name of the kind of file in messages, like "config".

    Returns:
        Its content, and the line of each key.

    Raises:
        UserError: the file is absent, unreadable, too large, not YAML, beyond the limits, or has a key twice.
    """
    data = read_file(path, what, largest=LARGEST_FILE)
    name = f"{what} {shown(path)}"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return parse_yaml(text, name)


def parse_yaml(text: str, what: str) -> tuple[Any, KeyLines]:
    """As `read_yaml`, for a text that messages call `what`. Raises SyntaxMistake or another UserError."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        return _unshared(loader.construct_document(node)), dict(_key_lines(node))
    except _Refused as error:
        raise UserError(f"{what}{error}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: 0x_, which YAML 1.1 takes for a number
        said = " ".join(str(error).replace('in "<unicode string>",', "in").split())
        raise SyntaxMistake(f"{what} is not YAML: {said}") from None


class _Refused(Exception):
    """YAML beyond the limits, or with a key twice; the message continues after the name of the file."""


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.nodes = 0
        # Node -> number of nodes in its tree, and depth of the tree; an alias counts as the node that it refers to.
        self.extent: dict[yaml.Node, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            raise _Refused(
                f", line {line}: it has the tag {event.tag[:100]!r}; remove it, as only plain values are read"
            )
        self.depth += 1
        self.nodes += 1
        alias = self.check_event(yaml.AliasEvent)
        # Check before the children are read, so that the reader itself does not recurse deeper.
        self._limit(self.nodes, self.depth, line)
        node = super().compose_node(parent, index)
        self.depth -= 1
        assert node is not None
        if alias:
            if node not in self.extent:
                raise _Refused(f", line {line}: an alias stands inside what it refers to")
            return node
        inner = [self.extent[child] for child in _children(node)]
        count, depth = 1 + sum(count for count, _ in inner), 1 + max((depth for _, depth in inner), default=0)
        self._limit(count, depth, line)
        self.extent[node] = count, depth
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        elif isinstance(node, yaml.ScalarNode) and len(node.value) > LONGEST_NUMBER and node.tag in _NUMBERS:
            raise _Refused(f", line {line}: a number of {len(node.value)} digits; at most {LONGEST_NUMBER} are read")
        return node

    def _limit(self, nodes: int, depth: int, line: int) -> None:
        if depth > DEEPEST:
            raise _Refused(f", line {line}: keys or lists are nested more than {DEEPEST} deep")
        if nodes > MOST_NODES:
            raise _Refused(
                f", line {line}: more than {MOST_NODES} keys and values (those of aliases counted each time)"
            )


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_DATE = "tag:yaml.org,2002:timestamp"
# No key takes a date: a folder named 2026-01-31 is text, and 2024-02-30 is not an error.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _check_keys(node: yaml.MappingNode) -> None:
    first: dict[tuple[str, str], yaml.Node] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and (before := first.setdefault((key.tag, key.value), key)) is not key:
            lines = [k.start_mark.line + 1 for k in (before, key)]
            raise _Refused(
                f", line {lines[1]}: key {key.value[:100]!r} is there already in line {lines[0]}; remove one of them"
            )


def _unshared(value: Any) -> Any:
    """A copy in which no dict or list is shared, as aliases share them, so that each can be changed alone."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _key_lines(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield f"{prefix}{key.value}", key.start_mark.line + 1
                yield from _key_lines(value, f"{prefix}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield f"{prefix}{number}", value.start_mark.line + 1
            yield from _key_lines(value, f"{prefix}{number}.")
