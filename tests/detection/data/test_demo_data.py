"""The demo data set: the same on every call, sound as COCO data, and robust against killed runs."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from detection.core.errors import UserError
from detection.data.synthetic import demo

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "make_demo_data.py"


def _load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("[!.]*")) if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return demo.make_demo_dataset(tmp_path_factory.mktemp("demo"), train_images=24, val_images=8)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, list[dict]]]:
    return [demo.draw_scene(np.random.default_rng([3, i])) for i in range(60)]


def test_layout_and_ids(made):
    assert {path.name for path in made["images"].glob("[!.]*")} == {
        *(f"train_{i:06d}.jpg" for i in range(24)),
        *(f"val_{i:06d}.jpg" for i in range(8)),
    }
    for split, count in (("train", 24), ("val", 8)):
        data = _load(made[split])
        assert [c["id"] for c in data["categories"]] == [1, 2, 4, 7, 8, 11]
        assert [c["name"] for c in data["categories"]] == list(demo.CLASSES)
        ids = [image["id"] for image in data["images"]]
        assert len(set(ids)) == count and ids[0] == 1 and ids[-1] > count  # from 1, with gaps
        assert [a["id"] for a in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))
        for image in data["images"]:
            path = cv2.imread(str(made["images"] / image["file_name"]))
            assert path is not None and path.shape == (image["height"], image["width"], 3)


def test_same_bytes_whatever_the_count(made, tmp_path):
    demo.make_demo_dataset(tmp_path / "again", train_images=24, val_images=8)
    assert _files(tmp_path / "again") == _files(made["images"].parent)
    few = demo.make_demo_dataset(tmp_path / "few", train_images=3, val_images=1)
    for image in few["images"].glob("*.jpg"):
        assert image.read_bytes() == (made["images"] / image.name).read_bytes()
    full, part = _load(made["train"]), _load(few["train"])
    assert part["images"] == full["images"][:3]
    assert part["annotations"] == full["annotations"][: len(part["annotations"])]


def test_another_seed_and_split_give_other_images(made, tmp_path):
    other = demo.make_demo_dataset(tmp_path, train_images=1, val_images=1, seed=1)
    first = (made["images"] / "train_000000.jpg").read_bytes()
    assert (other["images"] / "train_000000.jpg").read_bytes() != first
    assert (made["images"] / "val_000000.jpg").read_bytes() != first


def test_ground_truth_as_detections_is_perfect(made):
    coco_module = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    coco = coco_module.COCO(str(made["train"]))
    detections = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in coco.dataset["annotations"]
        if not a["iscrowd"]
    ]
    evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_scenes_hold_what_they_should(scenes):
    ranges: dict[str, set[str]] = {name: set() for name in ("small", "medium", "large")}
    crowds = 0
    for image, marks in scenes:
        assert image.dtype == np.uint8 and image.shape in {(240, 320, 3), (320, 240, 3), (288, 288, 3)}
        for a in marks:
            x, y, w, h = a["bbox"]
            assert x >= 0 and y >= 0 and x + w <= image.shape[1] and y + h <= image.shape[0]
            assert w >= 1 and h >= 1 and 0 < a["area"] <= w * h
            touches = x == 0 or y == 0 or x + w == image.shape[1] or y + h == image.shape[0]
            assert max(w, h) >= 13 or touches
            crowds += a["iscrowd"]
            if not a["iscrowd"]:
                size = "small" if a["area"] < 32**2 else "medium" if a["area"] <= 96**2 else "large"
                ranges[size].add(demo.CLASSES[demo.CATEGORY_IDS.index(a["category_id"])])
    assert all(found == set(demo.CLASSES) for found in ranges.values()), ranges
    assert 1 <= crowds <= 20
    assert 1 <= sum(not marks for _, marks in scenes) <= 20
    assert max(len(marks) for _, marks in scenes) >= 6
    assert len({image.shape for image, _ in scenes}) == 3


def test_boxes_fit_the_masks(monkeypatch):
    seen = []
    real = demo._annotation

    def record(label, own, visible, crowd=False):
        seen.append((own, visible, real(label, own, visible, crowd)))
        return seen[-1][2]

    monkeypatch.setattr(demo, "_annotation", record)
    for i in range(12):
        demo.draw_scene(np.random.default_rng([4, i]))
    assert len(seen) > 20
    for own, visible, annotation in seen:
        (y0, x0), (y1, x1) = np.argwhere(own).min(0), np.argwhere(own).max(0)
        assert annotation["bbox"] == [x0, y0, x1 - x0 + 1, y1 - y0 + 1]
        assert annotation["area"] == visible.sum()
        assert not (visible & ~own).any() and visible.sum() >= 0.4 * own.sum()


@pytest.mark.parametrize("label", range(6))
def test_masks_fit_the_pixels(label):
    rng = np.random.default_rng(label)
    background = 255.0 if demo.CLASSES[label] == "bat" else 0.0  # far from the object's brightness: no halo
    image = np.full((200, 200, 3), background, np.float32)
    tile = demo._draw_object(rng, label, 50.0**2, (190, 190))
    demo.paste(image, tile, 12, 9)
    changed = np.abs(image - background).max(2) > 24
    box, mask_box = demo._extent(changed), demo._extent(demo.mask_on(tile, 12, 9, image.shape))
    assert np.abs(np.subtract(box, mask_box)).max() <= 2


def test_a_complete_set_is_left_alone(made):
    root = made["images"].parent
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert demo.make_demo_dataset(root, train_images=24, val_images=8) == made
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_an_interrupted_set_is_completed(tmp_path):
    paths = demo.make_demo_dataset(tmp_path, train_images=3, val_images=2)
    whole = _files(tmp_path)
    paths["val"].unlink()  # killed before the JSON was written, within an image
    (paths["images"] / "val_000001.jpg").write_bytes(b"half")
    (paths["images"] / "train_000002.jpg").unlink()  # and an image was lost from a complete split
    demo.make_demo_dataset(tmp_path, train_images=3, val_images=2)
    assert _files(tmp_path) == whole


def test_a_killed_run_leaves_no_json(tmp_path, monkeypatch):
    demo.make_demo_dataset(tmp_path, train_images=2, val_images=1)
    real, calls = demo.draw_scene, []

    def fail_on_the_second(rng):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(rng)

    monkeypatch.setattr(demo, "draw_scene", fail_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        demo.make_demo_dataset(tmp_path, train_images=2, val_images=1, seed=5)
    assert not (tmp_path / "train.json").exists()


def test_other_parameters_replace_the_set(tmp_path):
    demo.make_demo_dataset(tmp_path, train_images=3, val_images=1)
    paths = demo.make_demo_dataset(tmp_path, train_images=2, val_images=1)
    assert sorted(p.name for p in paths["images"].glob("train_*")) == ["train_000000.jpg", "train_000001.jpg"]
    assert len(_load(paths["train"])["images"]) == 2


def test_a_foreign_json_is_kept(tmp_path):
    (tmp_path / "train.json").write_text('{"images": []}', encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.json: this toolkit did not write it"):
        demo.make_demo_dataset(tmp_path, train_images=1, val_images=1)
    assert (tmp_path / "train.json").read_text(encoding="utf-8") == '{"images": []}'
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]


def test_images_of_the_user_are_kept(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "val_000000.jpg").write_bytes(b"the user's")
    with pytest.raises(UserError, match=r"val_000000\.jpg: this toolkit did not write it"):
        demo.make_demo_dataset(tmp_path, train_images=1, val_images=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["images", "val_000000.jpg"]
    demo.make_demo_dataset(tmp_path, train_images=1, val_images=1, force=True)
    assert (tmp_path / "val.json").is_file()


def test_a_set_is_trusted_with_its_own_images_alone(tmp_path):
    """A train.json that claims to be of this generator, and names files elsewhere."""
    paths = demo.make_demo_dataset(tmp_path / "set", train_images=1, val_images=1)
    (tmp_path / "mine.jpg").write_bytes(b"the user's")
    data = _load(paths["train"])
    data["images"].append({**data["images"][0], "file_name": "../../mine.jpg"})
    paths["train"].write_text(json.dumps(data), encoding="utf-8")
    demo.make_demo_dataset(tmp_path / "set", train_images=2, val_images=1)
    assert (tmp_path / "mine.jpg").read_bytes() == b"the user's"


def test_wrong_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        demo.make_demo_dataset(tmp_path, train_images=0)
    with pytest.raises(UserError, match="seed"):
        demo.make_demo_dataset(tmp_path, seed=-1)


def _run_here(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """The tool's exit code, stdout and stderr, run in this process: torch loads slowly."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(exit_info.value.code or 0), *capsys.readouterr()


def test_tool(tmp_path, monkeypatch, capsys):
    out = tmp_path / "set"
    code, stdout, stderr = _run_here(monkeypatch, capsys, "--out", str(out), "--train", "3", "--val", "2")
    assert code == 0 and stderr == ""
    assert "train.json: 3 images" in stdout and "val.json: 2 images" in stdout
    assert stdout.splitlines()[-1].endswith(str(out)) and (out / "val.json").is_file()
    code, stdout, _ = _run_here(monkeypatch, capsys, "--help")
    assert code == 0 and "example:" in stdout
    code, stdout, stderr = _run_here(monkeypatch, capsys, "--out", str(out), "--train", "0")
    assert code == 2 and stderr.startswith("error: ")


def test_tool_names_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    command = [sys.executable, str(TOOL), "--out", str(tmp_path / "file" / "set")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # works without an installed package, too
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
