"""The commands in the code blocks of README.md and docs/, and a folder with every file that they name."""

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cell_detector import adapter_text, write_detector
from conftest import write_coco
from processes import ROOT
from small_sets import save_image

PAGES = (
    "README.md",
    "docs/configs.md",
    "docs/training.md",
    "docs/evaluation.md",
    "docs/inference.md",
    "docs/labelling.md",
    "docs/benchmarks.md",
    "docs/data.md",
    "docs/doctor.md",
    "docs/report.md",
    "docs/export.md",
    "docs/deploy.md",
    "docs/backbones.md",
    "docs/pretraining.md",
    "docs/ghostdet.md",
    "docs/ghost_modules.md",
    "docs/costs.md",
)


@dataclass(frozen=True)
class Command:
    section: str
    """Page and heading, like "docs/training.md: One GPU"."""
    line: int
    text: str
    """As printed, continuation lines joined, without the comment behind it."""


def commands(pages: Sequence[str] = PAGES) -> list[Command]:
    """All commands in indented and fenced blocks, in the order of the pages."""
    return [command for page in pages for command in _commands(page)]


def _commands(page: str) -> Iterator[Command]:
    section, fence, begun = page, None, ""
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("#") and fence is None:
            section = f"{page}: {line.strip('# ')}"
        if line.startswith("```"):
            fence = line.strip("`") if fence is None else None
            continue
        # Blocks with a language, like ```python, hold no commands.
        if not line.strip() or fence or (fence is None and not line.startswith("    ")):
            continue
        text = re.sub(r"\s+#(?!\S).*", "", line).strip()
        if begun or text.endswith("\\"):
            begun += " " + text.removesuffix("\\").strip()
            if text.endswith("\\"):
                continue
            text, begun = begun.strip(), ""
        yield Command(section, number, text)


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def make_place(home: Path, trained: Path, best_onnx: Path) -> Path:
    """Make a working folder with small versions of every file that the commands name; returns it.

    Args:
        home: the folder to make it in.
        trained: the folder of a run on `write_coco`'s classes.
    """
    from videos import write_video

    from detection.core.outputs import note_output
    from detection.data.prepare.convert import convert_data

    place = home / "checkout"
    place.mkdir(parents=True)
    shutil.copytree(ROOT / "configs", place / "configs")
    (place / "examples").symlink_to(ROOT / "examples")
    for name in ("mine", "bccd", "a", "b", "x"):
        shutil.copytree(trained, place / "runs" / name)
        shutil.copy(best_onnx, place / "runs" / name)
        # Otherwise tools/export.py refuses to overwrite it.
        note_output(place / "runs" / name / best_onnx.name)

    data = place / "data"
    for folder in (place / "mine", data / "bccd", data / "cards", data / "coco128"):
        two_sets(folder)
    # The configs for own data name it.
    (place / "data" / "mine").symlink_to("../mine")
    sets = [f"{split}={place / 'mine' / split}.json" for split in ("train", "val")]
    convert_data(sets, "voc", place / "VOC2007")
    convert_data(sets, "yolo", place / "mine" / "yolo")
    names = "path: yolo\ntrain: images/train\nval: images/val\nnames: [square, disc]\n"
    (place / "mine" / "data.yaml").write_text(names)
    text = (place / "configs" / "retina_ghost_320.yaml").read_text()
    (place / "configs" / "mine.yaml").write_text(text.replace("data/mine/", "mine/"))
    write_coco(place, images=10)
    (place / "annotations.json").rename(place / "all.json")
    text = (place / "all.json").read_text()
    for path in (place / "images").iterdir():
        number = int(path.stem.split()[-1])
        path.rename(path.with_name(f"video{number // 4}_{number}.jpg"))
        text = text.replace(f'"{path.name}"', f'"video{number // 4}_{number}.jpg"')
    (place / "all.json").write_text(text)

    for split in ("train2017", "val2017"):
        write_coco(place / "data" / "coco" / split, images=8, seed=len(split))
        (place / "data/coco/annotations").mkdir(exist_ok=True)
        (place / f"data/coco/{split}/annotations.json").rename(place / f"data/coco/annotations/instances_{split}.json")
        for path in (place / "data" / "coco" / split / "images").iterdir():
            path.rename(path.parents[1] / path.name)
    shutil.copytree(place / "data/coco/val2017", place / "coco/val2017")
    shutil.copy(place / "data/coco/annotations/instances_val2017.json", place / "coco")

    shutil.copy(trained / "best.pt", place)
    for name in ("predictions.json", "found.json"):
        shutil.copy(trained / "predictions.json", place / name)
    for name in ("val", "test"):
        shutil.copy(trained.parent / "data" / "annotations.json", place / f"{name}.json")
        shutil.copytree(trained.parent / "data" / "images", place / name)
    some = sorted((trained.parent / "data" / "images").iterdir())[:3]
    for name in ("photo.jpg", "dog.jpg", "holiday/1.jpg", "photos/1.jpg", "photos/2.jpg"):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copy(some[1], place / name)
    save_image(place / "more" / "1.png")
    save_image(place / "aerial" / "1.jpg", 700, 660)
    save_image(data / "coco128" / "images" / "000000000030.jpg", 64, 64)
    save_image(data / "bccd" / "images" / "IMAGE.jpg", 64, 64).rename(data / "bccd" / "images" / "IMAGE")
    shutil.copytree(data / "cards" / "images", data / "person" / "images")
    write_video(place / "traffic.mp4", frames=4)
    write_detector(place / "detector.onnx")
    (place / "detector.yaml").write_text(adapter_text("yolov8", names=("square", "disc", "triangle")))

    return place


def add_weights(place: Path) -> None:
    """Class folders and files of weights, for the commands that pre-train or begin with weights."""
    import torch
    from class_folders import write_folders
    from foreign.twins import PaddleGhostNet, write_pdparams

    from backbones import build_classifier

    for folder in (place / "imagenet", place / "data" / "imagenet"):
        write_folders(folder)
    torch.save(build_classifier("ghostnet", num_classes=1000, width=1.1).state_dict(), place / "ghostnet11.pth")
    write_pdparams(place / "GhostNet_x1_3_ssld_pretrained.pdparams", PaddleGhostNet(1.3).arrays())


def two_sets(folder: Path) -> None:
    """train.json and val.json, whose images are in images/."""
    for seed, (split, images) in enumerate((("train", 30), ("val", 6))):
        path = write_coco(folder / split, images=images, seed=seed)
        text = path.read_text().replace('"image ', f'"{split} ')
        (folder / f"{split}.json").write_text(text)
        (folder / "images").mkdir(exist_ok=True)
        for image in (folder / split / "images").iterdir():
            image.rename(folder / "images" / image.name.replace("image ", f"{split} "))
        shutil.rmtree(folder / split)
