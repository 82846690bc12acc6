"""From format to format and back, and divided without leakage."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_clear_error, write_coco
from hypothesis import given, settings
from hypothesis import strategies as st

from detection import UserError
from detection.data.formats.detect_format import read_annotations
from detection.data.prepare.convert import convert_data
from detection.data.prepare.split import split_images

FORMATS = ("coco", "voc", "yolo")


def draw_image(path: Path, width: int, height: int) -> None:
    """What a PNG's header says is enough: nothing is decoded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\2\0\0\0"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big") + b"\0\0\0\0IDAT")


@st.composite
def data_sets(draw):
    """Images of any size and name with boxes within them, of 64-bit numbers."""
    names = st.text(st.sampled_from("ab é猫.-_ '&<%"), min_size=1, max_size=6).map(lambda t: f"x{t}x.png")
    files = draw(st.lists(names, min_size=1, max_size=4, unique_by=lambda name: name.lower()))
    categories = draw(st.lists(st.integers(0, 90), min_size=1, max_size=3, unique=True))
    shares = st.floats(0, 1, allow_subnormal=False)
    images, annotations = [], []
    for i, name in enumerate(files):
        width, height = draw(st.integers(2, 12_000)), draw(st.integers(2, 12_000))
        images.append({"id": 7 + i, "file_name": name, "width": width, "height": height})
        for _ in range(draw(st.integers(0, 3))):
            x, y = draw(shares) * (width - 1), draw(shares) * (height - 1)
            w, h = 0.01 + draw(shares) * (width - x - 0.01), 0.01 + draw(shares) * (height - y - 0.01)
            category = draw(st.sampled_from(categories))
            box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": int(draw(st.integers(0, 4)) == 0)}
            annotations.append({"id": len(annotations) + 1, "image_id": 7 + i, "category_id": category, **box})
    # One box at least, lest VOC, which has no list of classes, knows none.
    box = {"bbox": [0, 0, 1, 1.5], "area": 1, "iscrowd": 0}
    annotations.append({"id": 99, "image_id": 7, "category_id": categories[0], **box})
    names = [f"class & <{c}>" for c in categories]
    kinds = [{"id": c, "name": name} for c, name in zip(categories, names, strict=True)]
    return {"images": images, "annotations": annotations, "categories": kinds}


def boxes_by_name(index) -> dict[str, list]:
    """What counts: image -> its size and its boxes with class names, in order."""
    found = {}
    for i, name in enumerate(index.file_names):
        rows = range(index.offsets[i], index.offsets[i + 1])
        boxes = [(index.class_names[index.labels[r] - 1], bool(index.crowd[r]), index.boxes[r]) for r in rows]
        found[Path(str(name)).name] = (index.sizes[i].tolist(), boxes)
    return found


def assert_same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name][0] == two[name][0]
        assert [box[:2] for box in one[name][1]] == [box[:2] for box in two[name][1]]
        for (_, _, a), (_, _, b) in zip(one[name][1], two[name][1], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3, rtol=0)


