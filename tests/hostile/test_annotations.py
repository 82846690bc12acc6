"""Annotation and prediction files that are hostile, damaged or none: one error, or a finding, and nothing gets out."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from odd_files import dangling, fifo, loop, unix_socket
from run_tool import Outcome, run

from detection.core.errors import UserError
from detection.data.formats.detect_format import read_annotations
from detection.data.formats.index_cache import places_of
from detection.data.image_io import names_outside

pytestmark = pytest.mark.timeout(60)
IMAGE = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))[1].tobytes()
SIZE = "<size><width>50</width><height>40</height></size>"
BOX = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>20</xmax><ymax>20</ymax></bndbox>"


def coco(folder: Path, **changes) -> Path:
    """A COCO set of two images with a box each; `changes` are keys of its first image, annotation or whole lists."""
    (folder / "images").mkdir(exist_ok=True)
    for name in ("a.jpg", "b.jpg"):
        (folder / "images" / name).write_bytes(IMAGE)
    images = [{"id": i, "file_name": name, "width": 50, "height": 40} for i, name in enumerate(("a.jpg", "b.jpg"), 1)]
    annotations = [{"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 9, 9], "iscrowd": 0} for i in (1, 2)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    for key, value in changes.items():
        if key in content:
            content[key] = value
        else:
            next(entry[0] for entry in content.values() if key in entry[0])[key] = value
    (folder / "set.json").write_text(json.dumps(content))
    return folder / "set.json"


def voc(folder: Path, text: str | None = None, filename: str = "a.jpg") -> Path:
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "JPEGImages" / "a.jpg").write_bytes(IMAGE)
    good = f"<annotation><filename>{filename}</filename>{SIZE}<object><name>cat</name>{BOX}</object></annotation>"
    (folder / "Annotations" / "a.xml").write_text(good if text is None else text)
    return folder


def yolo(folder: Path, listed: str = "images/a.jpg", **keys: object) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "images" / "a.jpg").write_bytes(IMAGE)
    (folder / "images" / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (folder / "list.txt").write_text(f"{listed}\n")
    content = {"train": "list.txt", "names": ["cat"]} | keys
    (folder / "data.yaml").write_text(json.dumps(content))
    return folder / "data.yaml"


def secret(folder: Path) -> Path:
    """A file beside the set that no reader should touch."""
    (folder / "secret.jpg").write_bytes(IMAGE)
    return folder / "secret.jpg"


def voc_with_list(folder: Path) -> Path:
    root = voc(folder / "voc")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("../../secret\n")
    return root


OUTSIDE: dict[str, Callable[[Path], Path]] = {
    "coco": lambda folder: coco(folder / "set", file_name="../../secret.jpg"),
    "coco deep": lambda folder: coco(folder / "set", file_name="x/../../../secret.jpg"),
    "coco absolute": lambda folder: coco(folder / "set", file_name=str(folder / "secret.jpg")),
    "coco the folder itself": lambda folder: coco(folder / "set", file_name="x/.."),
    "voc": lambda folder: voc(folder / "voc", filename="../../secret.jpg"),
    "voc absolute": lambda folder: voc(folder / "voc", filename=str(folder / "secret.jpg")),
    "voc image set": voc_with_list,
    "yolo": lambda folder: yolo(folder / "yolo", "../secret.jpg"),
    "yolo absolute": lambda folder: yolo(folder / "yolo", str(folder / "secret.jpg")),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_the_images_folder(name, tmp_path):
    secret(tmp_path)
    (tmp_path / "set").mkdir()
    source = OUTSIDE[name](tmp_path)
    if name.startswith("voc") and "set" not in name:
        (source / "JPEGImages" / "a.jpg").rename(source / "JPEGImages" / "b.jpg")  # else it is found by the XML's name
    with pytest.raises(UserError, match="leads out of the"):
        read_annotations(source, split=None if name in ("voc", "voc absolute") else "train")
    for transfer in ("copy", "link"):
        outcome = run("convert_data", source, "--to", "coco", "--out", tmp_path / "out", "--transfer", transfer)
        outcome.assert_error("leads out of the")
        assert not (tmp_path / "out").exists()
    outcome = run("check_data", source)
    # A reader's error, or the rule of the data check.
    said = outcome.out + outcome.err
    assert outcome.code in (1, 2) and ("leads out of the" in said or "point outside the image folder" in said)


def test_names_that_stay_inside(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "way").symlink_to(tmp_path / "set")
    for name in ("sub/../a.jpg", "./a.jpg", "..a.jpg", "a..jpg", f"{tmp_path}/set/images/a.jpg"):
        assert not names_outside([name], tmp_path / "set" / "images"), name
    assert not names_outside([f"{tmp_path}/set/images/a.jpg"], tmp_path / "way" / "images")
    # A link inside is the user's own.
    path = coco(tmp_path / "set")
    (tmp_path / "set" / "images" / "a.jpg").unlink()
    (tmp_path / "set" / "images" / "a.jpg").symlink_to(secret(tmp_path))
    assert run("convert_data", path, "--to", "yolo", "--out", tmp_path / "out").code == 0
    # So are the folders that a data.yaml names, wherever they are.
    source = yolo(tmp_path / "yolo", train="../photos")
    (tmp_path / "photos").mkdir()
    (tmp_path / "yolo" / "images" / "a.jpg").rename(tmp_path / "photos" / "a.jpg")
    (tmp_path / "photos" / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    assert len(read_annotations(source)) == 1
    for transfer, code in (("copy", 0), ("none", 2)):
        outcome = run("convert_data", source, "--to", "coco", "--out", tmp_path / transfer, "--transfer", transfer)
        assert outcome.code == code, outcome.err


def test_an_index_is_not_a_way_out(tmp_path, monkeypatch):
    """The index of a file was kept with an images folder that holds the image, and is opened with another."""
    monkeypatch.setattr("detection.data.formats.index_cache.FROM_BYTES", 0)
    secret(tmp_path)
    (tmp_path / "set").mkdir()
    path = coco(tmp_path / "set", file_name=str(tmp_path / "secret.jpg"))
    assert len(read_annotations(path, images=tmp_path)) == 2 and places_of(path)[0].exists()
    with pytest.raises(UserError, match="leads out"):
        read_annotations(path)


def test_nothing_is_written_outside_of_the_output_folder(tmp_path):
    """Names with backslashes, dots and folders, into each format."""
    names = ["..\\..\\a.jpg", "a..jpg", "x/./y/a.jpg", "b...jpg", "images/..b/a.jpg"]
    (tmp_path / "set" / "images").mkdir(parents=True)
    for name in names:
        (tmp_path / "set" / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "images" / name).write_bytes(IMAGE)
    images = [{"id": i, "file_name": name, "width": 50, "height": 40} for i, name in enumerate(names)]
    annotations = [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [5, 5, 9, 9]}]
    path = coco(tmp_path / "set", images=images, annotations=annotations, categories=[{"id": 1, "name": "../../cat"}])
    before = sorted(tmp_path.rglob("*"))
    for to in ("coco", "voc", "yolo"):
        outcome = run("convert_data", path, "--to", to, "--out", tmp_path / "out" / to)
        assert outcome.code == 0, outcome.err
        assert len(read_annotations(tmp_path / "out" / to, split="train")) == 5
    after = [p for p in tmp_path.rglob("*") if tmp_path / "out" not in p.parents and p != tmp_path / "out"]
    assert sorted(after) == before


DEEP, NESTED = "[" * 100_000 + "]" * 100_000, "[" * 900 + "]" * 900
DEEP_LIST = f'{{"images": [], "categories": [], "annotations": [{DEEP}]}}'
NO_ANNOTATIONS = {
    "passwd": (lambda folder: Path("/etc/passwd"), "/etc/passwd is in no known format"),
    "passwd as json": (lambda folder: linked(folder, "/etc/passwd"), "is not JSON"),
    "device as json": (lambda folder: linked(folder, "/dev/zero"), "a device"),
    "fifo": (lambda folder: renamed(fifo(folder)), "a named pipe"),
    "socket": (lambda folder: renamed(unix_socket(folder)), "a socket"),
    "loop": (lambda folder: renamed(loop(folder), "loop.jpg"), "back to itself"),
    "dangling": (lambda folder: renamed(dangling(folder)), "does not exist"),
    "deep": (lambda folder: text(folder, DEEP), "is not"),
    "deep in an entry": (lambda folder: coco(folder, bbox=["x"], iscrowd=json.loads(NESTED)), "bbox"),
    "deep list": (lambda folder: text(folder, DEEP_LIST), "nest|recursion"),
    "no images": (lambda folder: coco(folder, images=[]), "names image 1, which the file does not have|no images"),
    "id of 400 digits": (lambda folder: coco(folder, image_id=10**400), "does not have|image"),
    "side of 5000 digits": (lambda folder: replaced(coco(folder), "50", "1" * 5000), "is not JSON"),
    "box of 400 digits": (lambda folder: coco(folder, bbox=[10**400, 1, 1, 1]), "four numbers"),
    "NaN": (lambda folder: coco(folder, bbox=[float("nan"), 1, 1, 1]), "not finite|not four finite"),
    "file name a list": (lambda folder: coco(folder, file_name=["a"]), "file_name"),
    "category a list": (lambda folder: coco(folder, categories=[{"id": 1, "name": [[["x"]]]}]), "name"),
    "NUL in a name": (lambda folder: coco(folder, file_name="a\0b.jpg"), "file_name|no file"),
}  # fmt: skip


def linked(folder: Path, target: str) -> Path:
    (folder / "set.json").symlink_to(target)
    return folder / "set.json"


def renamed(path: Path, leads_to: str | None = None) -> Path:
    new = path.rename(path.with_suffix(".json"))
    if leads_to is not None:
        new.unlink()
        new.symlink_to(new.name)
    return new


def text(folder: Path, content: str) -> Path:
    (folder / "set.json").write_text(content)
    return folder / "set.json"


def replaced(path: Path, old: str, new: str) -> Path:
    path.write_text(path.read_text().replace(old, new, 1))
    return path


def said(outcome: Outcome, words: str) -> bool:
    return any(word in outcome.out + outcome.err for word in words.split("|"))


@pytest.mark.parametrize("name", NO_ANNOTATIONS)
def test_annotations_that_are_none(name, tmp_path):
    make, words = NO_ANNOTATIONS[name]
    path = make(tmp_path)
    outcome = run("convert_data", path, "--to", "voc", "--out", tmp_path / "out", "--images", tmp_path)
    outcome.assert_error()
    assert said(outcome, words), outcome.err
    assert not (tmp_path / "out").exists()
    outcome = run("check_data", path, "--images", tmp_path)
    assert outcome.code in (1, 2), outcome.err
    if outcome.code == 2:
        outcome.assert_error()
    for tool in (["evaluate", "--predictions", path, "--data", path], ["make_crops", path, "--out", tmp_path / "out"]):
        run(*tool).assert_error()


def detection(image_id="1", category_id="1", x="1", width="1", score="1") -> str:
    """A predictions file of one entry, of JSON texts."""
    box = f"[{x}, 1, {width}, 1]"
    return f'[{{"image_id": {image_id}, "category_id": {category_id}, "bbox": {box}, "score": {score}}}]'


BAD_PREDICTIONS = {
    "deep": (DEEP, "nested too deeply"),
    "deep entry": (f"[{NESTED}]", "entry 1 is not an object"),
    "deep image id": (detection(image_id=NESTED), "image_id"),
    "deep number": (detection(x=NESTED), "bbox"),
    "object": ("{}", "expected is a list"),
    "number": ("5", "expected is a list"),
    "id a list": (detection(image_id="[1]"), "image_id [1] is not"),
    "id an object": (detection(category_id="{}"), "category_id {} is not"),
    "id true": (detection(image_id="true"), "image_id True"),
    "unknown": (detection(image_id="7"), "image_id 7 is not in"),
    "box of 400 digits": (detection(x=f"1{'0' * 400}"), "bbox"),
    "box 1e300": (detection(width="1e300"), "up to 1e+09"),
    "box NaN": (detection(x="NaN"), "bbox"),
    "score infinite": (detection(score="1e999"), "score"),
    "score of 5000 digits": (detection(score=f"1{'0' * 5000}"), "is not JSON"),
    "not UTF-8": (b"[\xff]", "not UTF-8"),
    "empty": ("", "is not JSON"),
}


@pytest.mark.parametrize("name", BAD_PREDICTIONS)
def test_predictions_that_are_none(name, tmp_path):
    content, words = BAD_PREDICTIONS[name]
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "predictions.json").write_bytes(data)
    outcome = run("evaluate", "--predictions", tmp_path / "predictions.json", "--data", coco(tmp_path))
    outcome.assert_error("predictions.json", words)


@pytest.mark.parametrize(("make", "words"), [(fifo, "a named pipe"), (lambda folder: Path("/dev/zero"), "a device")])
def test_predictions_that_are_no_file(make, words, tmp_path):
    run("evaluate", "--predictions", make(tmp_path), "--data", coco(tmp_path)).assert_error(words)


NO_VOC = {
    "html": ("<html><body>404</body></html>", "root is <html>"),
    "svg": ('<svg xmlns="http://www.w3.org/2000/svg"/>', "root is <{http://www.w3.org/2000/svg}svg>"),
    "deep": ("<annotation>" + "<a>" * 100_000 + "</a>" * 100_000 + "</annotation>", ""),
    "entities": ('<!DOCTYPE a [<!ENTITY x "x">]><annotation>&x;</annotation>', "declares entities"),
    "empty": ("", "is empty"),
}


@pytest.mark.parametrize("name", NO_VOC)
def test_xml_that_is_no_annotation(name, tmp_path):
    content, words = NO_VOC[name]
    source = voc(tmp_path / "voc", content)
    outcome = run("convert_data", source, "--to", "coco", "--out", tmp_path / "out")
    outcome.assert_error(words)
    outcome = run("check_data", source)
    assert outcome.code in (1, 2) and words in outcome.out + outcome.err


@pytest.mark.parametrize("make", [fifo, unix_socket, loop, dangling])
@pytest.mark.parametrize("form", ["voc", "yolo", "yolo list", "voc list"])
def test_label_files_that_are_none(form, make, tmp_path):
    if form.startswith("voc"):
        source, label = voc(tmp_path / "voc"), tmp_path / "voc" / "Annotations" / "a.xml"
        if "list" in form:
            label = tmp_path / "voc" / "ImageSets" / "Main" / "train.txt"
            label.parent.mkdir(parents=True)
            label.write_text("a")
    else:
        source = yolo(tmp_path / "yolo")
        label = tmp_path / "yolo" / ("list.txt" if "list" in form else "images/a.txt")
    label.unlink()
    odd = make(label.parent)
    if make is loop:
        odd.unlink()
        label.symlink_to(label.name)
    else:
        odd.rename(label)
    outcome = run("convert_data", source, "--to", "coco", "--out", tmp_path / "out")
    outcome.assert_error()
    assert label.name in outcome.err or "train" in outcome.err
    assert run("check_data", source).code in (1, 2)


def test_an_impossible_date_in_yaml(tmp_path):
    for content in ("data: 2024-99-99\n", "names: [a]\ntrain: 2024-02-31\n", "seed: 2024-13-45\n"):
        (tmp_path / "data.yaml").write_text(content)
        run("check_data", tmp_path / "data.yaml").assert_error("data.yaml")


def test_odd_files_in_the_place_of_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr("detection.data.formats.index_cache.FROM_BYTES", 0)
    path = coco(tmp_path)
    place = places_of(path)[0]
    for make in (fifo, loop, dangling):
        make(tmp_path).rename(place)
        assert len(read_annotations(path)) == 2
        assert place.is_file()
        os.unlink(place)
