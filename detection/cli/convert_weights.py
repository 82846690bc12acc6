"""Identify and check a file of GhostNet weights (PaddleClas, MindCV, PyTorch), or convert it to PyTorch's layout."""

from collections.abc import Sequence
from pathlib import Path

from detection.cli.arguments import ToolParser, existing_file, existing_path
from detection.core.outputs import check_outputs

EXAMPLE = """\
examples:
  python tools/convert_weights.py GhostNet_x1_3_ssld_pretrained.pdparams       (what it is, and whether all of it loads)
  python tools/convert_weights.py ghostnet_130-cf4c235c.ckpt --out ghostnet_130.safetensors
  python tools/convert_weights.py FILE --image dog.jpg                       (the five most likely ImageNet classes)
  python tools/convert_weights.py FILE --val imagenet/val                      (top-1 accuracy, 1000 class folders)
Neither PaddlePaddle nor MindSpore is needed. docs/weights.md names the published files.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("convert_weights", __doc__, EXAMPLE)
    parser.add_argument("file", metavar="FILE", type=existing_file, help=".pdparams, .ckpt, .pth or .safetensors")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the weights to this file, .safetensors or .pth")
    parser.add_argument("--image", metavar="FILE", type=existing_file, help="classify this image")
    parser.add_argument(
        "--val", metavar="DIR", type=existing_path, help="measure top-1 and top-5 on class folders of images"
    )
    parser.add_force()
    args = parser.parse(arguments)
    from detection.pretraining.weight_conversion import accuracy, check_out, convert, name_image, write

    if args.out is not None:
        check_out(args.out)
        check_outputs([args.out], [args.file, args.image, args.val], force=args.force)
    converted = convert(args.file)
    print(converted)
    if args.out is not None:
        write(converted, args.out)
    print(f"use       model.backbone.width={converted.width:g} model.backbone.weights={args.out or args.file}")
    if args.image is not None:
        for name, probability in name_image(converted.network, args.image):
            print(f"{100 * probability:7.2f} % {name}")
    if args.val is not None:
        top1, top5, count = accuracy(converted.network, args.val)
        print(f"top-1 {top1:.2f} %, top-5 {top5:.2f} % of {count} images")
    return 0
