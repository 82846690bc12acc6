"""Fixed copies pass the checks, contain the expected changes, and leave the source unchanged."""

import json
import shutil

import pytest
from faulty_datasets import FAULTS, HEIGHT, WIDTH, apply_fault, write_clean_dataset
from voc_yolo_sets import write_voc

from detection.data.formats.coco import read_coco
from detection.doctor.fix import fix_report
from detection.doctor.read_sets import read_set, read_sets
from detection.doctor.rules import RULES
from detection.doctor.run_checks import run_checks

NOT_FIXABLE = {"category-id-twice", "no-boxes"}
"""Errors that --fix cannot correct."""


@pytest.fixture(scope="session")
def master(tmp_path_factory):
    return write_clean_dataset(tmp_path_factory.mktemp("clean"))


@pytest.fixture()
def clean(master, tmp_path):
    shutil.copytree(master.parent, tmp_path / "set")
    return tmp_path / "set" / "set.json"


def fix(path, out):
    """The content of the fixed copy, its path, and the `RepairedDataset`."""
    before = path.read_bytes()
    ((copy, result),) = fix_report(run_checks([read_set(path, "data")]), out / "fixed.json")
    assert path.read_bytes() == before
    changes = json.loads((out / "fixed.changes.json").read_text())
    assert [change["what"] for change in changes["changes"]] == [change.what for change in result.changes]
    return json.loads(copy.read_text()), copy, result


@pytest.mark.parametrize("name", [n for n in FAULTS if any(RULES[c].severity == "error" for c in FAULTS[n][1])])
def test_a_fixed_copy_passes_the_checks_and_can_be_read(clean, tmp_path, name):
    _, copy, result = fix(apply_fault(clean, FAULTS[name][0]), tmp_path)
    report = run_checks([read_set(copy, "data", str(clean.parent / "images"))])
    if name in NOT_FIXABLE:
        assert report.exit_code == 1 and "still an error" in result.summary()
        return
    assert report.exit_code == 0, report.findings
    assert {found.code for found in result.remaining if found.severity == "error"} == set()
    assert result.changes
    index = read_coco(copy)
    # A fault of one image or annotation removes no others.
    assert len(index) >= 10 and len(index.boxes) >= 40


def test_a_clean_dataset_is_unchanged(clean, tmp_path):
    content, _, result = fix(clean, tmp_path)
    assert content == json.loads(clean.read_text())
    assert result.changes == [] and "no changes" in result.summary()


def boxes_of(content):
    return [annotation["bbox"] for annotation in content["annotations"]]


@pytest.mark.parametrize("name", ["box-xyxy", "box-centre", "box-fractions"])
def test_boxes_of_another_form_are_what_they_were(clean, tmp_path, name):
    original = json.loads(clean.read_text())
    content, _, _ = fix(apply_fault(clean, FAULTS[name][0]), tmp_path)
    for box, before in zip(boxes_of(content), boxes_of(original), strict=True):
        assert box == pytest.approx(before, abs=1e-9)


def test_boxes_of_mixed_formats_are_unchanged_and_still_an_error(clean, tmp_path):
    def half(content, folder):
        for annotation in content["annotations"][:36]:
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = [x, y, x + w, y + h]

    original = json.loads(apply_fault(clean, half).read_text())
    content, _, result = fix(clean, tmp_path)
    assert boxes_of(content) == boxes_of(original)
    assert "look like xyxy" in result.unfixed[0] and "still an error" in result.summary()


def test_single_annotations_are_fixed_or_removed(clean, tmp_path):
    original = json.loads(clean.read_text())

    def change(content, folder):
        own = content["annotations"]
        own[0].update(bbox=[80, 60, 30, 40])  # extends beyond the image
        own[1]["bbox"] = [5, 5, -3, 8]
        own[2].update(bbox=None, segmentation=[[10, 10, 30, 12, 25, 40]])
        own[3].update(bbox=None)
        own[4]["category_id"] = 99
        own[5]["image_id"] = 99
        own[6]["id"] = own[7]["id"]
        del own[8]["area"], own[9]["iscrowd"]
        own.append({**own[20], "id": 777})

    content, _, result = fix(apply_fault(clean, change), tmp_path)
    by_id = {annotation["id"]: annotation for annotation in content["annotations"]}
    assert by_id[1]["bbox"] == [80, 60, 16, 12] and by_id[1]["area"] == 16 * 12
    assert by_id[3]["bbox"] == [10, 10, 20, 30]
    assert not {2, 4, 5, 6, 777} & set(by_id)
    assert by_id[9]["area"] == by_id[9]["bbox"][2] * by_id[9]["bbox"][3] and by_id[10]["iscrowd"] == 0
    assert len(by_id) == len(content["annotations"]) == len(original["annotations"]) - 4
    assert {change.what for change in result.changes} >= {
        "box clipped to its image",
        "box without width or height removed",
        "box taken from the polygon",
        "annotation without a box removed",
        "annotation of a category that is not listed removed",
        "annotation of an image that is not listed removed",
        "annotation id replaced",
        "iscrowd 0 added",
        "area replaced",
        "duplicate box removed",
    }


