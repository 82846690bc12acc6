"""Whether a picture file ends where it should; no decoder is needed, and nothing slow is imported."""

TAIL = 65536
"""Bytes from the end in which the mark is looked for: cameras append some after it."""


def is_truncated(head: bytes, tail: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end: OpenCV fills the rest with grey and only warns on stderr.

    Args:
        head: the first bytes of the file, 4 at least.
        tail: its last `TAIL` bytes.
    """
    mark = b"\xff\xd9" if head.startswith(b"\xff\xd8") else b"IEND" if head[:4] == b"\x89PNG" else b""
    return mark not in tail
