"""Checks of Pascal VOC and YOLO datasets."""

import functools

import cv2
import numpy as np
from faulty_datasets import errors_and_warnings

from detection.doctor.read_sets import read_sets
from detection.doctor.run_checks import run_checks
from detection.doctor.text_report import format_report

VOC = """<annotation><filename>{name}.jpg</filename><size><width>96</width><height>72</height><depth>3</depth></size>
{objects}</annotation>"""
OBJECT = (
    "<object><name>{0}</name><bndbox><xmin>{1}</xmin><ymin>{2}</ymin><xmax>{3}</xmax><ymax>{4}</ymax></bndbox></object>"
)


@functools.cache
def images():
    rng = np.random.default_rng(5)
    return [
        cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (96, 72), interpolation=cv2.INTER_CUBIC)
        for _ in range(12)
    ]


def write_voc(folder):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for i, image in enumerate(images()):
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
    for i, image in enumerate(images()):
        cv2.imwrite(str(folder / "images" / f"{i}.jpg"), image)
        lines = [f"{k % 2} {0.15 + 0.2 * k} {0.3 + 0.01 * i} 0.15 0.3" for k in range(4)]
        (folder / "labels" / f"{i}.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text("train: images\nnames: [cat, dog]\n")
    return folder


def test_voc(tmp_path):
    folder = write_voc(tmp_path / "voc")
    sets, _ = read_sets(str(folder))
    assert [entries.split for entries in sets] == ["train", "val"] and sets[0].format == "voc"
    assert errors_and_warnings(run_checks(sets)) <= {"class-few"}
    (folder / "Annotations" / "7.xml").write_text("<annotation>")
    text = (folder / "Annotations" / "8.xml").read_text()
    (folder / "Annotations" / "8.xml").write_text(text.replace("<xmax>25</xmax>", "<xmax>900</xmax>"))
    (folder / "JPEGImages" / "9.jpg").write_bytes(b"")
    report = run_checks(read_sets(str(folder))[0])
    assert errors_and_warnings(report) - {"class-few"} == {"file-broken", "box-beyond", "image-unreadable"}
    assert "7.xml" in format_report(report)


def test_yolo(tmp_path):
    folder = write_yolo(tmp_path / "yolo")
    for target in (folder, folder / "data.yaml"):
        sets, config = read_sets(str(target))
        assert config is None and sets[0].format == "yolo"
        assert run_checks(sets).findings == []
    (folder / "labels" / "3.txt").write_text("7 0.5 0.5 0.1 0.1\n0 0.9 0.5 0.4 0.1")
    (folder / "labels" / "4.txt").write_text("0 0.5 0.5 0.1\n1 0.5 0.5 0 0.1")
    report = run_checks(read_sets(str(folder))[0])
    assert errors_and_warnings(report) == {"category-unknown", "entry-broken", "box-beyond", "box-degenerate"}
    assert "3.txt, line 1" in format_report(report)
