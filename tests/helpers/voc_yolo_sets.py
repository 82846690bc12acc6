"""VOC and YOLO datasets of twelve images without a fault, for checks of the doctor."""

import functools

import cv2
import numpy as np

VOC = """<annotation><filename>{name}.jpg</filename><size><width>96</width><height>72</height><depth>3</depth></size>
{objects}</annotation>"""
OBJECT = (
    "<object><name>{0}</name><bndbox><xmin>{1}</xmin><ymin>{2}</ymin><xmax>{3}</xmax><ymax>{4}</ymax></bndbox></object>"
)


@functools.cache
def _images():
    rng = np.random.default_rng(5)
    return [
        cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (96, 72), interpolation=cv2.INTER_CUBIC)
        for _ in range(12)
    ]


def write_voc(folder):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for i, image in enumerate(_images()):
        cv2.imwrite(str(folder / "JPEGImages" / f"{i}.jpg"), image)
        boxes = [("cat" if k % 2 else "dog", 3 + 30 * k, 5 + i, 25 + 30 * k, 40 + i) for k in range(3)]
        boxes.append(("cat", 5, 44 + i, 40, 60 + i))
        objects = "".join(OBJECT.format(*box) for box in boxes)
        (folder / "Annotations" / f"{i}.xml").write_text(VOC.format(name=i, objects=objects))
    (folder / "ImageSets" / "Main" / "train.txt").write_text("\n".join(map(str, range(6, 12))))
    (folder / "ImageSets" / "Main" / "val.txt").write_text("\n".join(map(str, range(6))))
    return folder


def write_yolo(folder):
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for i, image in enumerate(_images()):
        cv2.imwrite(str(folder / "images" / f"{i}.jpg"), image)
        lines = [f"{k % 2} {0.15 + 0.2 * k} {0.3 + 0.01 * i} 0.15 0.3" for k in range(4)]
        (folder / "labels" / f"{i}.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text("train: images\nnames: [cat, dog]\n")
    return folder
