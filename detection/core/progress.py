"""Progress: a bar on a terminal, plain lines (at most one every ten seconds) in a log file."""

import os
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE_EVERY = 10.0
"""Seconds between lines if standard error is not a terminal."""


class _Lines(tqdm):
    """tqdm that writes lines without cursor codes instead of a bar."""

    _next_line = 0.0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + LINE_EVERY
            self.fp.write(f"{str(self).strip()}\n")
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: lines stay."""

    def close(self) -> None:
        # An object whose __init__ was interrupted has no attribute `disable` when it is collected.
        if not getattr(self, "disable", True):
            self.disable = True
            type(self)._decr_instances(self)  # type: ignore[attr-defined]


def progress_bar(
    iterable: Iterable[Any] | None = None,
    description: str = "",
    total: float | None = None,
    *,
    unit: str = "it",
    bar: str | None = None,
    initial: float = 0,
) -> tqdm:
    """A tqdm over `iterable`, or one to update by hand, with the share that is done and the remaining time.

    Under torchrun only the main process shows it.

    Args:
        bar: bar_format of tqdm on a terminal; None is tqdm's default.
    """
    # The variable of torchrun; torch.distributed would import torch in commands that do not need it.
    disable = os.environ.get("RANK", "0") != "0"
    common: dict[str, Any] = {
        "desc": description, "total": total, "unit": unit, "disable": disable, "initial": initial, "file": sys.stderr,
    }  # fmt: skip
    if sys.stderr.isatty():
        return tqdm(iterable, **common, bar_format=bar, mininterval=0.2, leave=False)
    form = "{desc}: {percentage:.0f} % done, {elapsed} passed, {remaining} left{postfix}"
    if total is None and not hasattr(iterable, "__len__"):
        form = "{desc}: {n_fmt} done, {elapsed} passed, {rate_fmt}{postfix}"
    # Work that ends within LINE_EVERY writes no line.
    return _Lines(iterable, **common, bar_format=form, mininterval=LINE_EVERY, delay=LINE_EVERY)
