"""Options that tools/export.py and tools/quantize.py share. Imports no torch, so that mistakes are told at once."""

from detection.errors import UserError


def parse_batch(text: str) -> int | None:
    """'dynamic' -> None; '8' -> 8. Raises UserError."""
    if text == "dynamic":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--batch {text}: a number of pictures or 'dynamic' is expected")
    return int(text)


def parse_frame(text: str) -> tuple[int, int] | None:
    """'dynamic' -> None; '320' -> (320, 320); '384x640' -> (384, 640), height first. Raises UserError."""
    if text == "dynamic":
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() for side in sides):
        raise UserError(f"--size {text}: pixels (320), height x width (384x640) or 'dynamic' is expected")
    return int(sides[0]), int(sides[-1])
