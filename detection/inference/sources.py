"""Finds the inputs of a detection run: images, folders, globs, videos, cameras, streams."""

import glob
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import cv2

from detection.core.errors import UserError
from detection.core.files import file_fault, open_regular_file, shown
from detection.data.image_headers import stored_size
from detection.data.image_io import SUFFIXES as IMAGE_SUFFIXES
from detection.inference.image_urls import is_image_url, without_password

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts", ".flv"})
MAX_CAMERA_INDEX = 9999
SCHEMES = frozenset({"rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "udp", "tcp", "srt"})


@dataclass(frozen=True)
class Item:
    """One image, video, camera or stream; `name` is the relative path of its results without suffix."""

    kind: str
    """image, video, camera or stream"""
    source: str
    name: str

    @property
    def shown(self) -> str:
        """The source without the password of a URL, for messages and results."""
        return without_password(self.source)


def find_items(sources: Sequence[str]) -> list[Item]:
    """Expand sources to items, in order and with unique names.

    Raises:
        UserError: a source does not exist, or is not an image, video, folder, glob, camera index or URL.
    """
    items: list[Item] = []
    taken: set[str] = set()
    for source in sources:
        for kind, path, name in _expand(source):
            unique, number = name, 2
            while unique.lower() in taken:
                unique, number = f"{name}_{number}", number + 1
            taken.add(unique.lower())
            items.append(Item(kind, path, unique))
    if not items:
        raise UserError("no source is given")
    return items


def _expand(source: str) -> Iterator[tuple[str, str, str]]:
    # An empty path is the working folder.
    if not source:
        raise UserError("a source is empty; expected: an image, folder, glob, video, camera index or URL")
    path = Path(source).expanduser()
    if "://" in source:
        name = _name_of_stream(source)
        yield "image" if is_image_url(source) else "stream", source, name
    elif source.isascii() and source.isdigit() and not path.exists():
        if len(source) > len(str(MAX_CAMERA_INDEX)) or int(source) > MAX_CAMERA_INDEX:
            raise UserError(f"camera {shown(source)} cannot be opened: the largest index is {MAX_CAMERA_INDEX}")
        yield "camera", source, f"camera{source}"
    elif path.is_dir():
        named = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES)
        files = _regular(named)
        if not files:
            raise UserError(f"folder {source} has no images or videos ({_suffixes()})")
        for file in files:
            yield kind_of(file), str(file), str(file.relative_to(path).with_suffix(""))
    elif path.is_file():
        yield kind_of(path), str(path), path.stem
    elif glob.has_magic(source):
        matches = _regular(sorted(map(Path, glob.glob(str(path), recursive=True))))
        if not matches:
            raise UserError(f"no file matches {source}")
        for match in matches:
            yield kind_of(match), str(match), match.stem
    elif os.path.lexists(path):
        raise UserError(f"source {shown(source)} cannot be read: {file_fault(path)}")
    else:
        raise UserError(
            f"source {shown(source)} does not exist; expected: an image, folder, glob, video, camera index or URL"
        )


def _regular(paths: Sequence[Path]) -> list[Path]:
    """The regular files among them; prints a warning for other entries that are not folders."""
    files = []
    for path in paths:
        if path.is_dir():
            continue
        reason = file_fault(path)
        if reason is None:
            files.append(path)
        else:
            print(f"warning: skipped {shown(path)}: {reason}", file=sys.stderr)
    return files


def _name_of_stream(url: str) -> str:
    """rtsp://user:secret@cam1.local:554/live/main.mp4 -> cam1.local_live_main. Raises UserError for other URLs."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        host = None
    if host is None or parts.scheme.lower() not in SCHEMES:
        raise UserError(
            f"source {without_password(url)} is not the URL of a stream ({', '.join(sorted(SCHEMES))}://HOST/…)"
        )
    name = f"{host}_{Path(parts.path.strip('/')).with_suffix('') if parts.path.strip('/') else ''}"
    return re.sub(r"[^\w.-]+", "_", name).strip("_.")


def kind_of(path: Path) -> str:
    """ "image" or "video", by the suffix or, if it is unknown, by the content. Raises UserError for neither."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in VIDEO_SUFFIXES:
        return "video"
    with open_regular_file(path, "source") as file:
        start = file.read(1 << 20)
    # The header of a TIFF may be at its end.
    if stored_size(start) is not None or start[:2] in (b"II", b"MM"):
        return "image"
    capture = cv2.VideoCapture(str(path))
    opened = capture.isOpened()
    capture.release()
    if opened:
        return "video"
    raise UserError(f"{path} is neither an image nor a video that OpenCV can read ({_suffixes()})")


def _suffixes() -> str:
    return " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES))
