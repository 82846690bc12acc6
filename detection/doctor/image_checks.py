"""All images of a set: read by several processes, and what is wrong with them."""

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from detection.core.progress import progress_bar
from detection.doctor.entries import Entries
from detection.doctor.findings import Finding
from detection.doctor.image_probe import THUMB, ImageProbe, probe_many
from detection.doctor.probe_workers import probe_in_processes

CHUNK = 64
"""Images that a process is given at a time."""
ALONE = 1500
"""So few images are read here: other processes take two seconds to start."""
UNSEEN = ImageProbe("unseen")
BAD = ("missing", "unreadable", "truncated", "damaged", "refused")


@dataclass(frozen=True)
class Looks:
    """What was found of n images.

    Attributes:
        looks: [n], without their thumbnails.
        thumbs: uint8 [n, 16, 17]; zeros where nothing was decoded.
        seconds: it took.
        decoded: whether images were decoded, and not only their headers read.
    """

    looks: list[ImageProbe]
    thumbs: np.ndarray
    seconds: float
    decoded: bool

    def rows(self, *statuses: str) -> np.ndarray:
        return np.array([i for i, found in enumerate(self.looks) if found.status in statuses], np.int64)

    def upright(self, row: int) -> tuple[int, int]:
        """(width, height) as a viewer shows it."""
        width, height = self.looks[row].size
        return (height, width) if self.looks[row].orientation >= 5 else (width, height)


def look_at(paths: Sequence[Path | None], *, workers: int, decode: bool = True, name: str = "images") -> Looks:
    """Look at each file; None stands for an entry without a name, which is left unseen.

    Args:
        workers: processes.
        decode: see `detection.doctor.image_probe.look`.
        name: of the progress bar.
    """
    start = time.perf_counter()
    looks = [UNSEEN] * len(paths)
    thumbs = np.zeros((len(paths), THUMB[1], THUMB[0]), np.uint8)
    wanted = [i for i, path in enumerate(paths) if path is not None]
    chunks = [wanted[k : k + CHUNK] for k in range(0, len(wanted), CHUNK)]

    def jobs() -> Generator[tuple[list[int], list[ImageProbe]], None, None]:
        files = [(chunk, [str(paths[i]) for i in chunk]) for chunk in chunks]
        if workers <= 1 or len(wanted) <= ALONE:
            for chunk, names in files:
                yield chunk, probe_many(names, decode)
        else:
            yield from probe_in_processes(files, workers, decode)

    # Closed at once when it is left early, and not when it is collected: processes end with it.
    with progress_bar(None, name, len(wanted), unit="image") as bar, contextlib.closing(jobs()) as done:
        for chunk, found in done:
            for i, one in zip(chunk, found, strict=True):
                if one.thumb:
                    thumbs[i] = np.frombuffer(one.thumb, np.uint8).reshape(THUMB[1], THUMB[0])
                looks[i] = one._replace(thumb=b"")
            bar.update(len(chunk))
    return Looks(looks, thumbs, time.perf_counter() - start, decode)