@given(content=data_sets())
@settings(max_examples=15, deadline=None)
def test_round_trips_through_every_format(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("sets")
    for image in content["images"]:
        draw_image(root / "a/images" / image["file_name"], image["width"], image["height"])
    (root / "a/train.json").write_text(json.dumps(content))
    first = read_annotations(root / "a/train.json")
    source = root / "a/train.json"
    for number, to in enumerate(("voc", "coco", "voc", "yolo", "voc", "yolo", "coco")):
        report = convert_data([str(source)], to, root / str(number), transfer="link")
        source = root / str(number)
        index = read_annotations(source, split="train")
        expected = boxes_by_name(first)
        if number >= 3:  # has been through YOLO
            if number == 3:
                assert ("crowd regions are lost" in report) == bool(first.crowd.any())
            expected = {name: (size, [b for b in boxes if not b[1]]) for name, (size, boxes) in expected.items()}
        assert_same(boxes_by_name(index), expected)
        for name in index.file_names:
            assert (Path(index.images) / str(name)).is_file()


@pytest.mark.parametrize("name", ["bccd", "coco_mini"])
def test_real_sets_go_there_and_back(shared_data, tmp_path, name):
    source = shared_data / name / "val.json"
    first = boxes_by_name(read_annotations(source))
    for to in ("yolo", "voc"):
        convert_data([str(source)], to, tmp_path / to, transfer="link")
        split = "val"
        convert_data([str(tmp_path / to)], "coco", tmp_path / f"{to} back", transfer="none")
        back = boxes_by_name(read_annotations(tmp_path / f"{to} back" / f"{split}.json"))
        expected = first
        if to == "yolo":
            expected = {n: (size, [b for b in boxes if not b[1]]) for n, (size, boxes) in first.items()}
        # Real boxes reach out of their images by a rounding.
        assert back.keys() == expected.keys()
        for image, (size, boxes) in expected.items():
            assert size == back[image][0] and [b[0] for b in boxes] == [b[0] for b in back[image][1]]
            for (_, _, a), (_, _, b) in zip(boxes, back[image][1], strict=True):
                x1, y1, x2, y2 = a[0], a[1], min(a[0] + a[2], size[0]), min(a[1] + a[3], size[1])
                limit = 1e-3 if to == "voc" else 1e-3 + abs(a[0] + a[2] - x2) + abs(a[1] + a[3] - y2)
                np.testing.assert_allclose(b, [x1, y1, a[2], a[3]], atol=limit)


def test_images_are_copied_linked_or_left(coco_set, tmp_path):
    source = str(coco_set / "annotations.json")
    convert_data([source], "voc", tmp_path / "copy")
    convert_data([source], "yolo", tmp_path / "link", transfer="link")
    report = convert_data([source], "coco", tmp_path / "none", transfer="none")
    copy = tmp_path / "copy/JPEGImages/image 3.jpg"
    assert copy.is_file() and not copy.is_symlink()
    assert copy.read_bytes() == (coco_set / "images/image 3.jpg").read_bytes()
    link = tmp_path / "link/images/train/image 3.jpg"
    assert link.is_symlink() and os.path.samefile(link, coco_set / "images/image 3.jpg")
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["train.json"]
    assert f"data.train.images={coco_set / 'images'}" in report
    assert "1 crowd regions are written as difficult objects" in convert_data([source], "voc", tmp_path / "more")


def test_images_of_one_name_get_two(tmp_path):
    """a.jpg and a.png share a label file; sub/a.jpg is another one where folders are made flat."""
    content = {
        "categories": [{"id": 1, "name": "x"}],
        "images": [
            {"id": i, "file_name": name, "width": 10 + i, "height": 10}
            for i, name in enumerate(("a.jpg", "a.png", "sub/a.png", "sub_a.png", "A.jpg"))
        ],
    }
    content["annotations"] = [
        {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [0, 0, i + 1, 2]} for i in range(5)
    ]
    for image in content["images"]:
        draw_image(tmp_path / "images" / image["file_name"], image["width"], image["height"])
    (tmp_path / "train.json").write_text(json.dumps(content))
    for to in ("voc", "yolo"):
        convert_data([str(tmp_path / "train.json")], to, tmp_path / to)
        index = read_annotations(tmp_path / to, split="train")
        assert sorted(index.sizes[:, 0].tolist()) == [10, 11, 12, 13, 14]
        for i in range(5):
            assert index.boxes[index.offsets[i], 2] == pytest.approx(index.sizes[i, 0] - 9)
    with pytest.raises(UserError, match=r"VOC needs another name for a\.png \(a_2\.png\): --transfer must be"):
        convert_data([str(tmp_path / "train.json")], "voc", tmp_path / "none", transfer="none")


def test_images_in_two_parts_are_said(coco_set, tmp_path):
    path = coco_set / "annotations.json"
    report = convert_data([f"train={path}", f"val={path}"], "voc", tmp_path / "voc")
    assert "12 images are in more than one part" in report


def test_coco_to_coco_keeps_the_entries(coco_set, tmp_path):
    path = coco_set / "annotations.json"
    content = json.loads(path.read_text()) | {"licenses": [{"id": 1, "name": "free"}], "info": {"year": 2017}}
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[1.25, 2, 3, 4, annotation["id"], 6]]
    path.write_text(json.dumps(content))
    convert_data([str(path)], "coco", tmp_path / "out", share=0.75, classes=["disc"])
    new = [json.loads((tmp_path / f"out/{split}.json").read_text()) for split in ("train", "val")]
    assert new[0]["licenses"] == content["licenses"] and new[0]["categories"] == [{"id": 7, "name": "disc"}]
    assert [len(part["images"]) for part in new] == [9, 3]
    for key, wanted in (("images", lambda e: True), ("annotations", lambda e: e["category_id"] == 7)):
        together = sorted(new[0][key] + new[1][key], key=lambda entry: entry["id"])
        assert together == [entry for entry in content[key] if wanted(entry)]


