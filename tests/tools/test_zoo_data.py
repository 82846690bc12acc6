"""tools/dev/zoo_data.py: training images without copies of evaluation images."""

import importlib.util
import json
import subprocess

import cv2
import numpy as np
import pytest
from conftest import ROOT, run_seed

from detection import UserError

SPEC = importlib.util.spec_from_file_location("zoo_data", ROOT / "tools" / "dev" / "zoo_data.py")
zoo_data = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(zoo_data)


def scene(number):
    """A smooth image, as photographs are, that no other number gives."""
    rng = np.random.default_rng(run_seed(number))
    return cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (160, 120), interpolation=cv2.INTER_CUBIC)


def write_set(folder, numbers):
    """A COCO set with a box in each scene."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i, number in enumerate(numbers):
        cv2.imwrite(str(folder / "images" / f"{i}.jpg"), scene(number))
        images.append({"id": i, "file_name": f"{i}.jpg", "width": 160, "height": 120})
        annotations.append(
            {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
        )
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "val.json").write_text(json.dumps(content))
    return folder / "val.json"


@pytest.fixture()
def evaluation(tmp_path):
    return write_set(tmp_path / "evaluation", [1, 2, 3])


def resaved(number):
    """The bytes of a smaller, brighter copy of a scene."""
    small = cv2.resize(scene(number), (120, 90), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", cv2.convertScaleAbs(small, beta=4), [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


def test_filter_leaves_out_copies(tmp_path, evaluation, capsys):
    source = write_set(tmp_path / "source", [2, 11, 12, 13])
    (tmp_path / "source" / "images" / "1.jpg").write_bytes(resaved(3))
    zoo_data.main(["filter", str(source), str(tmp_path / "out"), "--against", str(evaluation)])
    content = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["2.jpg", "3.jpg"]
    assert [annotation["image_id"] for annotation in content["annotations"]] == [2, 3]
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == ["2.jpg", "3.jpg"]
    assert "left out: 2 copies" in capsys.readouterr().out
    with pytest.raises(UserError, match="out exists"):
        zoo_data.main(["filter", str(source), str(tmp_path / "out"), "--against", str(evaluation)])


def test_check_fails_over_a_copy(tmp_path, evaluation, capsys):
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos" / "a.jpg"), scene(21))
    command = ["check", str(tmp_path / "photos"), "--against", str(evaluation)]
    zoo_data.main(command)
    assert "none of 1 images is a copy" in capsys.readouterr().out
    (tmp_path / "photos" / "b.jpg").write_bytes(resaved(1))
    with pytest.raises(UserError, match=r"1 of 2 images are copies of evaluation images: .*b\.jpg"):
        zoo_data.main(command)


def test_photos_of_snapshots(tmp_path, evaluation):
    number = 30
    for name, repository in zoo_data.REPOSITORIES.items():
        folder = tmp_path / "mirror" / repository.replace("/", "+") / "repo"
        work = tmp_path / "work" / name
        for place in ("train/dog/a.JPEG", "val/dog/b.JPEG", "README.md"):
            (work / place).parent.mkdir(parents=True, exist_ok=True)
            number += 1
            (work / place).write_bytes(cv2.imencode(".jpg", scene(number))[1].tobytes())
        if name == "imagewoof":
            (work / "train/dog/copy.JPEG").write_bytes(resaved(2))
        git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(work)]
        for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
            subprocess.run([*git, *arguments], check=True)
        folder.parent.mkdir(parents=True)
        (work / ".git").rename(folder)
    command = ["photos", str(tmp_path / "mirror"), str(tmp_path / "train"), str(tmp_path / "val")]
    zoo_data.main([*command, "--against", str(evaluation)])
    found = {
        str(path.relative_to(tmp_path)) for split in ("train", "val") for path in (tmp_path / split).rglob("*.JPEG")
    }
    assert found == {
        "train/imagenet_samples/train_dog_a.JPEG",
        "train/imagenet_samples/val_dog_b.JPEG",
        "train/imagenette/train_dog_a.JPEG",
        "train/imagewoof/train_dog_a.JPEG",
        "train/imagewoof/val_dog_b.JPEG",
        "val/imagenette/val_dog_b.JPEG",
    }
    assert not (tmp_path / "train.part").exists()
    with pytest.raises(UserError, match=r"no snapshot of thunderInfy/imagenette"):
        zoo_data.main(["photos", str(tmp_path), str(tmp_path / "t"), str(tmp_path / "v"), "--against", str(evaluation)])