def default_workers() -> int:
    """A process for each core that this one may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- findings


def check_images(entries: Entries, seen: Looks) -> list[Finding]:
    """What is wrong with the images themselves, and with what the annotations say of them."""
    found: list[Finding] = []
    looks = seen.looks

    def add(code: str, rows: Sequence[int] | np.ndarray, describe: Callable[[int], str], **more: object) -> None:
        if len(rows):
            found.append(entries.image_finding(code, np.asarray(rows), describe, total=len(looks), **more))  # type: ignore[arg-type]

    def detail(row: int) -> str:
        return looks[row].detail

    missing = seen.rows("missing")
    if len(missing):
        near = similar_names(entries, missing)
        hint = f"{len(near)} of them are there under another spelling, which --fix writes in" if near else ""
        add("image-missing", missing, lambda row: f"there is {near[row]}" if row in near else detail(row), detail=hint)
    for status in ("unreadable", "truncated", "damaged", "huge", "refused"):
        add(f"image-{status}", seen.rows(status), detail)
    for code, rows in size_rows(entries, seen).items():
        add(code, rows, lambda row: _size_text(entries, seen, row))
    readable = seen.rows("ok", "huge", "truncated").tolist()
    extensions = Image.registered_extensions()

    def misnamed(row: int) -> bool:
        promised = extensions.get(Path(entries.file_names[row]).suffix.lower(), "")
        return bool(looks[row].format) and ("JPEG" if promised == "MPO" else promised) != looks[row].format

    add("image-extension", [row for row in readable if misnamed(row)], lambda row: f"it is {looks[row].format}")
    add("image-16bit", [r for r in readable if looks[r].bits > 8], lambda r: f"{looks[r].bits} bits")
    add("image-cmyk", [row for row in readable if looks[row].mode == "CMYK"], lambda row: "")
    add("image-alpha", [row for row in readable if looks[row].clear], lambda row: looks[row].mode)
    add("image-frames", [r for r in readable if looks[r].frames > 1], lambda r: f"{looks[r].frames} frames")
    grey = [row for row in readable if looks[row].mode in ("L", "1", "LA", "I;16", "I", "F")]
    add("image-grey", grey, lambda row: looks[row].mode)
    add("image-blank", np.flatnonzero(blank(seen)), lambda row: f"grey level {seen.thumbs[row].mean():.0f}")
    return found


def blank(seen: Looks) -> np.ndarray:
    """bool [n]: decoded images in which nothing is to be seen."""
    flat = seen.thumbs.reshape(len(seen.thumbs), -1)
    ok = np.zeros(len(flat), bool)
    ok[seen.rows("ok")] = seen.decoded
    # An image with a small bright thing on an even ground has at least one cell that differs.
    return ok & (np.ptp(flat, axis=1) <= 2) if len(flat) else ok


def size_rows(entries: Entries, seen: Looks) -> dict[str, list[int]]:
    """Images by how the annotated size goes with the image's: image-size, exif-at-odds, exif-turned."""
    rows: dict[str, list[int]] = {"image-size": [], "exif-at-odds": [], "exif-turned": []}
    for row in seen.rows("ok", "huge", "truncated", "damaged").tolist():
        said, stored = tuple(entries.sizes[row].tolist()), seen.looks[row].size
        if 0 in said or 0 in stored:
            continue
        if said not in (stored, seen.upright(row)):
            rows["image-size"].append(row)
        elif seen.looks[row].orientation != 1:
            rows["exif-turned" if said == seen.upright(row) else "exif-at-odds"].append(row)
    return rows


def similar_names(entries: Entries, rows: np.ndarray) -> dict[int, str]:
    """Of images that are not there: the one file of the folder that has the name in another spelling or place."""
    if entries.folder is None or not entries.folder.is_dir():
        return {}
    there: dict[str, list[str]] = {}
    for name in image_files(entries.folder):
        for key in {_plain(name), _plain(Path(name).name)}:
            there.setdefault(key, []).append(name)
    taken = set(entries.file_names.tolist())
    near = {}
    for row in rows.tolist():
        named = str(entries.file_names[row]).replace("\\", "/")
        for key in (_plain(named), _plain(named.rsplit("/", 1)[-1])):
            candidates = [name for name in there.get(key, ()) if name not in taken]
            if len(candidates) == 1:
                near[row] = candidates[0]
                break
    return near


def image_files(folder: Path) -> Iterator[str]:
    """Names of all images in a folder and those within it; links to folders are not followed, which may be loops."""
    known = set(Image.registered_extensions())
    for place, _, files in os.walk(folder):
        for name in files:
            if os.path.splitext(name)[1].lower() in known:
                yield os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")


def _plain(name: str) -> str:
    """A name without its ending, in small letters."""
    return os.path.splitext(name)[0].casefold()


def _size_text(entries: Entries, seen: Looks, row: int) -> str:
    width, height = seen.looks[row].size
    turned = f", EXIF orientation {seen.looks[row].orientation}" if seen.looks[row].orientation != 1 else ""
    return f"is {width}x{height}{turned}, annotated as {entries.sizes[row, 0]}x{entries.sizes[row, 1]}"