def test_yolo_clips_and_leaves_out_and_says_so(coco_set, tmp_path):
    path = coco_set / "annotations.json"
    content = json.loads(path.read_text())
    for annotation, box in zip(content["annotations"], ([-5, 0, 20, 10], [200, 0, 9, 9], [1, 1, 0, 4]), strict=False):
        annotation |= {"bbox": box, "iscrowd": 0}
    path.write_text(json.dumps(content))
    report = convert_data([str(path)], "yolo", tmp_path / "y")
    assert "1 boxes are clipped to their images" in report
    assert "2 boxes without any area in their images are left out" in report


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"share": 1.0}, r"--split 1: expected is the share"),
        ({"group_by": "x"}, "it needs --split"),
        ({"share": 0.5, "group_by": "("}, "is not a regular expression"),
        ({"share": 0.5, "group_by": "nowhere"}, "matches no file name; they are like image 0.jpg"),
        ({"share": 0.5, "group_by": "image"}, r"has 1 image\(s\) or group\(s\) of images"),
        ({"classes": ["dics"]}, "did you mean 'disc'"),
        ({"to": "yolo", "transfer": "none"}, "--transfer must be copy or link"),
        ({"sources": ["train={0}", "train={0}"]}, "are both 'train'"),
        ({"sources": ["train={0}", "val={0}"], "share": 0.5}, "--split divides one part, and there are train, val"),
    ],
)
def test_what_cannot_be_done_is_said(coco_set, tmp_path, more, message):
    path = str(coco_set / "annotations.json")
    arguments = {"sources": ["{0}"], "to": "coco", **more}
    sources = [source.format(path) for source in arguments.pop("sources")]
    with pytest.raises(UserError, match=message):
        convert_data(sources, arguments.pop("to"), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


# ---- the split


def random_set(tmp_path: Path, images: int = 400, seed: int = 0) -> Path:
    """Classes from common to very rare, some images without boxes; 1x1 images that are all different."""
    rng = np.random.default_rng(seed)
    names = ["common", "often", "some", "rare", "pair", "single"]
    holders = [0.7, 0.3, 0.1, 0.02]
    (tmp_path / "images").mkdir(parents=True)
    content = {"categories": [{"id": i, "name": n} for i, n in enumerate(names)], "images": [], "annotations": []}
    for i in range(images):
        name = f"video{i // 10:02d}_frame{i % 10}.jpg"
        (tmp_path / "images" / name).write_bytes(f"image {i} of {seed}".encode())
        content["images"].append({"id": i, "file_name": name, "width": 100, "height": 100})
        own = [k for k, share in enumerate(holders) if rng.random() < share]
        own += [4] * (i in (7, 290)) + [5] * (i == 100)
        for k in own * int(rng.integers(1, 4)):
            content["annotations"].append(
                {"id": len(content["annotations"]), "image_id": i, "category_id": k, "bbox": [1, 1, 5, 5]}
            )
    (tmp_path / "all.json").write_text(json.dumps(content))
    return tmp_path / "all.json"


def held(index, chosen: np.ndarray) -> np.ndarray:
    """Chosen images with each class."""
    part = index.part(np.flatnonzero(chosen))
    owners = np.repeat(np.arange(len(part)), np.diff(part.offsets))
    return np.array([len(set(owners[part.labels == k].tolist())) for k in range(1, len(index.class_names) + 1)])


@pytest.mark.parametrize("share", [0.5, 0.8, 0.9])
def test_every_class_is_divided_in_the_share(tmp_path, share):
    index = read_annotations(random_set(tmp_path))
    train, _ = split_images(index, share)
    assert abs(train.mean() - share) < 0.01
    total, own = held(index, np.ones(len(index), bool)), held(index, train)
    assert np.abs(own - share * total).max() <= 2
    # Of two images each side has one; the only one is learned from.
    assert own[4] == 1 and own[5] == 1
    empty = np.diff(index.offsets) == 0
    assert abs(train[empty].mean() - share) < 0.05


def test_the_split_depends_on_names_and_seed_alone(tmp_path):
    path = random_set(tmp_path)
    index = read_annotations(path)
    train, _ = split_images(index, 0.8)
    content = json.loads(path.read_text())
    content["images"].reverse()
    content["annotations"].reverse()
    path.write_text(json.dumps(content))
    again = read_annotations(path)
    assert set(again.file_names[split_images(again, 0.8)[0]]) == set(index.file_names[train])
    assert set(index.file_names[split_images(index, 0.8, seed=1)[0]]) != set(index.file_names[train])


def test_groups_stay_together(tmp_path):
    index = read_annotations(random_set(tmp_path))
    train, notes = split_images(index, 0.8, group_by=r"^(video\d+)_")
    videos = np.array([str(name)[:7] for name in index.file_names])
    assert all(len(set(train[videos == video].tolist())) == 1 for video in set(videos))
    assert abs(train.mean() - 0.8) < 0.06 and "400 images are in 40 groups by name" in notes


def test_like_images_are_on_one_side(tmp_path):
    path = random_set(tmp_path, images=60)
    names = sorted(file.name for file in (tmp_path / "images").iterdir())
    for a, b in zip(names[:20], names[40:], strict=True):
        (tmp_path / "images" / b).write_bytes((tmp_path / "images" / a).read_bytes())
    index = read_annotations(path)
    for seed in range(5):
        train, notes = split_images(index, 0.5, seed=seed)
        side = dict(zip(index.file_names.tolist(), train.tolist(), strict=True))
        assert all(side[a] == side[b] for a, b in zip(names[:20], names[40:], strict=True))
        assert "40 images that are there more than once stay together" in notes[0]


def test_a_share_leaves_each_side_something(tmp_path):
    for images in (2, 3, 5):
        index = read_annotations(random_set(tmp_path / str(images), images=images))
        for share in (0.01, 0.5, 0.99):
            train, _ = split_images(index, share)
            assert 0 < train.sum() < images


# ---- the tool


def test_the_tool(tool, tmp_path):
    write_coco(tmp_path / "träin 1", images=20)
    source = tmp_path / "träin 1/annotations.json"
    done = tool("convert_data", source, "--to", "yolo", "--out", tmp_path / "út", "--split", 0.8, "--transfer", "link")
    assert done.returncode == 0, done.stderr
    assert (
        "train: 16 images" in done.stdout and "val: 4 images" in done.stdout and "crowd regions are lost" in done.stdout
    )
    assert [len(read_annotations(tmp_path / "út", split=split)) for split in ("train", "val")] == [16, 4]
    assert_clear_error(
        tool("convert_data", source, "--to", "voc", "--out", tmp_path / "út"), "is there already and not empty"
    )
    assert_clear_error(
        tool("convert_data", tmp_path / "no.json", "--to", "voc", "--out", tmp_path / "x"), "does not exist"
    )
    done = tool("make_coco_like", "--out", tmp_path / "like.json", "--images", 30, "--boxes", 100)
    assert done.returncode == 0 and "30 images, 100 boxes" in done.stdout
    assert_clear_error(tool("dev/annotation_speed", tmp_path / "like.json"), "has less than 16 MB")
