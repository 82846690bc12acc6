"""Evaluate a checkpoint, an exported file or a COCO results file with pycocotools."""

from collections.abc import Sequence

from detection.cli.arguments import ToolParser, existing_detector, existing_file, existing_path, split_overrides
from detection.config import EVAL_BACKENDS
from detection.core.errors import UserError
from detection.core.extras import BACKENDS, require, require_for_file

EXAMPLE = """\
examples:
  python tools/evaluate.py runs/demo/best.pt                                  (the val set of its config)
  python tools/evaluate.py best.pt --data coco/annotations/instances_val2017.json --images coco/val2017
  python tools/evaluate.py runs/demo/best.onnx device=cpu                     (a file from tools/export.py)
  python tools/evaluate.py yolox.onnx --adapter yolox --data val.json         (a file of another project)
  python tools/evaluate.py --predictions predictions.json --data val.json     (no model needed)
  python tools/evaluate.py best.pt --backend faster-coco-eval                 (same numbers, faster)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("evaluate", __doc__, EXAMPLE)
    parser.add_argument(
        "arguments", nargs="*", metavar="FILE key=value", help="checkpoint or exported file, and config overrides"
    )
    parser.add_adapter()
    parser.add_argument(
        "--data",
        metavar="FILE",
        type=existing_path,
        help="COCO file, VOC image set or YOLO data.yaml (default: data.val)",
    )
    parser.add_argument(
        "--images",
        metavar="DIR",
        type=existing_path,
        help="images of --data (default: as its format says, images/ beside a JSON)",
    )
    parser.add_argument(
        "--predictions", metavar="FILE", type=existing_file, help="score this COCO results file, without a model"
    )
    parser.add_argument(
        "--backend", choices=EVAL_BACKENDS, help="library that computes AP; of a checkpoint the same as eval.backend=…"
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers to this file")
    parser.add_argument(
        "--save-predictions",
        metavar="FILE",
        help="default: predictions.json in the checkpoint's folder, of other data than its config's "
        "predictions_DATA.json",
    )
    parser.add_argument("--resume", action="store_true", help="continue an evaluation that was interrupted")
    parser.add_force()
    args = parser.parse(arguments)
    checkpoints, overrides = split_overrides(args.arguments)
    checkpoints = list(map(existing_detector, checkpoints))
    if args.backend is not None:
        overrides.append(f"eval.backend={args.backend}")
    if len(checkpoints) > 1:
        parser.error(f"one checkpoint or exported file is expected, not {len(checkpoints)}: {' '.join(checkpoints)}")
    if not checkpoints and (args.predictions is None or args.data is None):
        raise UserError("give a checkpoint, or both --predictions and --data")
    for name in checkpoints:
        require_for_file(name)
    require(f"--backend {args.backend}", *BACKENDS.get(args.backend, ()))

    from detection.evaluation.score import score_checkpoint, score_file

    if args.predictions is not None:
        checkpoint = checkpoints[0] if checkpoints else None
        backend = args.backend or EVAL_BACKENDS[0]
        score_file(
            args.predictions,
            args.data,
            checkpoint=checkpoint,
            json_file=args.json,
            backend=backend,
            force=args.force,
        )
    else:
        score_checkpoint(
            checkpoints[0],
            adapter=args.adapter,
            overrides=overrides,
            annotations=args.data,
            images=args.images,
            json_file=args.json,
            predictions_file=args.save_predictions,
            resume=args.resume,
            force=args.force,
        )
    return 0
