"""Search for inputs that end in a traceback, in a hang, or in too much memory.

    python tests/hostile/fuzz.py --minutes 20 --seed 0                (all targets by turns)
    python tests/hostile/fuzz.py --minutes 2 --only coco --keep found

Valid files are changed at random (tests/hostile/mutate.py) and given to the tools, in a process for each target. An
example may take 20 s and 4 GB. What fails is kept in the folder of --keep with its commands, and the exit status is 1.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("hostile", "helpers", "")] + [str(ROOT)]

import yaml  # noqa: E402
from mutate import VALUES, mutate, mutate_bytes  # noqa: E402
from run_tool import Outcome, run  # noqa: E402

SECONDS, BYTES = 20, 4 << 30
Command = tuple[str, list[str]]


class TooSlow(BaseException):
    """No Exception, so that no tool takes it for its own."""


def dumped(document: Any, path: Path, form: str = "json") -> Path:
    text = json.dumps(document, default=str) if form == "json" else yaml.safe_dump(document, allow_unicode=True)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


def fuzz_config(rnd: random.Random, base: Path, folder: Path) -> list[Command]:
    """A config with changed values, or overrides with odd ones."""
    raw = yaml.safe_load((base / "config.yaml").read_text())
    overrides = []
    if rnd.random() < 0.3:
        path = dumped(raw, folder / "config.yaml", "yaml")
        keys = [".".join(key) for key in _dotted(raw)]
        values = [str(value) for value in VALUES if "\0" not in str(value) and "\ud800" not in str(value)]
        overrides = [f"{rnd.choice(keys)}={rnd.choice(values)}" for _ in range(rnd.randint(1, 3))]
    elif rnd.random() < 0.3:
        path = folder / "config.yaml"
        path.write_bytes(mutate_bytes((base / "config.yaml").read_bytes(), rnd))
    else:
        path = dumped(mutate(raw, rnd), folder / "config.yaml", "yaml")
    tool = rnd.choice([("train", ["--dry-run"]), ("check_data", ["--no-images", "--workers", "1"])])
    return [(tool[0], [str(path), *overrides, *tool[1]])]


def _dotted(raw: dict, prefix: tuple = ()) -> list[tuple[str, ...]]:
    keys: list[tuple[str, ...]] = []
    for key, value in raw.items():
        keys += [(*prefix, key), *(_dotted(value, (*prefix, key)) if isinstance(value, dict) else [])]
    return keys


def _read_by_all(annotations: Path, images: Path, base: Path, folder: Path, rnd: random.Random) -> list[Command]:
    """What reads annotations: the doctor, the converter, a training."""
    kind = rnd.choice(["coco", "voc", "yolo"])
    sources = [f"data.{split}.{key}={value}" for split in ("train", "val") for key, value in (
        ("annotations", annotations), ("images", images), ("format", "auto"))]  # fmt: skip
    return rnd.choice(
        [
            [("check_data", [str(annotations), "--images", str(images), "--workers", "1"])],
            [("check_data", [str(annotations), "--fix", str(folder / "mended.json"), "--workers", "1"])],
            [("convert_data", [str(annotations), "--to", kind, "--out", str(folder / "converted")])],
            [("train", [str(base / "config.yaml"), *sources, "--dry-run"])],
        ]
    )


def fuzz_coco(rnd: random.Random, base: Path, folder: Path) -> list[Command]:
    content = json.loads((base / "set" / "annotations.json").read_text())
    path = folder / "annotations.json"
    if rnd.random() < 0.25:
        path.write_bytes(mutate_bytes(json.dumps(content).encode(), rnd))
    else:
        dumped(mutate(content, rnd), path)
    return _read_by_all(path, base / "set" / "images", base, folder, rnd)


def fuzz_voc(rnd: random.Random, base: Path, folder: Path) -> list[Command]:
    root = folder / "voc"
    shutil.copytree(base / "voc", root)
    files = sorted(p for p in root.rglob("*") if p.suffix in (".xml", ".txt"))
    for path in rnd.sample(files, 2):
        text = path.read_text()
        if path.suffix == ".xml" and rnd.random() < 0.7:
            # The text of one element, or a whole element.
            start = rnd.choice([i for i, c in enumerate(text) if c == ">"]) + 1
            end = text.find("<", start) if rnd.random() < 0.7 else text.find(">", start) + 1
            value = str(rnd.choice(VALUES)).encode("utf-8", "replace").decode()
            path.write_text(text[:start] + value + text[max(end, start) :])
        else:
            path.write_bytes(mutate_bytes(text.encode(), rnd))
    return _read_by_all(root, root / "JPEGImages", base, folder, rnd)


def fuzz_yolo(rnd: random.Random, base: Path, folder: Path) -> list[Command]:
    root = folder / "yolo"
    shutil.copytree(base / "yolo", root)
    if rnd.random() < 0.5:
        content = yaml.safe_load((root / "data.yaml").read_text())
        dumped(mutate(content, rnd), root / "data.yaml", "yaml")
    for path in rnd.sample(sorted(root.rglob("*.txt")), 2):
        words = path.read_text().split(" ")
        if rnd.random() < 0.6:
            words[rnd.randrange(len(words))] = str(rnd.choice(VALUES)).encode("utf-8", "replace").decode()
            path.write_text(" ".join(words))
        else:
            path.write_bytes(mutate_bytes(path.read_bytes(), rnd))
    return _read_by_all(root / "data.yaml", root / "images", base, folder, rnd)


def fuzz_predictions(rnd: random.Random, base: Path, folder: Path) -> list[Command]:
    content = json.loads((base / "predictions.json").read_text())
    path = folder / "predictions.json"
    if rnd.random() < 0.25:
        path.write_bytes(mutate_bytes(json.dumps(content).encode(), rnd))
    else:
        dumped(mutate(content, rnd), path)
    data = str(base / "set" / "annotations.json")
    if rnd.random() < 0.7:
        return [("evaluate", ["--predictions", str(path), "--data", data])]
    return [("report", ["--predictions", str(path), "--data", data, "--out", str(folder / "page.html")])]


def fuzz_checkpoint(rnd: random.Random, base: Path, folder: Path) -> list[Command]:
    """Changed contents of best.pt (detected with, evaluated, exported) or last.pt (resumed)."""
    import torch

    name = rnd.choice(["best.pt", "last.pt"])
    path = folder / "run" / name
    path.parent.mkdir()
    if rnd.random() < 0.2:
        path.write_bytes(mutate_bytes((base / "run" / name).read_bytes(), rnd))
    else:
        content = torch.load(base / "run" / name, weights_only=True)
        weight = next(value for value in content["model"].values() if value.dim() == 4)
        odd = (torch.zeros(0), torch.full_like(weight, float("nan")), torch.zeros(3, dtype=torch.int8), weight[:1])
        torch.save(mutate(content, rnd, (*VALUES, *odd)), path)
    image = str(base / "set" / "images" / "image 1.jpg")
    if name == "last.pt":
        return [("train", [str(base / "config.yaml"), f"output_dir={folder / 'run'}", "train.epochs=1", "--resume"])]
    return rnd.choice(
        [
            [("detect", [str(path), image, "--out", str(folder / "found")])],
            [("evaluate", [str(path)])],
            [("report", [str(path), "--no-latency", "--out", str(folder / "page.html")])],
        ]
    )


def fuzz_metadata(rnd: random.Random, base: Path, folder: Path) -> list[Command]:
    """What an ONNX file says about itself."""
    import onnx

    model = onnx.load(base / "run" / "best.onnx")
    for entry in model.metadata_props:
        if entry.value.startswith("{"):
            if rnd.random() < 0.2:
                entry.value = mutate_bytes(entry.value.encode(), rnd).decode("utf-8", "replace")
            else:
                text = json.dumps(mutate(json.loads(entry.value), rnd), default=str)
                entry.value = text.encode("utf-8", "replace").decode()
    path = folder / "best.onnx"
    onnx.save(model, path)
    image = str(base / "set" / "images" / "image 1.jpg")
    if rnd.random() < 0.3:
        return [("evaluate", [str(path)])]
    return [("detect", [str(path), image, "--out", str(folder / "found"), "--threshold", rnd.choice(["0", "0.3"])])]


def fuzz_images(rnd: random.Random, base: Path, folder: Path) -> list[Command]:
    images = folder / "images"
    shutil.copytree(base / "kinds", images)
    for path in sorted(images.iterdir()):
        if rnd.random() < 0.7:
            path.write_bytes(mutate_bytes(path.read_bytes(), rnd))
    return [("detect", [str(base / "run" / "best.pt"), str(images), "--out", str(folder / "found")])]


TARGETS: dict[str, Callable[[random.Random, Path, Path], list[Command]]] = {
    "config": fuzz_config,
    "coco": fuzz_coco,
    "voc": fuzz_voc,
    "yolo": fuzz_yolo,
    "predictions": fuzz_predictions,
    "checkpoint": fuzz_checkpoint,
    "metadata": fuzz_metadata,
    "images": fuzz_images,
}


def make_base(folder: Path) -> Path:
    """The valid files that are changed: a tiny set in three formats, a config, a trained run, an ONNX file."""
    import cv2
    import numpy as np
    from conftest import tiny_raw, write_coco

    annotations = write_coco(folder / "set", images=6)
    raw = tiny_raw(folder / "set", folder / "run")
    raw["train"] |= {"epochs": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    for kind in ("voc", "yolo"):
        _succeed(run("convert_data", annotations, "--to", kind, "--out", folder / kind))
    _succeed(run("train", folder / "config.yaml"))
    shutil.copy(folder / "run" / "predictions.json", folder)
    _succeed(run("export", folder / "run" / "best.pt", "--format", "onnx"))
    (folder / "kinds").mkdir()
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    for suffix in (".jpg", ".png", ".bmp", ".webp", ".tif", ".jp2", ".ppm"):
        cv2.imwrite(str(folder / "kinds" / f"image{suffix}"), image)
    return folder


def _succeed(outcome: Outcome) -> None:
    assert outcome.code == 0, outcome.err


def try_example(target: str, rnd: random.Random, base: Path, folder: Path) -> str | None:
    """Make one example in `folder` and run its commands; what went wrong, None if all is well."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    commands = TARGETS[target](rnd, base, folder)
    (folder / "commands.txt").write_text(repr(commands), encoding="utf-8", errors="backslashreplace")

    def too_slow(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, too_slow)
    _reset_peak()
    try:
        for tool, arguments in commands:
            # Again each second: an exception that a callback of the garbage collector raises is lost.
            signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
            outcome = run(tool, *arguments)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if outcome.code not in (0, 1, 2):
                return f"exit status {outcome.code}: {outcome.err[-1000:]}"
            if outcome.code == 2 and "error: " not in outcome.err:
                return f"exit status 2 without an error: {outcome.err[-1000:]}"
        if (peak := _peak()) > BYTES:
            return f"{peak / 2**30:.1f} GB of memory"
    except TooSlow:
        return f"longer than {SECONDS} s:\n{traceback.format_exc()[-3000:]}"
    except BaseException:
        return f"traceback:\n{traceback.format_exc()[-3000:]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return None


