"""Turn a checkpoint into a file for ONNX Runtime, OpenVINO or plain PyTorch, and check it against the checkpoint."""

import argparse

from detection.cli.arguments import existing_file
from detection.cli.export_options import parse_batch, parse_frame
from detection.cli.run_tool import run_tool
from detection.core.extras import WRITERS, require
from detection.core.outputs import add_force

FORMATS = ("onnx", "openvino", "torchscript", "torch_export")
EXAMPLE = """\
examples:
  python tools/export.py runs/mine/best.pt --format onnx                          (any batch, any size)
  python tools/export.py runs/mine/best.pt --format onnx --batch 1 --size 320 eval.score_threshold=0.05
  python tools/export.py runs/mine/best.pt --format onnx --form raw --out heads.onnx
  python tools/detect.py runs/mine/best.onnx photo.jpg                            (the file in the checkpoint's place)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arguments", nargs="+", metavar="CHECKPOINT key=value", help="best.pt, and config overrides")
    parser.add_argument("--format", required=True, choices=FORMATS, help="of the file")
    parser.add_argument(
        "--form",
        choices=("end_to_end", "raw"),
        default="end_to_end",
        help="boxes, labels and scores; or the heads' outputs, see detection/runtime/decode.py (default: %(default)s)",
    )
    parser.add_argument("--batch", default="dynamic", help="images in a batch, or dynamic (default)")
    parser.add_argument(
        "--size",
        default="dynamic",
        metavar="S|HxW",
        help="frame in pixels, multiples of 32, which images are resized to fill; or dynamic (default)",
    )
    parser.add_argument("--out", metavar="FILE", help="default: beside the checkpoint, named like it")
    add_force(parser)
    args = parser.parse_intermixed_args()
    checkpoints = [a for a in args.arguments if "=" not in a]
    if len(checkpoints) != 1:
        parser.error(f"one checkpoint is expected, not {len(checkpoints)}: {' '.join(checkpoints)}")
    checkpoint = existing_file(checkpoints[0])
    require(f"--format {args.format}", *WRITERS.get(args.format, ()))
    batch, size = parse_batch(args.batch), parse_frame(args.size)

    from detection.export.exporter import export_checkpoint

    lines = export_checkpoint(
        checkpoint,
        args.format,
        form=args.form,
        batch=batch,
        size=size,
        out=args.out,
        overrides=[a for a in args.arguments if "=" in a],
        force=args.force,
    )
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    run_tool(main)
