"""Write smaller files of a detector (fp16, int8), and measure their AP and speed."""

import os
from collections.abc import Sequence

from detection.cli.arguments import ToolParser, existing_detector, existing_source, split_overrides
from detection.core.errors import UserError
from detection.core.extras import require_for_quantization

EXAMPLE = """\
examples:
  python tools/quantize.py runs/mine/best.pt                                   (ONNX: fp16 and int8)
  python tools/quantize.py runs/mine/best.pt --format onnx openvino --precision int8 --size 320 --batch 1
  python tools/quantize.py best.pt --calibration images/ --max-loss 0.005 data.val.images=… data.val.annotations=…
  python tools/detect.py runs/mine/best.int8.onnx photo.jpg                    (like any exported file)

int8 is calibrated on images of data.train; AP is measured on data.val. A file that loses more than --max-loss AP
gets layers back in float32 until it does not.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("quantize", __doc__, EXAMPLE)
    parser.add_argument("arguments", nargs="+", metavar="CHECKPOINT key=value", help="best.pt, and config overrides")
    parser.add_argument("--format", nargs="+", choices=("onnx", "openvino"), default=["onnx"], help="formats to write")
    parser.add_argument(
        "--precision", nargs="+", choices=("fp16", "int8"), default=["fp16", "int8"], help="precisions to write"
    )
    parser.add_argument("--form", choices=("end_to_end", "raw"), default="end_to_end", help="see tools/export.py")
    parser.add_argument("--batch", default="dynamic", help="batch size, or dynamic")
    parser.add_argument(
        "--size", default="dynamic", metavar="S|HxW", help="input size in pixels, multiples of 32, or dynamic"
    )
    parser.add_argument("--out", metavar="DIR", help="output folder (default: that of the checkpoint)")
    parser.add_argument(
        "--calibration", nargs="+", default=[], metavar="SOURCE", help="images for int8 (default: data.train)"
    )
    parser.add_argument(
        "--calibration-images",
        type=int,
        default=128,
        metavar="N",
        help="calibrate on at most N images",
    )
    parser.add_argument(
        "--val-images",
        type=int,
        default=1000,
        metavar="N",
        help="measure AP on at most N images",
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        default=0.01,
        metavar="AP",
        help="largest loss of AP of an int8 file",
    )
    parser.add_argument(
        "--keep", nargs="+", default=[], metavar="PATTERN", help="layers that stay in float32, like '/body/*'"
    )
    parser.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="threads that time the files"
    )
    parser.add_force()
    args = parser.parse(arguments)
    checkpoints, overrides = split_overrides(args.arguments)
    if len(checkpoints) != 1:
        parser.error(f"one checkpoint is expected, not {len(checkpoints)}: {' '.join(checkpoints)}")
    for name in ("calibration_images", "val_images", "threads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    checkpoint = existing_detector(checkpoints[0])
    calibration = list(map(existing_source, args.calibration))
    require_for_quantization(args.format, args.precision)

    from detection.cli.export_options import parse_batch, parse_canvas_size
    from detection.quantization.quantizer import quantize_checkpoint

    text = quantize_checkpoint(
        checkpoint,
        formats=args.format,
        precisions=args.precision,
        form=args.form,
        batch=parse_batch(args.batch),
        size=parse_canvas_size(args.size),
        out=args.out,
        calibration=calibration,
        calibration_images=args.calibration_images,
        val_images=args.val_images,
        max_loss=args.max_loss,
        keep=args.keep,
        threads=args.threads,
        overrides=overrides,
        force=args.force,
    )
    print(f"\n{text}")
    return 0