def warm_up(base: Path, folder: Path) -> None:
    """Import everything that the tools import when they need it: that is no example's time."""
    image, data = base / "set" / "images" / "image 1.jpg", base / "set" / "annotations.json"
    _succeed(run("train", base / "config.yaml", "--dry-run"))
    for name in ("best.pt", "best.onnx"):
        _succeed(run("detect", base / "run" / name, image, "--out", folder / "found"))
    _succeed(run("report", "--predictions", base / "predictions.json", "--data", data, "--out", folder / "page.html"))


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The most memory that this process has held since `_reset_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def search(target: str, base: Path, keep: Path, seconds: float, seed: int, results: Any) -> None:
    """Examples of one target until the time is over; in a process of its own."""
    import hypothesis
    from hypothesis import HealthCheck, Phase, settings
    from hypothesis import strategies as st

    warm_up(base, keep / "warm")
    deadline, block, count, failed = time.monotonic() + seconds, 0, 0, 0

    def one(rnd: random.Random) -> None:
        nonlocal count, failed
        if time.monotonic() > deadline:
            return
        folder = keep / f"{target}-current"
        results.put((target, "started", time.monotonic()))
        wrong = try_example(target, rnd, base, folder)
        count += 1
        if wrong is not None:
            failed += 1
            (folder / "wrong.txt").write_text(wrong, encoding="utf-8", errors="backslashreplace")
            folder.rename(keep / f"{target}-{failed}")
            results.put((target, "failed", wrong))

    options = settings(
        max_examples=25,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    while time.monotonic() < deadline:
        search_on = hypothesis.given(st.randoms(use_true_random=True))(one)
        hypothesis.seed(seed * 1_000_003 + block)(options(search_on))()
        block += 1
    results.put((target, "done", count))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="for all targets together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS), help="targets (default: all)")
    parser.add_argument("--keep", type=Path, help="new folder for what fails (default: a temporary one)")
    args = parser.parse_args()
    keep = args.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    keep.mkdir(parents=True, exist_ok=True)
    # Of the processes that search, too: they are started after this.
    os.environ["XDG_CACHE_HOME"] = str(keep.resolve() / "cache")
    base = make_base(keep.resolve() / "base")
    context = multiprocessing.get_context("spawn")
    faults = 0
    for target in args.only:
        results = context.Queue()
        seconds = 60 * args.minutes / len(args.only)
        arguments = (target, base, keep.resolve(), seconds, args.seed, results)
        process = context.Process(target=search, args=arguments)
        process.start()
        faults += _watch(process, results, target)
    print(f"{faults} faults; seed {args.seed}, {args.minutes:g} minutes" + (f"; see {keep}" if faults else ""))
    return 1 if faults else 0


def _watch(process: Any, results: Any, target: str) -> int:
    """Until the process is done; one that hangs where no signal reaches it, or dies, is a fault, too."""
    import queue

    faults = 0
    while True:
        try:
            _, kind, content = results.get(timeout=5 * SECONDS if process.is_alive() else 1)
        except queue.Empty:
            print(
                f"{target}: the process {'hangs' if process.is_alive() else f'died ({process.exitcode})'}", flush=True
            )
            process.kill()
            return faults + 1
        if kind == "failed":
            faults += 1
            print(f"{target}: {content}\n", flush=True)
        elif kind == "done":
            print(f"{target}: {content} examples, {faults} faults", flush=True)
            process.join()
            return faults


if __name__ == "__main__":
    sys.exit(main())
