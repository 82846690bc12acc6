"""Read all images of a dataset, in several processes, and check them."""

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
from detection.doctor.image_probe import THUMBNAIL_SIZE, ImageProbe, probe_many
from detection.doctor.probe_workers import probe_in_processes

CHUNK_SIZE = 64
"""Images per task of a worker process."""
MAX_SERIAL_IMAGES = 1500
"""Up to this many images are read in the main process: worker processes take two seconds to start."""
UNPROBED = ImageProbe("unprobed")
UNUSABLE_STATUSES = ("missing", "unreadable", "truncated", "damaged", "refused")


@dataclass(frozen=True)
class ProbedImages:
    """What was found of n images.

    Attributes:
        probes: [n], without their thumbnails.
        thumbnails: uint8 [n, 16, 17]; zeros where nothing was decoded.
        seconds: it took.
        decoded: whether images were decoded, and not only their headers read.
    """

    probes: list[ImageProbe]
    thumbnails: np.ndarray
    seconds: float
    decoded: bool

    def rows(self, *statuses: str) -> np.ndarray:
        """Rows of images with one of the statuses."""
        return np.array([i for i, found in enumerate(self.probes) if found.status in statuses], np.int64)

    def upright_size(self, row: int) -> tuple[int, int]:
        """(width, height) after EXIF rotation."""
        width, height = self.probes[row].size
        return (height, width) if self.probes[row].orientation >= 5 else (width, height)


def probe_images(
    paths: Sequence[Path | None], *, workers: int, decode: bool = True, name: str = "images"
) -> ProbedImages:
    """Probe each file; None stands for an entry without a file name, which stays unprobed.

    Args:
        workers: number of processes.
        decode: see `detection.doctor.image_probe.probe_image`.
        name: label of the progress bar.
    """
    start = time.perf_counter()
    probes = [UNPROBED] * len(paths)
    thumbnails = np.zeros((len(paths), THUMBNAIL_SIZE[1], THUMBNAIL_SIZE[0]), np.uint8)
    wanted = [i for i, path in enumerate(paths) if path is not None]
    chunks = [wanted[k : k + CHUNK_SIZE] for k in range(0, len(wanted), CHUNK_SIZE)]

    def jobs() -> Generator[tuple[list[int], list[ImageProbe]], None, None]:
        files = [(chunk, [str(paths[i]) for i in chunk]) for chunk in chunks]
        if workers <= 1 or len(wanted) <= MAX_SERIAL_IMAGES:
            for chunk, names in files:
                yield chunk, probe_many(names, decode)
        else:
            yield from probe_in_processes(files, workers, decode)

    # Close the generator on errors as well, so that its worker processes end at once.
    with progress_bar(None, name, len(wanted), unit="image") as bar, contextlib.closing(jobs()) as done:
        for chunk, found in done:
            for i, one in zip(chunk, found, strict=True):
                if one.thumbnail:
                    thumbnails[i] = np.frombuffer(one.thumbnail, np.uint8).reshape(THUMBNAIL_SIZE[1], THUMBNAIL_SIZE[0])
                probes[i] = one._replace(thumbnail=b"")
            bar.update(len(chunk))
    return ProbedImages(probes, thumbnails, time.perf_counter() - start, decode)


def default_workers() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- findings


