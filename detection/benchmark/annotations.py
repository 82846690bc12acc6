"""Reading a large annotation file, beside pycocotools: a file to do it on, and seconds and peak memory in one run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from detection.benchmark.pictures import write_crops
from detection.data.index_cache import FROM_BYTES, places_of
from detection.errors import UserError
from detection.outputs import check_outputs, write_output

CLASSES, HIGHEST_ID = 80, 90
"""As COCO has them: 80 ids between 1 and 90."""
COORDINATES = 1 << 17

WAYS = {
    "pycocotools.COCO(file)": "from pycocotools.coco import COCO\ndef read(): return COCO(path)",
    "read, no cache": (
        "from detection.data.formats import read_annotations\n"
        "def read(): return read_annotations(path, images='.', cache=False)"
    ),
    "read, cache written": (
        "from detection.data.formats import read_annotations\ndef read(): return read_annotations(path, images='.')"
    ),
    "opened from cache": (
        "from detection.data.formats import read_annotations\ndef read(): return read_annotations(path, images='.')"
    ),
}
# A process of its own for each: what one leaves behind in memory is not counted for the next.
_MEASURE = """
import contextlib, io, json, resource, sys, time
path = sys.argv[1]
{way}
start = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    result = read()
seconds = time.perf_counter() - start
try:
    # What Linux calls maxrss is not less than that of the process that started this one.
    peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
except (OSError, IndexError):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, peak]))
"""


def make_coco_like(
    out: str | Path,
    *,
    images: int = 118_287,
    boxes: int = 860_001,
    seed: int = 0,
    photographs: str | Path | None = None,
    force: bool = False,
) -> int:
    """Write a file with the entries, key order and lengths of instances_train2017.json, polygons of random numbers.

    With the default numbers it has the size of COCO's, too. Returns its size in bytes.

    Args:
        force: overwrite files that this toolkit did not write.
        photographs: a folder; random parts of what lies in it become the pictures, in images/ beside `out`.

    Raises:
        UserError: it cannot be written, or there are no photographs.
    """
    path = Path(out)
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {path.parent}")
    check_outputs([path], [photographs], force=force)
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(np.arange(1, 4 * images + 1), images, replace=False))
    sizes = rng.integers(240, 641, (images, 2))
    owners = np.sort(rng.integers(0, images, boxes))
    category_ids = np.sort(rng.choice(np.arange(1, HIGHEST_ID + 1), CLASSES, replace=False))
    # Zipf-like: COCO's largest class has a third of the boxes.
    shares = 1 / np.arange(1, CLASSES + 1)
    labels = category_ids[rng.choice(CLASSES, boxes, p=shares / shares.sum())]
    corners = rng.random((boxes, 2)) * 0.8
    spans = (1 - corners) * (0.02 + 0.98 * rng.random((boxes, 2)) ** 2)
    crowd = rng.random(boxes) < 0.012
    coordinates = [f"{value:.2f}" for value in rng.random(COORDINATES) * 640]
    lengths = 2 * np.clip(rng.exponential(22, boxes).astype(int) + 4, 4, 2000)
    starts = rng.integers(0, COORDINATES - 4000, boxes)

    def write(file: Any) -> None:
        def text(value: str) -> None:
            file.write(value.encode())

        text('{"info": {"description": "drawn by chance, in the likeness of COCO 2017"},"licenses": [],"images": [')
        for i in range(images):
            width, height, name = sizes[i, 0], sizes[i, 1], f"{ids[i]:012d}.jpg"
            text(
                f'{"," if i else ""}{{"license": 3,"file_name": "{name}",'
                f'"coco_url": "http://images.cocodataset.org/train2017/{name}","height": {height},"width": {width},'
                f'"date_captured": "2013-11-14 11:18:45","flickr_url": "http://farm9.staticflickr.com/8186/'
                f'81199{ids[i]:05d}_06d5bfd1ee_z.jpg","id": {ids[i]}}}'
            )
        text('],"annotations": [')
        for i in range(boxes):
            width, height = sizes[owners[i]].tolist()
            (x, y), (w, h) = corners[i].tolist(), spans[i].tolist()
            polygon = ",".join(coordinates[starts[i] : starts[i] + lengths[i]])
            text(
                f'{"," if i else ""}{{"segmentation": [[{polygon}]],"area": {w * h * width * height / 2},'
                f'"iscrowd": {int(crowd[i])},"image_id": {ids[owners[i]]},"bbox": [{x * width:.2f},{y * height:.2f},'
                f'{w * width:.2f},{h * height:.2f}],"category_id": {labels[i]},"id": {900_000 + i}}}'
            )
        names = [{"supercategory": "thing", "id": int(c), "name": f"class {c}"} for c in category_ids]
        text(f'],"categories": {json.dumps(names)}}}')

    if photographs is not None:
        folder, names = path.parent / "images", [f"{i:012d}.jpg" for i in ids]
        check_outputs([folder / name for name in names], [photographs], force=force)
        write_crops(folder, Path(photographs), names, sizes, seed)
    write_output(path, write)
    return path.stat().st_size


def compare_reading(annotations: str | Path) -> str:
    """A table: seconds and peak memory of each way to read `annotations`, and what part they are of pycocotools'.

    Raises:
        UserError: the file is absent, too small for a cache, or one way fails.
    """
    path = Path(annotations)
    if not path.is_file():
        raise UserError(f"annotation file {path} does not exist")
    if path.stat().st_size < FROM_BYTES:
        raise UserError(f"{path} has less than {FROM_BYTES >> 20} MB: nothing is cached, nothing is to be gained")
    for place in places_of(path):
        place.unlink(missing_ok=True)
    found = {name: _measure(name, path) for name in WAYS}
    seconds, memory = found["pycocotools.COCO(file)"]
    lines = [
        f"{path}, {path.stat().st_size / 1e6:.0f} MB",
        f"{'':<24}{'seconds':>8}{'ratio':>8}{'peak MB':>9}{'ratio':>8}",
    ]
    for name, (own, peak) in found.items():
        lines.append(f"{name:<24}{own:>8.2f}{own / seconds:>8.3f}{peak / 1e6:>9.0f}{peak / memory:>8.3f}")
    return "\n".join(lines)


def _measure(name: str, path: Path) -> tuple[float, float]:
    command = [sys.executable, "-c", _MEASURE.format(way=WAYS[name]), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{name} failed on {path}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak
