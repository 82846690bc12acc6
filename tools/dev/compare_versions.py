"""Check that two versions of this repository compute the same: train, resume, evaluate, export and detect with both.

Each version is checked out into a worktree of its own. Both draw the same small data set and train RetinaNet, Faster
R-CNN and GhostDet from seed 0 on one CPU thread: in one go, and killed after the first epoch and resumed. GhostDet is
also trained with its evaluations in the background, and RetinaNet by two processes that accumulate gradients. Then both
evaluate, export to ONNX and detect. Weights, metrics.jsonl, predictions, boxes and scores are compared bit for bit.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

ROOT = Path(__file__).resolve().parents[2]
COMMON = [
    "seed=0", "device=cpu", "data.batch_size=4", "data.workers=1", "train.epochs=3", "train.report=false",
    "model.backbone.width=0.5", "data.train.annotations=data/train.json", "data.val.annotations=data/val.json",
    "data.short_side=96", "data.long_side=128", "train.eval_every=1", "optim.warmup_steps=2",
    "eval.score_threshold=0.001",
]  # fmt: skip
RUNS = {
    "retinanet": ("retina_ghost_320", []),
    "faster_rcnn": ("faster_rcnn_ghost", ["optim.lr=0.0005"]),
    "ghostdet": ("ghostdet_nano", ["data.progressive=[]", "data.augment.mosaic=0.5"]),
    "ghostdet_background": ("ghostdet_nano", ["data.progressive=[]", "eval.background=true", "train.patience=2"]),
    "retinanet_two_processes": ("retina_ghost_320", ["train.accumulate=2", "data.workers=0", "data.batch_size=2"]),
}
KILLED = ("retinanet", "faster_rcnn", "ghostdet", "ghostdet_background")
TIMES = ("seconds", "images_per_second", "memory")
"""Keys of metrics.jsonl that differ from run to run."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/dev/compare_versions.py 0cd7bc4 HEAD",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", help="commit, branch or tag")
    parser.add_argument("after", nargs="?", default="HEAD", help="the version to compare it with (default: HEAD)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="only these (default: all)")
    parser.add_argument("--keep", metavar="DIR", help="leave what was written in this new folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary).resolve()
        results = [
            produce(revision, folder / f"version{i}", args.runs) for i, revision in enumerate((args.before, args.after))
        ]
    differences = [
        key for key in sorted(results[0].keys() | results[1].keys()) if not same(*(r.get(key) for r in results))
    ]
    for key in sorted(results[0]):
        print(f"{'DIFFERENT' if key in differences else 'same':10} {key}")
    print(f"{len(results[0])} results compared, {len(differences)} differ")
    return 1 if differences else 0


def produce(revision: str, folder: Path, runs: list[str]) -> dict[str, object]:
    """All results of one version, by name."""
    folder.mkdir(parents=True)
    code, work = folder / "code", folder / "work"
    work.mkdir()
    subprocess.run(
        ["git", "worktree", "add", "-q", "--detach", "-f", str(code), revision],
        cwd=ROOT,
        check=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        tool = Tool(code, work)
        tool("make_demo_data", "--out", "data", "--train", "16", "--val", "6")
        results: dict[str, object] = {}
        for name in runs:
            config, overrides = RUNS[name]
            started = time.monotonic()
            arguments = [f"{code}/configs/{config}.yaml", *COMMON, *overrides]
            processes = 2 if "two_processes" in name else 1
            tool("train", *arguments, f"output_dir=runs/{name}", processes=processes)
            results |= run_results(work / "runs" / name, name)
            if name in KILLED:
                tool.kill_after_first_epoch(*arguments, f"output_dir=runs/{name}_killed")
                tool("train", *arguments, f"output_dir=runs/{name}_killed", "--resume")
                killed = run_results(work / "runs" / f"{name}_killed", name)
                bad = [key for key, value in killed.items() if not same(value, results[key])]
                results[f"{name}: killed and resumed differs in"] = bad
                if bad:
                    print(f"{revision}: {name}, killed and resumed, differs in {bad}", file=sys.stderr)
            results |= use_results(tool, work / "runs" / name, name)
            print(f"{revision}: {name} took {time.monotonic() - started:.0f} s", file=sys.stderr)
        return results
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(code)], cwd=ROOT, check=True)


class Tool:
    """Runs the tools of one version in a working folder."""

    def __init__(self, code: Path, work: Path) -> None:
        self.code, self.work = code, work
        self.environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}

    def __call__(self, name: str, *arguments: object, processes: int = 1) -> None:
        done = subprocess.run(
            self._command(name, arguments, processes),
            cwd=self.work,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{' '.join(done.args)} in {self.work} ended with {done.returncode}:\n{done.stderr[-3000:]}")

    def kill_after_first_epoch(self, *arguments: object) -> None:
        folder = self.work / str(arguments[-1]).partition("=")[2]
        process = subprocess.Popen(
            self._command("train", arguments, 1), cwd=self.work, env=self.environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and not (folder / "last.pt").exists():
            time.sleep(0.01)
        if process.poll() is not None:
            sys.exit(f"the training in {folder} ended before it could be killed")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _command(self, name: str, arguments: tuple[object, ...], processes: int) -> list[str]:
        script = [str(self.code / "tools" / f"{name}.py"), *map(str, arguments)]
        if processes == 1:
            return [sys.executable, *script]
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *script]


def run_results(run: Path, name: str) -> dict[str, object]:
    """What a training left: weights, metrics and detections."""
    results: dict[str, object] = {}
    for file in ("best.pt", "last.pt"):
        content = torch.load(run / file, weights_only=True)
        for part in ("model", "ema", "optimizer", "rng"):
            if part in content:
                results[f"{name}: {part} in {file}"] = content[part]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    results[f"{name}: metrics.jsonl"] = [
        {k: v for k, v in line.items() if not any(t in k for t in TIMES)} for line in lines
    ]
    for file in ("predictions.json", "best_predictions.json"):
        results[f"{name}: {file}"] = json.loads((run / file).read_text())
    return results


def use_results(tool: Tool, run: Path, name: str) -> dict[str, object]:
    """What evaluation, export and detection with that run's checkpoint give."""
    results: dict[str, object] = {}
    tool("evaluate", run / "best.pt", "--json", run / "evaluation.json")
    evaluation = json.loads((run / "evaluation.json").read_text())
    results[f"{name}: AP of tools/evaluate.py"] = [
        evaluation[key] for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")
    ]
    tool("export", run / "best.pt", "--format", "onnx", "--out", run / "model.onnx")
    session = onnxruntime.InferenceSession(run / "model.onnx", providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (1, 96, 128, 3), np.uint8)
    outputs = session.run(None, {"images": images, "sizes": np.array([[96, 128]], np.int64)})
    results[f"{name}: outputs of the ONNX file"] = [torch.from_numpy(array) for array in outputs]
    for file in ("best.pt", "model.onnx"):
        out = run / f"found_{file}"
        tool(
            "detect",
            run / file,
            *sorted((tool.work / "data/images").glob("val_*.jpg")),
            "--out",
            out,
            "--threshold",
            "0.01",
            "--device",
            "cpu",
        )
        found = {path.name: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
        results[f"{name}: detections with {file}"] = json.loads(json.dumps(found).replace(str(tool.work), ""))
    return results


def same(one: object, other: object) -> bool:
    """Equal in every bit, whatever containers hold it; NaN equals NaN."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return (
            isinstance(one, torch.Tensor)
            and isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and (
                torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
            )
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


if __name__ == "__main__":
    sys.exit(main())
