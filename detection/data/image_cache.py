"""Images decoded and resized once, kept in memory or in one file on disk (`train.cache`).

Decoding a JPEG costs more than all the rest of a sample. What is kept is what `DetectionDataset` would have
after its first resize, so training sees the same pixels with and without.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from detection.core.errors import UserError
from detection.core.files import CACHE_FOLDER
from detection.core.memory import available_memory
from detection.core.progress import progress_bar

Read = Callable[[int], np.ndarray]
FOLDER = CACHE_FOLDER


class ImageCache:
    """`cache[i]` is the image uint8 [H, W, 3] that `read(i)` gave, or raises the UserError that it raised.

    Args:
        shapes: int [n, 2], height and width of what `read` returns.
        where: "ram" or "disk".
        key: text that changes whenever the images do; names the file on disk.
    """

    def __init__(self, shapes: np.ndarray, read: Read, where: str, key: str) -> None:
        self.shapes = shapes
        sizes = shapes.astype(np.int64).prod(axis=1) * 3
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.errors: dict[int, UserError] = {}
        total = int(self.offsets[-1])
        if where == "ram":
            _check_room(total, available_memory(), "memory", "train.cache=disk or off")
            # Forked workers share these pages, which are not written to once they are filled.
            self.pixels: np.ndarray = np.empty(total, np.uint8)
            self._fill(self.pixels, read)
        else:
            self.pixels = self._from_disk(total, read, key)

    def __getitem__(self, i: int) -> np.ndarray:
        if i in self.errors:
            raise self.errors[i]
        height, width = self.shapes[i]
        return np.asarray(self.pixels[self.offsets[i] : self.offsets[i + 1]]).reshape(height, width, 3)

    def _fill(self, pixels: np.ndarray, read: Read) -> None:
        def keep(i: int) -> None:
            try:
                pixels[self.offsets[i] : self.offsets[i + 1]] = read(i).reshape(-1)
            except UserError as error:
                self.errors[i] = error

        # Threads: OpenCV decodes without holding Python's lock.
        count = len(self.shapes)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for _ in progress_bar(pool.map(keep, range(count)), "cache", count):
                pass

    def _from_disk(self, total: int, read: Read, key: str) -> np.ndarray:
        path = FOLDER / f"images-{hashlib.sha256(key.encode()).hexdigest()[:20]}.bin"
        try:
            if path.is_file() and path.stat().st_size == total:
                return np.memmap(path, np.uint8, "r", shape=(total,))
            path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path.parent).free
            _check_room(total, free, f"disk space in {path.parent}", "train.cache=off")
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".filling-")
            os.close(handle)
            try:
                pixels = np.memmap(name, np.uint8, "w+", shape=(total,))
                self._fill(pixels, read)
                pixels.flush()
                # A dataset with bad images is read again each time, so that they are reported each time.
                if not self.errors:
                    os.replace(name, path)
                return pixels
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"train.cache=disk: {path.parent}: {error.strerror}; use train.cache=off") from error


def _check_room(needed: int, free: int | None, what: str, remedy: str) -> None:
    if free is not None and needed > 0.8 * free:
        raise UserError(
            f"train.cache needs {needed / 2**30:.1f} GiB of {what} and {free / 2**30:.1f} GiB are free; use {remedy}"
        )
