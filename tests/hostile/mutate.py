"""Valid documents made invalid: random changes of structure, values and bytes, all drawn from one `random.Random`."""

import datetime
import random
from collections.abc import Callable
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**400, -(2**63), 0.5, -0.0, 1e-320, 1e308, -1e39,
    float("nan"), float("inf"), "", " ", "0", "a" * 300, "a\0b", "../../../etc/passwd", "/etc/passwd", "/dev/zero", "~",
    "\ud800", "日本", "null", "1e999", "cuda:7", "*", ".", [], {}, [[]], [None], {"": {}}, [1, "a", None], (1, 2),
    datetime.date(2024, 2, 29), {"a": [{"b": []}]},
)  # fmt: skip


def paths_of(document: Any, prefix: tuple = ()) -> list[tuple]:
    """The place of every value in nested dicts and lists."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    found = []
    for key, value in items:
        found += [(*prefix, key), *paths_of(value, (*prefix, key))]
    return found


def copied(document: Any) -> Any:
    """Dicts and lists are copied, everything else is shared."""
    if isinstance(document, dict):
        return {key: copied(value) for key, value in document.items()}
    return [copied(value) for value in document] if isinstance(document, list) else document


def mutate(document: Any, rnd: random.Random, values: tuple = VALUES) -> Any:
    """A changed copy of nested dicts and lists: one to three values replaced, removed, doubled, nested or moved."""
    document = copied(document)
    for _ in range(rnd.randint(1, 3)):
        paths = paths_of(document)
        if not paths or rnd.random() < 0.02:
            return rnd.choice(values)
        *parents, key = rnd.choice(paths)
        place = document
        for parent in parents:
            place = place[parent]
        what = rnd.randrange(7)
        if what <= 2:
            place[key] = copied(rnd.choice(values))
        elif what == 3:
            del place[key]
        elif what == 4 and isinstance(place, list):
            place.insert(key, copied(place[key]))
        elif what == 4:
            place[rnd.choice([f"{key}x", "new", 7, None])] = copied(place[key])
        elif what == 5:
            for _ in range(rnd.choice([1, 1, 2, 100])):
                place[key] = [place[key]] if rnd.random() < 0.5 else {"a": place[key]}
        else:
            # A value from elsewhere in the document: right in itself and wrong in its place.
            other = document
            for part in rnd.choice(paths):
                if not isinstance(other, dict | list) or (isinstance(other, dict) and part not in other):
                    break
                if isinstance(other, list) and not (isinstance(part, int) and part < len(other)):
                    break
                other = other[part]
            place[key] = copied(other)
    return document


def mutate_bytes(data: bytes, rnd: random.Random) -> bytes:
    """Cut off, with flipped, inserted, removed or repeated bytes."""
    changed = bytearray(data)
    for _ in range(rnd.randint(1, 4)):
        if not changed:
            break
        at = rnd.randrange(len(changed))
        changes: list[Callable[[], Any]] = [
            lambda at=at: changed.__delitem__(slice(at, None)),
            lambda at=at: changed.__setitem__(at, rnd.randrange(256)),
            lambda at=at: changed.__setitem__(slice(at, at + 8), rnd.randbytes(8)),
            lambda at=at: changed.__setitem__(slice(at, at), rnd.randbytes(rnd.choice([1, 3, 16]))),
            lambda at=at: changed.__delitem__(slice(at, at + rnd.choice([1, 4, 100]))),
            lambda at=at: changed.__setitem__(slice(at, at), changed[at : at + 64] * rnd.choice([1, 3])),
        ]
        rnd.choice(changes)()
    return bytes(changed)
