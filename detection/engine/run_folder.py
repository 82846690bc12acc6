"""The folder of a run (`output_dir`): which files a run writes into it, and which process trains in it."""

import contextlib
import fnmatch
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detection.config import BaseConfig
from detection.core.errors import UserError
from detection.core.files import UNFINISHED, make_folder, read_file, write_atomically
from detection.core.outputs import NOTES, is_own

try:
    import fcntl
except ImportError:  # Windows has no such locks.
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("detection")

LOCK = ".lock"
"""A file that is locked while a training runs; it holds the process id and the host name."""
LARGEST_METRICS = 1 << 30
RESULTS = ("last.pt", "best.pt", "metrics.jsonl")
"""A folder with one of these holds a run that is worth keeping."""
WRITTEN_BY_TRAINING = (
    *RESULTS,
    "previous.pt",
    "pending-*.pt",
    "backbone.pth",
    "config.yaml",
    "environment.json",
    "train.log",
    "predictions.json",
    "best_predictions.json",
    "best_predictions_*.json",
    "train_batch.jpg",
    "val_detections.jpg",
    "report.html",
    "report.json",
)
"""Patterns of the files that a training replaces, in this folder."""
WRITTEN_BY_TOOLS = (
    LOCK,
    NOTES,
    f".*{UNFINISHED}",
    "events.out.tfevents.*",
    "wandb",
    "trace.json",
    "predictions_*.json",
    "predictions*.json.part*",
    "evaluation.json",
    "compare.html",
    "compare.json",
    # tools/export.py and tools/quantize.py write beside the checkpoint.
    *(
        f"{checkpoint}{precision}.{suffix}"
        for checkpoint in ("best", "last", "previous")
        for precision in ("", ".float32", ".fp16", ".int8")
        for suffix in ("onnx", "xml", "bin", "torchscript", "pt2")
    ),
    *(f"{checkpoint}.quantized.md" for checkpoint in ("best", "last", "previous")),
)
"""Patterns of what the tools write into the folder, unless a user names another place."""
DETECTIONS = ("detections", "pictures")
"""Folders of tools/detect.py in a run's folder, as messages and the Makefile propose them; pictures: version 0.1."""
INPUTS = ("data.train", "data.val", "model.weights", "model.backbone.weights", "teacher.weights")
"""Keys of configs that name files and folders which a run reads, or sections (and lists of them) that do."""
SOURCE = ("images", "annotations")
"""Keys of such a section."""


def holds_run(folder: Path) -> bool:
    """Whether the folder holds the results of a training."""
    return any((folder / name).exists() for name in RESULTS)


def user_files(folder: Path) -> list[str]:
    """Sorted names of files and folders in `folder` that neither a training nor a tool wrote; [] without `folder`."""
    return [path.name for path in _entries(folder) if not _is_ours(path)]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, one for each evaluation; [] if the file does not exist.

    Raises:
        UserError: a line is not the record of an evaluation; the message names it.
    """
    path = folder / "metrics.jsonl"
    if not os.path.lexists(path):
        return []
    records = []
    for number, line in enumerate(read_file(path, "metrics", largest=LARGEST_METRICS).splitlines(), 1):
        wrong = "the record of an evaluation: it has no epoch"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record, wrong = None, "JSON (cut off, or edited)"
        if not isinstance(record, dict) or type(record.get("epoch")) is not int:
            raise UserError(f"{path}, line {number} is not {wrong}; correct or remove that line")
        records.append(record)
    return records


def append_metrics(folder: Path, record: Mapping[str, Any]) -> None:
    """Append the record of an evaluation to metrics.jsonl. It replaces lines of the same and of later epochs, which a
    training that was killed and resumed repeats."""
    kept = [earlier for earlier in read_metrics(folder) if earlier["epoch"] < record["epoch"]]
    text = "".join(f"{json.dumps(line)}\n" for line in (*kept, record))
    write_atomically(folder / "metrics.jsonl", lambda file: file.write(text.encode()))


def check_output_dir(config: BaseConfig, resume: bool = False) -> None:
    """Check whether a training can start in `config.output_dir`. Changes nothing; does not import torch.

    Raises:
        UserError: another process trains there; `resume` without a last.pt or with a torn metrics.jsonl; or else data,
            weights or files of the user's are in there, which the training would move away or overwrite.
    """
    # torchrun's other processes leave the folder to the first one.
    if os.environ.get("RANK", "0") != "0":
        return
    folder = Path(config.output_dir)
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.stat()
    except (OSError, ValueError) as error:
        raise UserError(f"output_dir {str(folder)!r} cannot be a folder: {error}") from None
    if (folder / LOCK).exists():
        os.close(_lock(folder))
    if resume:
        if not (folder / "last.pt").is_file():
            raise UserError(f"--resume: there is no {folder / 'last.pt'} to go on from")
        read_metrics(folder)
        return
    refuse_inputs(folder, _inputs(config))
    _refuse_shared(folder)
    _refuse_to_lose_files(folder)


def _refuse_shared(folder: Path) -> None:
    """Raise UserError if `folder` is or contains the working directory or the home folder."""
    place, here = folder.resolve(), Path.cwd()
    home = Path(os.path.expanduser("~")).resolve()
    if home.is_relative_to(place) or here.is_relative_to(place):
        raise UserError(
            f"output_dir {folder} is or contains the working directory or the home folder; give a folder for this run "
            "alone, like output_dir=runs/mine"
        )


def refuse_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Raise UserError where one of `inputs` (config key -> path; other values are ignored) is `folder` or in it."""
    for key, value in inputs.items():
        if not isinstance(value, (str, Path)) or not os.path.exists(value):
            continue
        if Path(value).resolve().is_relative_to(folder.resolve()):
            relation = "is" if Path(value).resolve() == folder.resolve() else "contains"
            raise UserError(
                f"output_dir {folder} {relation} {key} ({value}): a training needs a folder of its own, "
                "give another output_dir"
            )