def test_boxes_of_a_resized_image_are_scaled(clean, tmp_path):
    original = json.loads(clean.read_text())

    def change(content, folder):
        content["images"][3].update(width=4 * WIDTH, height=4 * HEIGHT)
        for annotation in content["annotations"][12:16]:
            annotation["bbox"] = [4 * value for value in annotation["bbox"]]
            annotation["area"] *= 16
            annotation["segmentation"] = [[4.0, 8.0, 12.0, 16.0, 20.0, 24.0]]

    content, _, result = fix(apply_fault(clean, change), tmp_path)
    assert content["images"] == original["images"]
    assert boxes_of(content) == boxes_of(original)
    assert content["annotations"][12]["area"] == original["annotations"][12]["area"]
    assert content["annotations"][12]["segmentation"] == [[1, 2, 3, 4, 5, 6]]
    assert [change.what for change in result.changes] == ["image size corrected and boxes scaled"]


def test_an_image_of_ambiguous_size_is_removed(clean, tmp_path):
    content, _, _ = fix(
        apply_fault(clean, lambda c, f: c["images"][3].update(width=WIDTH // 2, height=HEIGHT // 2)), tmp_path
    )
    assert [image["id"] for image in content["images"]] == [1, 2, 3, *range(5, 13)]
    assert not [a for a in content["annotations"] if a["image_id"] == 4]


def test_merged_classes_and_images_keep_their_boxes(clean, tmp_path):
    def change(content, folder):
        content["categories"].append({"id": 9, "name": "cat"})
        content["annotations"][0]["category_id"] = 9
        content["images"].append({**content["images"][3], "id": 77})
        content["annotations"][12]["image_id"] = 77

    content, _, _ = fix(apply_fault(clean, change), tmp_path)
    assert [category["id"] for category in content["categories"]] == [1, 2]
    assert content["annotations"][0]["category_id"] == 1 and content["annotations"][12]["image_id"] == 4
    assert len(content["annotations"]) == 48 and len(content["images"]) == 12


def test_identical_files_with_the_same_boxes_are_removed(clean, tmp_path):
    def same_boxes(content, folder):
        FAULTS["image-twice"][0](content, folder)
        for k in range(4):
            content["annotations"][12 + k].update({key: content["annotations"][8 + k][key] for key in ("bbox", "area")})

    content, _, result = fix(apply_fault(clean, FAULTS["image-twice"][0]), tmp_path)
    assert len(content["images"]) == 12 and "different boxes" in result.unfixed[0]
    content, _, _ = fix(apply_fault(clean, same_boxes), tmp_path)
    assert len(content["images"]) == 11 and len(content["annotations"]) == 44


def test_images_of_val_are_removed_from_train(clean, tmp_path):
    write_clean_dataset(clean.parent, seed=1, name="val")
    folder = clean.parent / "images"
    shutil.copy(folder / "set 04.jpg", folder / "val 07.jpg")
    sets = [read_set(clean, "train"), read_set(clean.parent / "val.json", "val")]
    written = fix_report(run_checks(sets), tmp_path / "m.json")
    assert [path.name for path, _ in written] == ["m.json", "m_val.json"]
    contents = [json.loads(path.read_text()) for path, _ in written]
    assert [len(content["images"]) for content in contents] == [11, 12]
    copies = [read_set(path, name, str(folder)) for (path, _), name in zip(written, ("train", "val"), strict=True)]
    assert run_checks(copies).exit_code == 0


def test_a_voc_dataset_becomes_a_coco_file(tmp_path):
    folder = write_voc(tmp_path / "voc")
    (folder / "JPEGImages" / "9.jpg").write_bytes(b"")
    text = (folder / "Annotations" / "8.xml").read_text()
    (folder / "Annotations" / "8.xml").write_text(text.replace("<xmax>25</xmax>", "<xmax>900</xmax>"))
    sets, _ = read_sets(str(folder))
    (train, _), _ = fix_report(run_checks(sets), tmp_path / "m.json")
    content = json.loads(train.read_text())
    assert {image["file_name"] for image in content["images"]} == {"10.jpg", "11.jpg", "6.jpg", "7.jpg", "8.jpg"}
    assert {category["name"] for category in content["categories"]} == {"cat", "dog"}
    copy = read_set(train, "train", str(folder / "JPEGImages"))
    report = run_checks([copy])
    assert report.exit_code == 0 and len(copy.boxes) == 20
