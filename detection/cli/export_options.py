"""Options that the commands export and quantize share."""

from detection.core.commands import command
from detection.core.errors import UserError
from detection.runtime.metadata import MAX_BATCH, MAX_SIDE


def parse_batch(text: str) -> int | None:
    """'dynamic' -> None; '8' -> 8. Raises UserError."""
    if text == "dynamic":
        return None
    if not _is_number(text) or not 1 <= int(text) <= MAX_BATCH:
        raise UserError(f"--batch {text}: a number of images (1 to {MAX_BATCH}) or 'dynamic' is expected")
    return int(text)


def parse_canvas_size(text: str) -> tuple[int, int] | None:
    """'dynamic' -> None; '320' -> (320, 320); '384x640' -> (384, 640), height first. Raises UserError."""
    if text == "dynamic":
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(map(_is_number, sides)):
        raise UserError(f"--size {text}: pixels (320), height x width (384x640) or 'dynamic' is expected")
    if max(map(int, sides)) > MAX_SIDE:
        raise UserError(
            f"--size {text}: a side may have {MAX_SIDE} pixels at most; {command('detect')} --tile is for more"
        )
    return int(sides[0]), int(sides[-1])


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
