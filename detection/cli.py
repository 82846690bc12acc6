"""What every command-line tool shares: how it ends."""

import os
import signal
import sys
from collections.abc import Callable

from detection.errors import UserError


def run_tool(main: Callable[[], int | None]) -> None:
    """Call `main` and exit: 0, its own code, 2 for a user's mistake (message only), 130 for Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader (head, less) has gone; nothing more can be written, the interpreter's flush included.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def _interrupt(number: int, frame: object) -> None:
    # What clusters and `timeout` send: let the tool close its files, as with Ctrl-C.
    raise KeyboardInterrupt
