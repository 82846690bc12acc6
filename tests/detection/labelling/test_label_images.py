"""Labelling of drawn images by a detector that finds exactly what was drawn."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import assert_whole
from cell_detector import NAMES, adapter_text, draw_cells, write_detector
from conftest import ROOT
from run_tool import run

from detection.data.annotations import Annotations
from detection.data.formats.detect_format import read_annotations
from detection.inference.predictor import Predictor
from detection.labelling.label_images import LabelOptions, label_images

SURE, DOUBTFUL, BELOW = 0.8, 0.3, 0.1
CELLS = [
    {(0, 0): (NAMES[0], SURE), (3, 2): (NAMES[1], 1.0), (1, 1): (NAMES[2], DOUBTFUL)},
    {(0, 0): (NAMES[1], DOUBTFUL), (2, 0): (NAMES[0], SURE), (2, 2): (NAMES[0], BELOW)},
    {},
    {(c, r): (NAMES[(c + r) % 3], SURE) for c in range(4) for r in range(3)},
]
"""Of each image: its objects, with the score that the detector gives them."""
FILES = ("a.png", "deep/b 猫.png", "empty.png", "z.png")


@pytest.fixture()
def detector(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "cells.yaml").write_text(adapter_text("yolov8"))
    return write_detector(tmp_path / "model" / "cells.onnx")


@pytest.fixture()
def photos(tmp_path) -> Path:
    for name, cells in zip(FILES, CELLS, strict=True):
        draw_cells(tmp_path / "photos" / name, cells)
    return tmp_path / "photos"


def entry_of(number: int, image: int, category: int, cell: tuple[int, int]) -> dict:
    box = [64 * cell[0] + 1, 64 * cell[1], 60.5, 64]  # not exactly the detector's
    entry = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": 100.5, "iscrowd": 0}
    return {**entry, "segmentation": [[1, 2, 3.5, 4, 5, 6]], "note": "by hand"}


def write_data(folder: Path, photos: Path, categories: dict[int, str]) -> Path:
    """A COCO set of the images with annotations of some classes, each a pixel off what the detector finds."""
    ids = {name: number for number, name in categories.items()}
    content: dict = {
        "licenses": [{"id": 1, "name": "mine"}],
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name, "supercategory": "shape"} for number, name in categories.items()],
    }
    for i, (name, cells) in enumerate(zip(FILES, CELLS, strict=True)):
        content["images"].append({"id": 50 - i, "file_name": name, "width": 256, "height": 192, "license": 1})
        for cell, (kind, _) in cells.items():
            if kind in ids:
                content["annotations"].append(entry_of(7 * len(content["annotations"]), 50 - i, ids[kind], cell))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "images").symlink_to(photos)
    (folder / "val.json").write_text(json.dumps(content))
    return folder / "val.json"


def boxes_of(index: Annotations) -> dict[str, set]:
    """Image -> {(class, crowd, x, y, w, h)}, in hundredths of a pixel."""
    found = {}
    for i, name in enumerate(index.file_names.tolist()):
        rows = range(index.offsets[i], index.offsets[i + 1])
        found[Path(name).name] = {
            (index.class_names[index.labels[r] - 1], bool(index.crowd[r]), *np.round(index.boxes[r], 2).tolist())
            for r in rows
        }
    return found


def expected_boxes(names=NAMES) -> dict[str, set]:
    return {
        Path(file).name: {
            (name, score < 0.4, 64.0 * column, 64.0 * row, 64.0, 64.0)
            for (column, row), (name, score) in cells.items()
            if name in names and score > BELOW + 0.01
        }
        for file, cells in zip(FILES, CELLS, strict=True)
    }


def test_a_folder_becomes_coco(detector, photos, tmp_path):
    done = run("label", detector, photos, "--out", tmp_path / "out", "--device", "cpu")
    assert done.code == 0 and "4 images, 0 boxes kept, 15 added, 2 doubtful" in done.out, done
    index = read_annotations(tmp_path / "out" / "train.json", images=photos)
    assert boxes_of(index) == expected_boxes()
    assert index.class_names == NAMES and index.category_ids.tolist() == [1, 2, 3]
    assert f"data.train.images={photos}" in done.out
    content = json.loads((tmp_path / "out" / "train.json").read_text())
    assert {a["source"] for a in content["annotations"]} == {"cells.onnx"}
    assert {round(a["score"], 2) for a in content["annotations"]} == {DOUBTFUL, SURE, 1.0}
    assert sorted(a["id"] for a in content["annotations"]) == list(range(1, 18))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.json"]
    assert not list(tmp_path.glob("*.part*")) and not list(tmp_path.glob(".out*")), "nothing is left behind"


@pytest.mark.parametrize("format", ["voc", "yolo"])
@pytest.mark.parametrize("transfer", ["link", "copy"])
def test_a_folder_becomes_voc_or_yolo(format, transfer, detector, photos, tmp_path):
    options = LabelOptions(format, transfer=transfer)
    summary = label_images(detector, tmp_path / "out", source=photos, options=options, device="cpu")
    index = read_annotations(tmp_path / "out", split="train")
    expected = expected_boxes()
    if format == "voc":
        assert {name.replace("deep_", ""): boxes for name, boxes in boxes_of(index).items()} == expected
    else:
        # YOLO has no mark for a doubtful box.
        assert boxes_of(index) == {name: {b for b in boxes if not b[1]} for name, boxes in expected.items()}
        assert any("2 crowd regions are lost" in note for note in summary.notes)
    image = next(Path(index.images).rglob("a.png"))
    assert image.is_symlink() == (transfer == "link") and image.read_bytes() == (photos / "a.png").read_bytes()


@pytest.mark.parametrize("class_list", ["data", "detector"])
def test_classes_that_a_set_lacks_are_filled_in(class_list, detector, photos, tmp_path):
    """The second class is annotated by hand, under another id; "triangle" the detector does not know."""
    data = write_data(tmp_path / "set", photos, {9: "triangle", 4: NAMES[1]})
    arguments = ("--data", data, "--class-list", class_list, "--device", "cpu")
    done = run("label", detector, *arguments, "--out", tmp_path / "out")
    assert done.code == 0, done
    old, new = (json.loads(path.read_text()) for path in (data, tmp_path / "out" / "val.json"))
    assert new["images"] == old["images"] and new["licenses"] == old["licenses"]
    ids = {4: 4, 9: 9} if class_list == "data" else {4: 2, 9: 4}
    names = {c["id"]: c["name"] for c in new["categories"]}
    if class_list == "data":
        assert list(names.items()) == [(4, NAMES[1]), (9, "triangle"), (10, NAMES[0]), (11, NAMES[2])]
    else:
        assert list(names.items()) == [(1, NAMES[0]), (2, NAMES[1]), (3, NAMES[2]), (4, "triangle")]
    assert [c.get("supercategory") for c in new["categories"]].count("shape") == 2
    by_hand = [a for a in new["annotations"] if "source" not in a]
    assert by_hand == [{**a, "category_id": ids[a["category_id"]]} for a in old["annotations"]]
    added = [a for a in new["annotations"] if "source" in a]
    assert {names[a["category_id"]] for a in added} == {NAMES[0], NAMES[2]}, "none of the annotated class"
    # At least what the detector finds; here exactly that.
    index = read_annotations(tmp_path / "out" / "val.json", images=photos)
    filled = {name: {b for b in boxes if b[0] != NAMES[1]} for name, boxes in boxes_of(index).items()}
    assert filled == expected_boxes((NAMES[0], NAMES[2]))
    assert f"data.val.annotations={tmp_path / 'out' / 'val.json'}" in done.out


def test_chosen_classes_and_thresholds(detector, photos, tmp_path):
    arguments = ("--classes", NAMES[2], "--score", 0.2, "--ignore-score", 0.2, "--device", "cpu")
    run("label", detector, photos, *arguments, "--out", tmp_path / "out")
    index = read_annotations(tmp_path / "out" / "train.json", images=photos)
    assert index.class_names == (NAMES[2],) and not index.crowd.any() and len(index.boxes) == 5


def test_a_box_on_an_annotated_object_is_doubtful(detector, photos, tmp_path):
    """By hand, the object of the first image is a triangle: the detector's class for it is not certain."""
    content = json.loads(write_data(tmp_path / "set", photos, {1: "triangle"}).read_text())
    content["annotations"] = [entry_of(1, 50, 1, (0, 0))]
    (tmp_path / "set" / "val.json").write_text(json.dumps(content))
    data = tmp_path / "set" / "val.json"
    label_images(detector, tmp_path / "out", data=data, device="cpu")
    found = boxes_of(read_annotations(tmp_path / "out" / "val.json", images=photos))
    assert (NAMES[0], True, 0.0, 0.0, 64.0, 64.0) in found["a.png"]
    assert (NAMES[0], False, 0.0, 0.0, 64.0, 64.0) in found["z.png"]


