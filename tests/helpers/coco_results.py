"""Detections in COCO's results format for tests of metrics and reports."""

import math

SETS = ["bccd", "cards", "coco128", "coco_mini", "person"]
"""Real data sets of the folder shared/data."""


def truth_as_results(index):
    """Ground truth, crowd left out, as detections of score 1."""
    return [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for a in index.to_coco()["annotations"]
        if not a["iscrowd"]
    ]


def random_results(index, rng, per_image=8):
    """A mixture of near misses of the ground truth, wrong classes and noise."""
    results = []
    coco = index.to_coco()
    for annotation in coco["annotations"]:
        if rng.random() < 0.7:
            x, y, w, h = annotation["bbox"]
            shift = rng.normal(0, 0.1, 4)
            category = annotation["category_id"] if rng.random() < 0.85 else int(rng.choice(index.category_ids))
            box = [x + w * shift[0], y + h * shift[1], w * math.exp(shift[2]), h * math.exp(shift[3])]
            results.append(
                {"image_id": annotation["image_id"], "category_id": category, "bbox": box, "score": float(rng.random())}
            )
    for image in coco["images"]:
        for _ in range(int(rng.integers(0, per_image))):
            box = [float(v) for v in (*rng.uniform(0, 200, 2), *rng.uniform(5, 150, 2))]
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": int(rng.choice(index.category_ids)),
                    "bbox": box,
                    "score": float(rng.random()),
                }
            )
    return results
