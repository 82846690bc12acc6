"""Score a checkpoint, an exported file, or an existing COCO results file, with pycocotools."""

import argparse

from detection.cli.arguments import existing_file, existing_path
from detection.cli.run_tool import run_tool
from detection.config import EVAL_BACKENDS
from detection.core.errors import UserError
from detection.core.extras import BACKENDS, require, require_for_file
from detection.core.outputs import add_force

EXAMPLE = """\
examples:
  python tools/evaluate.py runs/demo/best.pt                                  (the val set of its config)
  python tools/evaluate.py best.pt --data coco/annotations/instances_val2017.json --images coco/val2017
  python tools/evaluate.py runs/demo/best.onnx device=cpu                     (what tools/export.py made of it)
  python tools/evaluate.py --predictions predictions.json --data val.json     (no model needed)
  python tools/evaluate.py best.pt --backend faster-coco-eval                 (the same numbers, sooner)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "arguments", nargs="*", metavar="FILE key=value", help="checkpoint or exported file, and config overrides"
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        type=existing_path,
        help="COCO file, VOC image set or YOLO data.yaml (default: data.val)",
    )
    parser.add_argument(
        "--images", metavar="DIR", type=existing_path, help="their images, where they are not in the usual place"
    )
    parser.add_argument(
        "--predictions", metavar="FILE", type=existing_file, help="score this COCO results file, without a model"
    )
    parser.add_argument(
        "--backend", choices=EVAL_BACKENDS, help="what scores; of a checkpoint the same as eval.backend=…"
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers to this file")
    parser.add_argument(
        "--save-predictions",
        metavar="FILE",
        help="default: predictions.json in the checkpoint's folder, of other data than its config's "
        "predictions_DATA.json",
    )
    parser.add_argument("--resume", action="store_true", help="go on with an evaluation that was cut off")
    add_force(parser)
    args = parser.parse_intermixed_args()
    checkpoints = [existing_file(a) for a in args.arguments if "=" not in a]
    overrides = [a for a in args.arguments if "=" in a]
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
            overrides=overrides,
            annotations=args.data,
            images=args.images,
            json_file=args.json,
            predictions_file=args.save_predictions,
            resume=args.resume,
            force=args.force,
        )
    return 0


if __name__ == "__main__":
    run_tool(main)