def test_other_formats_can_be_completed(detector, photos, tmp_path):
    """VOC and YOLO sets, which have no further fields to keep; to COCO and back."""
    data = write_data(tmp_path / "set", photos, {1: NAMES[1]})
    label_images(detector, tmp_path / "full", data=data, device="cpu")
    expected = boxes_of(read_annotations(tmp_path / "full" / "val.json", images=photos))
    for format in ("voc", "yolo"):
        options = ("--to", format, "--out", tmp_path / format)
        assert run("convert_data", f"train={data}", *options).code == 0
        label_images(detector, tmp_path / f"{format}_full", data=tmp_path / format, split="train", device="cpu")
        images = read_annotations(tmp_path / format, split="train").images
        index = read_annotations(tmp_path / f"{format}_full" / "train.json", images=images)
        found = {name.replace("deep_", ""): boxes for name, boxes in boxes_of(index).items()}
        assert found == expected, format


def test_an_image_that_cannot_be_read_is_left_out(detector, photos, tmp_path):
    (photos / "bad.png").write_bytes(b"no image")
    cut = (photos / "z.png").read_bytes()
    (photos / "cut.png").write_bytes(cut[: len(cut) // 2])  # its header is whole
    done = run("label", detector, photos, "--out", tmp_path / "out", "--device", "cpu", "--batch-size", 3)
    assert done.code == 1
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "bad.png" in errors[0] and "cut.png" in errors[1]
    index = read_annotations(tmp_path / "out" / "train.json", images=photos)
    assert boxes_of(index) == expected_boxes(), "without the two"


def test_a_stopped_call_resumes(detector, photos, tmp_path, monkeypatch):
    label_images(detector, tmp_path / "whole", source=photos, device="cpu")
    seen: list[int] = []
    detect = Predictor.detect

    def stop_after_two(self, prepared):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(prepared))
        return detect(self, prepared)

    monkeypatch.setattr(Predictor, "detect", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        label_images(detector, tmp_path / "out", source=photos, device="cpu", batch_size=1)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.part0").is_file()
    seen.clear()
    monkeypatch.setattr(Predictor, "detect", lambda self, prepared: seen.append(1) or detect(self, prepared))
    label_images(detector, tmp_path / "out", source=photos, device="cpu", batch_size=1, resume=True)
    assert len(seen) == 2, "two of four images were done before"
    assert (tmp_path / "out" / "train.json").read_bytes() == (tmp_path / "whole" / "train.json").read_bytes()
    assert not (tmp_path / "out.part0").exists()


def test_resume_with_another_threshold_starts_again(detector, photos, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("detection.labelling.label_images.AddedBoxes.of", stop)
        with pytest.raises(KeyboardInterrupt):
            label_images(detector, tmp_path / "out", source=photos, device="cpu")
    options = LabelOptions(ignore_score=0.05)
    label_images(detector, tmp_path / "out", source=photos, device="cpu", options=options, resume=True)
    index = read_annotations(tmp_path / "out" / "train.json", images=photos)
    assert len(index.boxes) == 18, "with the box whose score is 0.1"


def test_the_review_page(detector, photos, tmp_path):
    data = write_data(tmp_path / "set", photos, {4: NAMES[1]})
    page = tmp_path / "out" / "review.html"
    done = run("label", detector, "--data", data, "--out", tmp_path / "out", "--page", page, "--device", "cpu")
    assert done.code == 0, done
    text = page.read_text(encoding="utf-8")
    assert text.count("<img ") == 6, "three images with added boxes, in two galleries"
    # The score of 0.3 is nearer to the threshold than those of 0.8 and 1.
    doubtful = text.index("Most doubtful images</h2>")
    assert text.index("a.png: red square 0.80, blue square 0.30?", doubtful) < text.index("z.png: ", doubtful)
    assert "empty.png" not in text
    seen = assert_whole(page)
    assert seen is None or "Added labels" in seen.title


def test_a_page_of_the_user_is_not_overwritten(detector, photos, tmp_path):
    page = tmp_path / "mine.html"
    page.write_text("mine")
    arguments = ("label", detector, photos, "--out", tmp_path / "out", "--page", page, "--device", "cpu")
    run(*arguments).assert_error("mine.html: this toolkit did not write it")
    assert page.read_text() == "mine" and not (tmp_path / "out").exists()
    assert run(*arguments, "--force").code == 0 and page.read_text() != "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["PHOTOS", "--score", "0.2", "--ignore-score", "0.3"], "expected: 0 <= --ignore-score <= --score <= 1, got: "),
        (["PHOTOS", "--format", "yolo", "--transfer", "none"], "--transfer must be copy or link"),
        (["PHOTOS", "--classes", "red squares"], "unknown class 'red squares' (did you mean 'red square'?)"),
        ([], "name a folder of images, or a data set with --data"),
        (["PHOTOS/a.png"], "is not a folder; expected: a folder of images"),
        (["EMPTY"], "has no images"),
        (["PHOTOS", "--adapter", "yolox"], "does not fit its adapter"),
        (["--data", "FULL"], "has annotations of all classes that the detector would add"),
        (["PHOTOS", "--out", "EMPTY/.."], "is there already and not empty"),
    ],
)
def test_mistakes(arguments, words, detector, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    full = write_data(tmp_path / "set", photos, dict(enumerate(NAMES, 1)))
    before = sorted(tmp_path.rglob("*"))
    places = {"PHOTOS": photos, "EMPTY": tmp_path / "empty", "FULL": full}
    given = []
    for word in arguments:
        for place, path in places.items():
            word = word.replace(place, str(path))
        given.append(word)
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    run("label", detector, *given, *out, "--device", "cpu").assert_error(words)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_labels(trained, tmp_path):
    """A detector of this toolkit gives its own boxes, those of `Predictor`."""
    photos = shutil.copytree(trained.parent / "data" / "images", tmp_path / "photos")
    options = LabelOptions(score=0.3, ignore_score=0.2)
    label_images(trained / "best.pt", tmp_path / "out", source=photos, options=options, device="cpu")
    content = json.loads((tmp_path / "out" / "train.json").read_text())
    predictor = Predictor(trained / "best.pt", "cpu", score_threshold=0.2)
    assert [c["name"] for c in content["categories"]] == list(predictor.classes.names)
    assert [c["id"] for c in content["categories"]] == list(predictor.classes.ids)
    for image in content["images"]:
        found = predictor.predict(photos / image["file_name"])
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        assert len(mine) <= len(found["scores"])
        if len(found["scores"]):
            assert mine[0]["score"] == round(float(found["scores"][0]), 4), "the best one is always there"


@pytest.mark.slow
def test_two_processes_share_the_images(detector, photos, tmp_path):
    label_images(detector, tmp_path / "one", source=photos, device="cpu")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["tools/label.py", detector, photos, "--out", tmp_path / "two", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0 and done.stdout.count("15 added, 2 doubtful") == 1, done.stderr
    assert (tmp_path / "two" / "train.json").read_bytes() == (tmp_path / "one" / "train.json").read_bytes()
    assert not list(tmp_path.glob("*.part*"))
