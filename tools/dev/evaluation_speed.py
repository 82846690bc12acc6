"""Measure how long the backends of the evaluation (eval.backend) take, in turn, on the same random detections."""

import time
from collections.abc import Sequence

import numpy as np

from detection.cli.arguments import ToolParser, positive
from detection.cli.run_tool import run_tool
from detection.config import EVAL_BACKENDS
from detection.core.extras import BACKENDS, require
from detection.data.annotations import Annotations
from detection.evaluation.coco_evaluator import METRICS, Result, evaluate_results

EXAMPLE = """\
examples:
  python tools/dev/evaluation_speed.py
  python tools/dev/evaluation_speed.py --images 500 --detections 100 --classes 80
"""
OBJECTS = 7
"""Objects of an image on average, as in COCO."""


def compare_evaluations(images: int, detections: int, classes: int, *, runs: int = 1, seed: int = 0) -> str:
    """Time each backend on random data; a table with the ratio, and how far the numbers are apart.

    Args:
        detections: of each image.
        runs: of each backend; the shortest counts.

    Raises:
        UserError: a backend is not installed.
    """
    annotations, results = random_evaluation(images, detections, classes, seed)
    seconds: dict[str, float] = dict.fromkeys(EVAL_BACKENDS, float("inf"))
    numbers: dict[str, np.ndarray] = {}
    # The one that may be absent comes first: nobody waits a minute for that message.
    for _ in range(runs):
        for backend in reversed(EVAL_BACKENDS):
            start = time.perf_counter()
            evaluation = evaluate_results(annotations, results, backend)
            seconds[backend] = min(seconds[backend], time.perf_counter() - start)
            numbers[backend] = np.array(
                [*(evaluation.numbers[name] for name in METRICS), *(ap for _, ap, _, _ in evaluation.per_class)]
            )
    first = EVAL_BACKENDS[0]
    lines = [
        f"{images} images, {len(results)} detections, {len(annotations.boxes)} objects, {classes} classes, seed {seed}"
    ]
    for backend in EVAL_BACKENDS:
        apart = np.nanmax(np.abs(numbers[backend] - numbers[first]), initial=0.0)
        lines.append(
            f"{backend:<18} {seconds[backend]:8.2f} s   {seconds[first] / seconds[backend]:6.2f} times as fast   "
            f"AP {numbers[backend][0]:.6f}, numbers apart by at most {apart:.1g}"
        )
    return "\n".join(lines)


def random_evaluation(images: int, detections: int, classes: int, seed: int = 0) -> tuple[Annotations, list[Result]]:
    """Objects of all sizes, one in fifty a crowd region, and detections: near misses of them and noise."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(OBJECTS, images)
    boxes = _boxes(rng, int(counts.sum()))
    labels = rng.integers(1, classes + 1, len(boxes))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    annotations = Annotations(
        source=f"random data of {images} images",
        format="coco",
        images="",
        class_names=tuple(f"class {k + 1}" for k in range(classes)),
        category_ids=np.arange(1, classes + 1),
        image_ids=np.arange(1, images + 1),
        file_names=np.array([f"{i + 1}.jpg" for i in range(images)]),
        sizes=np.full((images, 2), 640),
        offsets=offsets,
        boxes=boxes,
        labels=labels,
        areas=boxes[:, 2] * boxes[:, 3] * rng.uniform(0.4, 1, len(boxes)),
        crowd=rng.random(len(boxes)) < 0.02,
    )
    results: list[Result] = []
    for i in range(images):
        noise = _boxes(rng, detections)
        noise_labels = rng.integers(1, classes + 1, detections)
        near = np.arange(offsets[i], offsets[i + 1])[:detections]
        shift, growth = rng.normal(0, 0.06, (2, len(near), 2))
        sides = boxes[near, 2:]
        noise[: len(near)] = np.concatenate([boxes[near, :2] + shift * sides, sides * np.exp(growth)], axis=1)
        noise_labels[: len(near)] = np.where(rng.random(len(near)) < 0.9, labels[near], noise_labels[: len(near)])
        scores = np.concatenate([rng.beta(3, 2, len(near)), rng.beta(1, 4, detections - len(near))])
        results += [
            {"image_id": i + 1, "category_id": label, "bbox": box, "score": score}
            for label, box, score in zip(noise_labels.tolist(), noise.tolist(), scores.tolist(), strict=True)
        ]
    return annotations, results


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """float64 [count, 4] xywh, sides from 6 to 400 px, evenly by their logarithm."""
    sides = np.exp(rng.uniform(np.log(6), np.log(400), (count, 2)))
    return np.concatenate([rng.uniform(0, 1, (count, 2)) * (640 - sides), sides], axis=1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("dev/evaluation_speed", __doc__, EXAMPLE)
    parser.add_argument("--images", type=positive, default=5000, metavar="N", help="number of images")
    parser.add_argument("--detections", type=positive, default=100, metavar="N", help="in each image")
    parser.add_argument("--classes", type=positive, default=80, metavar="N", help="number of classes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data")
    args = parser.parse(arguments)
    require("the comparison", *(package for packages in BACKENDS.values() for package in packages))
    print(compare_evaluations(args.images, args.detections, args.classes, seed=args.seed))
    return 0


if __name__ == "__main__":
    run_tool(main)
