"""Training data of the weights in detection/zoo: open photographs, without copies of the evaluation images."""

import argparse
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from detection.cli.arguments import ToolParser, existing_file, existing_path
from detection.cli.run_tool import run_tool
from detection.core.errors import UserError
from detection.core.files import link_or_copy, write_atomically
from detection.core.progress import progress_bar
from detection.doctor.image_probe import ImageProbe, probe_many
from detection.doctor.near_duplicates import find_near_duplicates

EXAMPLE = """\
examples:
  python tools/dev/zoo_data.py photos data/mirror data/zoo/train/photos data/zoo/val/photos --against data/*/val.json
  python tools/dev/zoo_data.py filter data/person/train.json data/zoo/train/person --against data/*/val.json
  python tools/dev/zoo_data.py check data/zoo/train/photos --against data/*/val.json
"""
REPOSITORIES = {
    "imagenette": "thunderInfy/imagenette",
    "imagewoof": "q878787/imagewoof2-320",
    "imagenet_samples": "EliSchwartz/imagenet-sample-images",
}
"""Public repositories with ImageNet photographs, which are for research."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def files_in_snapshot(git_dir: Path) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of the images of the newest commit; those that the snapshot lacks are left out."""
    git = ["git", "--git-dir", str(git_dir)]
    listing = subprocess.run([*git, "ls-tree", "-r", "-z", "HEAD"], capture_output=True, check=True).stdout
    with subprocess.Popen([*git, "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as batch:
        assert batch.stdin is not None and batch.stdout is not None
        for entry in filter(None, listing.split(b"\0")):
            head, _, path = entry.partition(b"\t")
            if not os.fsdecode(path).lower().endswith(IMAGE_SUFFIXES):
                continue
            batch.stdin.write(head.split()[2] + b"\n")
            batch.stdin.flush()
            answer = batch.stdout.readline().split()
            if answer[-1] == b"missing":
                continue
            content = batch.stdout.read(int(answer[2]))
            batch.stdout.read(1)
            yield os.fsdecode(path), content


def lay_out_photos(mirror: Path, train: Path, val: Path, against: Sequence[Path]) -> str:
    """Write TRAIN/NAME/*.jpg and VAL/NAME/*.jpg from the snapshots in `mirror`; VAL holds imagenette's own validation
    images.

    Raises:
        UserError: TRAIN or VAL exists; a snapshot is absent.
    """
    for out in (train, val):
        if out.exists():
            raise UserError(f"{out} exists; name another folder or remove it")
    snapshots = {name: mirror / repository.replace("/", "+") / "repo" for name, repository in REPOSITORIES.items()}
    absent = [REPOSITORIES[name] for name, path in snapshots.items() if not path.is_dir()]
    if absent:
        raise UserError(
            f"{mirror} has no snapshot of {', '.join(absent)}; expected is {next(iter(snapshots.values()))}"
        )
    part = train.with_name(train.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for name, git_dir in snapshots.items():
        for path, content in progress_bar(files_in_snapshot(git_dir), name, None):
            split = "val" if name == "imagenette" and path.startswith("val/") else "train"
            target = part / split / name / path.replace("/", "_")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    files = image_files(part)
    copies = find_copies(files, evaluation_files(against))
    for file in copies:
        os.remove(file)
    for split, out in (("train", train), ("val", val)):
        out.parent.mkdir(parents=True, exist_ok=True)
        (part / split).rename(out)
    part.rmdir()
    return (
        f"{train}, {val}: {len(files) - len(copies)} photographs; left out: {len(copies)} copies of evaluation images"
    )


def filter_dataset(source: Path, out: Path, against: Sequence[Path]) -> str:
    """Write OUT/images and OUT/annotations.json, a COCO data set without copies of evaluation images.

    Raises:
        UserError: OUT exists.
    """
    if out.exists():
        raise UserError(f"{out} exists; name another folder or remove it")
    content = json.loads(source.read_bytes())
    files = coco_files(source)
    copies = set(find_copies(files, evaluation_files(against)))
    (out / "images").mkdir(parents=True)
    images = []
    for image, file in zip(content["images"], files, strict=True):
        if file not in copies:
            images.append(image)
            link_or_copy(Path(file), out / "images" / image["file_name"])
    kept = {image["id"] for image in images}
    annotations = [annotation for annotation in content["annotations"] if annotation["image_id"] in kept]
    text = json.dumps({**content, "images": images, "annotations": annotations})
    write_atomically(out / "annotations.json", lambda file: file.write(text.encode()))
    return (
        f"{out}: {len(images)} images, {len(annotations)} annotations; left out: {len(copies)} copies of evaluation "
        "images"
    )


def check(sources: Sequence[Path], against: Sequence[Path]) -> str:
    """Compare training images with evaluation images. Raises UserError for copies."""
    files = [file for path in sources for file in (coco_files(path) if path.suffix == ".json" else image_files(path))]
    evaluation = evaluation_files(against)
    copies = find_copies(files, evaluation)
    if copies:
        raise UserError(
            f"{len(copies)} of {len(files)} images are copies of evaluation images: {', '.join(copies[:5])}"
        )
    return (
        f"none of {len(files)} images is a copy, by content or perceptual hash, of {len(evaluation)} evaluation images"
    )


def coco_files(annotations: Path) -> list[str]:
    folder = annotations.parent / "images"
    return [str(folder / image["file_name"]) for image in json.loads(annotations.read_bytes())["images"]]


def image_files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def evaluation_files(against: Sequence[Path]) -> list[str]:
    return sorted({os.path.realpath(file) for path in against for file in coco_files(path)})


def find_copies(files: Sequence[str], evaluation: Sequence[str]) -> list[str]:
    """Those of `files` that equal an evaluation image by content, or look the same at 17x16 pixels."""
    probes: list[ImageProbe] = []
    everything = [*evaluation, *files]
    for start in progress_bar(range(0, len(everything), 100), "compare", None):
        probes += probe_many(everything[start : start + 100], decode=True)
    unreadable = [file for file, probe in zip(everything, probes, strict=True) if not probe.thumbnail]
    thumbnails = np.zeros((len(probes), 16, 17), np.uint8)
    for i, probe in enumerate(probes):
        if probe.thumbnail:
            thumbnails[i] = np.frombuffer(probe.thumbnail, np.uint8).reshape(16, 17)
    decoded = np.array([bool(probe.thumbnail) for probe in probes])
    in_training = np.arange(len(probes)) >= len(evaluation)
    alone = np.full(len(probes), -1)
    near = find_near_duplicates(thumbnails, decoded, in_training.astype(np.int64), alone).across_sets[:, 1]
    digests = {probe.digest for probe in probes[: len(evaluation)]}
    same = [i for i in range(len(evaluation), len(probes)) if probes[i].digest in digests]
    # What cannot be compared is left out as well.
    rows = {*near.tolist(), *same, *(i for i in np.flatnonzero(~decoded & in_training).tolist())}
    if unreadable:
        print(f"{len(unreadable)} images cannot be read, {unreadable[0]} among them")
    return [everything[i] for i in sorted(rows)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser("dev/zoo_data", __doc__, EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=argparse.ArgumentParser)
    photos = commands.add_parser("photos", help="lay out the photographs of public snapshots")
    photos.add_argument("mirror", type=existing_path, help="folder with OWNER+REPOSITORY/repo, bare git repositories")
    photos.add_argument("train", type=Path)
    photos.add_argument("val", type=Path)
    filtered = commands.add_parser("filter", help="write a COCO data set without copies of evaluation images")
    filtered.add_argument("source", type=existing_file)
    filtered.add_argument("out", type=Path)
    checked = commands.add_parser("check", help="fail if training images are copies of evaluation images")
    checked.add_argument("sources", type=existing_path, nargs="+", help="folders of images, COCO files")
    for command in (photos, filtered, checked):
        command.add_argument(
            "--against", type=existing_file, nargs="+", required=True, help="COCO files of evaluations"
        )
    args = parser.parse_args(argv)
    against = [Path(path) for path in args.against]
    if args.command == "photos":
        print(lay_out_photos(Path(args.mirror), args.train, args.val, against))
    elif args.command == "filter":
        print(filter_dataset(Path(args.source), args.out, against))
    else:
        print(check([Path(path) for path in args.sources], against))


if __name__ == "__main__":
    run_tool(main)
