"""Writes a random annotation file of the size of COCO, to measure how fast large files are read."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from detection.core.errors import UserError
from detection.core.outputs import check_outputs, write_output
from detection.data.synthetic.random_crops import write_crops

CLASSES, HIGHEST_ID = 80, 90
"""As in COCO: 80 category ids between 1 and 90."""
COORDINATES = 1 << 17


def make_coco_like(
    out: str | Path,
    *,
    images: int = 118_287,
    boxes: int = 860_001,
    seed: int = 0,
    photographs: str | Path | None = None,
    force: bool = False,
) -> int:
    """Write a random annotation file with the entries, key order and lengths of instances_train2017.json.

    With the default numbers it is as large as COCO's file. Returns its size in bytes.

    Args:
        photographs: a folder of photographs; random parts of them become the images, in images/ beside `out`.
        force: overwrite files that this toolkit did not write.

    Raises:
        UserError: the file cannot be written, or there are no photographs.
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
    # Zipf distribution: the largest class of COCO has a third of the boxes.
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