def move_aside(folder: Path) -> Path | None:
    """Move a folder that holds a run to the first free name beside it; returns that, or None without a run.

    To be called by the process that holds the lock, which stays behind in the folder that was moved.

    Raises:
        UserError: there is something else in the folder, or it cannot be moved.
    """
    _refuse_to_lose_files(folder)
    if not holds_run(folder):
        return None
    # Not the name of a link: the new run is written where the link points.
    place = folder.resolve()
    number = 1
    while (aside := place.with_name(f"{place.name}.old{number}")).exists():
        number += 1
    try:
        place.rename(aside)
    except OSError as error:
        raise UserError(f"the earlier run in {folder} could not be moved to {aside}: {error.strerror}") from None
    (aside / LOCK).unlink(missing_ok=True)
    return aside


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create `folder` if necessary and hold its lock; at the end remove the created folders that are still empty.

    The lock is a POSIX one on `folder`/.lock: the system releases it when this process ends, however it does. Unlike
    a lock by `flock` it is not inherited, so that DataLoader workers that outlive a killed training for a moment do
    not keep the folder locked.

    Raises:
        UserError: another process holds it, or the folder cannot be written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder, "output_dir")
        file = _lock(folder)
        try:
            try:
                os.ftruncate(file, 0)
                os.pwrite(file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
            except OSError as error:
                raise UserError(f"{folder / LOCK} could not be written: {error.strerror}") from None
            yield
        finally:
            with contextlib.suppress(OSError):
                if _is_at(folder / LOCK, file):
                    (folder / LOCK).unlink()
            os.close(file)
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _lock(folder: Path) -> int:
    """Lock `folder`/.lock; returns its file descriptor. On a file system without locks there is a warning instead."""
    path = folder / LOCK
    attempts = 0
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{path} cannot be opened: {error.strerror}") from None
        if fcntl is None:
            return file
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            attempts += 1
            # The first attempts may meet a process that only checks (check_output_dir).
            if attempts == 5:
                raise UserError(_in_use(folder, os.pread(file, 500, 0).decode(errors="replace").split())) from None
            os.close(file)
            time.sleep(0.05)
        except OSError as error:
            log.warning("%s cannot be locked (%s): start no second training in this folder", path, error.strerror)
            return file
        else:
            # Its last holder may have removed the file meanwhile: then a lock on it is void.
            if _is_at(path, file):
                return file
            os.close(file)


def _is_at(path: Path, file: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(file))
    return False


def _in_use(folder: Path, holder: list[str]) -> str:
    who = f"process {holder[0]} on host {holder[1]}" if len(holder) == 2 else "another process"
    return f"output_dir {folder} is in use: {who} trains there; wait for it, stop it, or give another output_dir"


def _refuse_to_lose_files(folder: Path) -> None:
    if holds_run(folder):
        endangered = user_files(folder)
        what = "a run, which a new one would move away, and besides it"
        way = "Move these to another place, go on with the run by --resume, or give another output_dir"
    else:
        # A run that ended before its first checkpoint leaves these; the new run overwrites them.
        endangered = [] if (folder / "environment.json").is_file() else _would_be_overwritten(folder)
        what = "what a training would overwrite, and is of no run:"
        way = "Move it to another place, or give another output_dir"
    if endangered:
        more = f" and {len(endangered) - 3} more" if len(endangered) > 3 else ""
        raise UserError(f"output_dir {folder} holds {what} {', '.join(endangered[:3])}{more}. {way}")


def _would_be_overwritten(folder: Path) -> list[str]:
    return [path.name for path in _entries(folder) if _matches(path.name, WRITTEN_BY_TRAINING)]


def _is_ours(path: Path) -> bool:
    if path.name in DETECTIONS and path.is_dir():
        # tools/detect.py writes a JSON file beside each image and video.
        files = (file for file in path.rglob("*") if not file.is_dir() and not file.name.endswith((UNFINISHED, NOTES)))
        return all(file.suffix == ".json" or file.with_suffix(".json").is_file() for file in files)
    return _matches(path.name, (*WRITTEN_BY_TRAINING, *WRITTEN_BY_TOOLS)) or is_own(path)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be read: {error.strerror}") from None


def _inputs(config: BaseConfig) -> dict[str, Any]:
    """Values of all keys in INPUTS, of lists and sections those below."""
    found: dict[str, Any] = {}
    for key in INPUTS:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part, None)
        entries = {f"{key}.{number}": entry for number, entry in enumerate(value)} if isinstance(value, list) else {}
        for place, entry in (entries or {key: value}).items():
            found[place] = entry
            found |= {f"{place}.{name}": getattr(entry, name, None) for name in SOURCE}
    return found
