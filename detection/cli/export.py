"""Export a checkpoint to ONNX, OpenVINO, TorchScript or torch.export, and compare the outputs with PyTorch's."""

from collections.abc import Sequence

from detection.cli.arguments import ToolParser, existing_detector, split_overrides
from detection.cli.export_options import parse_batch, parse_canvas_size
from detection.core.extras import WRITERS, require

FORMATS = ("onnx", "openvino", "torchscript", "torch_export")
EXAMPLE = """\
examples:
  python tools/export.py runs/mine/best.pt --format onnx                          (any batch, any size)
  python tools/export.py runs/mine/best.pt --format onnx --batch 1 --size 320 eval.score_threshold=0.05
  python tools/export.py runs/mine/best.pt --format onnx --form raw --out heads.onnx
  python tools/detect.py runs/mine/best.onnx photo.jpg                            (the file in the checkpoint's place)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("export", __doc__, EXAMPLE)
    parser.add_argument("arguments", nargs="+", metavar="CHECKPOINT key=value", help="best.pt, and config overrides")
    parser.add_argument("--format", required=True, choices=FORMATS, help="format of the file")
    parser.add_argument(
        "--form",
        choices=("end_to_end", "raw"),
        default="end_to_end",
        help="output boxes, labels and scores, or the raw outputs of the head, see detection/runtime/decode.py",
    )
    parser.add_argument("--batch", default="dynamic", help="batch size, or dynamic")
    parser.add_argument(
        "--size",
        default="dynamic",
        metavar="S|HxW",
        help="input size in pixels, multiples of 32; images are resized to it; or dynamic",
    )
    parser.add_argument("--out", metavar="FILE", help="file to write (default: beside the checkpoint, with its name)")
    parser.add_force()
    args = parser.parse(arguments)
    checkpoints, overrides = split_overrides(args.arguments)
    if len(checkpoints) != 1:
        parser.error(f"one checkpoint is expected, not {len(checkpoints)}: {' '.join(checkpoints)}")
    checkpoint = existing_detector(checkpoints[0])
    require(f"--format {args.format}", *WRITERS.get(args.format, ()))
    batch, size = parse_batch(args.batch), parse_canvas_size(args.size)

    from detection.export.exporter import export_checkpoint

    lines = export_checkpoint(
        checkpoint,
        args.format,
        form=args.form,
        batch=batch,
        size=size,
        out=args.out,
        overrides=overrides,
        force=args.force,
    )
    print("\n".join(lines))
    return 0
