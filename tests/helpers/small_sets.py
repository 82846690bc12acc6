"""Small VOC and YOLO sets with known answers; paths have spaces and letters of several scripts, on purpose. Parts of
COCO sets."""

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np


def save_image(path: Path, width: int = 60, height: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, np.zeros((height, width, 3), np.uint8))[1].tobytes())
    return path


def voc_xml(
    objects: str, size: str = "<size><width>60</width><height>40</height><depth>3</depth></size>", name=""
) -> str:
    return f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"


def voc_object(name="cat", corners=(1, 1, 60, 40), more="") -> str:
    xmin, ymin, xmax, ymax = corners
    box = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def write_voc(folder: Path) -> Path:
    """Two images, of which train.txt has one; names with spaces and letters of other scripts."""
    root = folder / "VOC набор 1"
    for stem, objects in (
        ("gato ñ 1", voc_object() + voc_object("dog", (11, 21, 20, 30), "<difficult>1</difficult>")),
        ("b", ""),
    ):
        save_image(root / "JPEGImages" / f"{stem}.jpg")
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{stem}.xml").write_text(voc_xml(objects, name=f"{stem}.jpg"), encoding="utf-8")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("gato ñ 1\n", encoding="utf-8")
    return root


def write_yolo(folder: Path) -> Path:
    """Three images for training, one of them without a label file, one with an empty one; one for validation."""
    root = folder / "YOLO 集"
    for name in ("train/a 猫.jpg", "train/sub/b.png", "train/c.jpg", "val/d.jpg"):
        save_image(root / "images" / name)
        (root / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "labels/train/a 猫.txt").write_text("1 0.5 0.5 1 1\n\n0 0.25 0.5 0.1 0.2\n")
    (root / "labels/train/sub/b.txt").write_text("0 0.1 0.1 0.2 0.1 0.2 0.3\n")
    (root / "labels/train/c.txt").write_text("")
    (root / "labels/val/d.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text(
        "train: images/train\nval: [images/val]\nnc: 2\nnames: [кот, dog]\n", encoding="utf-8"
    )
    return root


def write_part(
    folder: Path, name: str, classes: Sequence[str], images: slice = slice(None), ids: dict[str, int] | None = None
) -> str:
    """A COCO file beside annotations.json with some of its images, and the boxes of some of its classes."""
    content = json.loads((folder / "annotations.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    new = {number: (ids or {}).get(name, number) for number, name in names.items()}
    content["images"] = content["images"][images]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [
        {**a, "category_id": new[a["category_id"]]}
        for a in content["annotations"]
        if a["image_id"] in kept and names[a["category_id"]] in classes
    ]
    content["categories"] = [{"id": new[i], "name": n} for i, n in names.items() if n in classes]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return str(path)