def check_images(entries: Entries, images: ProbedImages) -> list[Finding]:
    """Check the image files, and their names and sizes in the annotations."""
    findings: list[Finding] = []
    probes = images.probes

    def add(code: str, rows: Sequence[int] | np.ndarray, describe: Callable[[int], str], **more: object) -> None:
        if len(rows):
            findings.append(entries.image_finding(code, np.asarray(rows), describe, total=len(probes), **more))  # type: ignore[arg-type]

    def detail(row: int) -> str:
        return probes[row].detail

    missing = images.rows("missing")
    if len(missing):
        renamed = find_renamed_files(entries, missing)
        hint = f"{len(renamed)} of them exist under a different spelling; --fix corrects the names" if renamed else ""

        def found_as(row: int) -> str:
            return f"found {renamed[row]}" if row in renamed else detail(row)

        add("image-missing", missing, found_as, detail=hint)
    for status in ("unreadable", "truncated", "damaged", "huge", "refused"):
        add(f"image-{status}", images.rows(status), detail)
    for code, rows in find_size_mismatches(entries, images).items():
        add(code, rows, lambda row: _describe_size(entries, images, row))
    readable = images.rows("ok", "huge", "truncated").tolist()
    extensions = Image.registered_extensions()

    def misnamed(row: int) -> bool:
        expected = extensions.get(Path(entries.file_names[row]).suffix.lower(), "")
        return bool(probes[row].format) and ("JPEG" if expected == "MPO" else expected) != probes[row].format

    add("image-extension", [row for row in readable if misnamed(row)], lambda row: f"it is {probes[row].format}")
    add("image-16bit", [r for r in readable if probes[r].bits > 8], lambda r: f"{probes[r].bits} bits")
    add("image-cmyk", [row for row in readable if probes[row].mode == "CMYK"], lambda row: "")
    add("image-alpha", [row for row in readable if probes[row].transparent], lambda row: probes[row].mode)
    add("image-frames", [r for r in readable if probes[r].frames > 1], lambda r: f"{probes[r].frames} frames")
    gray = [row for row in readable if probes[row].mode in ("L", "1", "LA", "I;16", "I", "F")]
    add("image-grey", gray, lambda row: probes[row].mode)
    add(
        "image-blank", np.flatnonzero(blank_mask(images)), lambda row: f"gray level {images.thumbnails[row].mean():.0f}"
    )
    return findings


def blank_mask(images: ProbedImages) -> np.ndarray:
    """bool [n]: decoded images of a single color."""
    flat = images.thumbnails.reshape(len(images.thumbnails), -1)
    ok = np.zeros(len(flat), bool)
    ok[images.rows("ok")] = images.decoded
    # A small bright object on a plain background changes at least one pixel of the thumbnail by more than 2.
    return ok & (np.ptp(flat, axis=1) <= 2) if len(flat) else ok


def find_size_mismatches(entries: Entries, images: ProbedImages) -> dict[str, list[int]]:
    """Rows of images by finding code: image-size, exif-at-odds (size before EXIF rotation), exif-turned (after)."""
    rows: dict[str, list[int]] = {"image-size": [], "exif-at-odds": [], "exif-turned": []}
    for row in images.rows("ok", "huge", "truncated", "damaged").tolist():
        annotated, stored = tuple(entries.sizes[row].tolist()), images.probes[row].size
        if 0 in annotated or 0 in stored:
            continue
        if annotated not in (stored, images.upright_size(row)):
            rows["image-size"].append(row)
        elif images.probes[row].orientation != 1:
            rows["exif-turned" if annotated == images.upright_size(row) else "exif-at-odds"].append(row)
    return rows


def find_renamed_files(entries: Entries, rows: np.ndarray) -> dict[int, str]:
    """For missing images (rows): the only file of the folder with the same stem in another spelling or subfolder."""
    if entries.folder is None or not entries.folder.is_dir():
        return {}
    by_stem: dict[str, list[str]] = {}
    for name in list_image_files(entries.folder):
        for key in {_normalized_stem(name), _normalized_stem(Path(name).name)}:
            by_stem.setdefault(key, []).append(name)
    listed = set(entries.file_names.tolist())
    renamed = {}
    for row in rows.tolist():
        named = str(entries.file_names[row]).replace("\\", "/")
        for key in (_normalized_stem(named), _normalized_stem(named.rsplit("/", 1)[-1])):
            candidates = [name for name in by_stem.get(key, ()) if name not in listed]
            if len(candidates) == 1:
                renamed[row] = candidates[0]
                break
    return renamed


def list_image_files(folder: Path) -> Iterator[str]:
    """Relative paths of all images in a folder and its subfolders, without links to folders, which may form loops."""
    extensions = set(Image.registered_extensions())
    for place, _, files in os.walk(folder):
        for name in files:
            if os.path.splitext(name)[1].lower() in extensions:
                yield os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")


def _normalized_stem(name: str) -> str:
    """A path without its extension, in lower case."""
    return os.path.splitext(name)[0].casefold()


def _describe_size(entries: Entries, images: ProbedImages, row: int) -> str:
    width, height = images.probes[row].size
    exif = f", EXIF orientation {images.probes[row].orientation}" if images.probes[row].orientation != 1 else ""
    return f"is {width}x{height}{exif}, annotated as {entries.sizes[row, 0]}x{entries.sizes[row, 1]}"
