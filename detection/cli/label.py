"""Label images with a detector: annotate a folder, or add the classes that a data set lacks."""

import sys
from collections.abc import Sequence

from detection.cli.arguments import ToolParser, existing_detector, existing_path, positive
from detection.core.extras import require_for_file

EXAMPLE = """\
examples:
  python tools/label.py runs/demo/best.pt photos/ --out labelled --page review.html
  python tools/label.py yolox.onnx --adapter yolox --data person/train.json --out all_classes
  python tools/label.py best.onnx photos/ --out labelled --format yolo --classes car bus --score 0.5

Boxes with a score of at least --score become annotations; those from --ignore-score to --score are doubtful and are
marked as crowd regions (COCO: iscrowd, VOC: difficult; YOLO has no such mark and loses them). With --data, annotations
stay as they are, and boxes are added only for classes that the data lack.

exit code: 0; 1 where images could not be read (each is named, and left out); 2 for a mistaken command; 130 when stopped
(--resume continues).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("label", __doc__, EXAMPLE)
    parser.add_argument(
        "detector",
        metavar="DETECTOR",
        type=existing_detector,
        help="checkpoint, exported file, or a name (tools/models.py)",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        type=existing_path,
        help="folder of images, with its subfolders; with --data: the images of the data, if not in the usual place",
    )
    parser.add_adapter()
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder; must be empty or absent")
    parser.add_argument("--format", default="coco", choices=("coco", "voc", "yolo"), help="format to write")
    parser.add_argument(
        "--data", metavar="FILE", type=existing_path, help="data set to complete: COCO file, VOC folder, data.yaml"
    )
    parser.add_argument("--split", choices=("train", "val", "test"), help="of --data, where it holds several")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="add only these classes of the detector")
    parser.add_argument("--score", type=float, default=0.4, help="lowest score of an annotation")
    parser.add_argument("--ignore-score", type=float, default=0.15, help="lowest score of a doubtful box")
    parser.add_argument(
        "--class-list",
        default="data",
        choices=("data", "detector"),
        help="order and ids of the classes: first those of the data, or first those of the detector",
    )
    parser.add_argument(
        "--transfer",
        choices=("copy", "link", "none"),
        help="copy the images, link to them, or leave them where they are (default: none for coco, otherwise link)",
    )
    parser.add_argument("--page", metavar="FILE", help="write an HTML page to review what was added")
    parser.add_argument("--batch-size", type=positive, default=4, help="images per forward pass")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (auto: cuda where there is one)")
    parser.add_argument("--resume", action="store_true", help="continue a call that was interrupted")
    parser.add_force()
    args = parser.parse(arguments)
    require_for_file(args.detector)

    from detection.engine.signals import ignore_closed_console
    from detection.labelling.label_images import LabelOptions, label_images

    options = LabelOptions(
        args.format, args.classes, args.score, args.ignore_score, args.class_list, args.transfer
    )  # fmt: skip
    with ignore_closed_console():
        summary = label_images(
            args.detector,
            args.out,
            source=args.source,
            data=args.data,
            split=args.split,
            adapter=args.adapter,
            options=options,
            page=args.page,
            device=args.device,
            batch_size=args.batch_size,
            resume=args.resume,
            force=args.force,
        )
    if summary is None:
        return 0
    for reason in summary.failed:
        print(f"error: {reason}", file=sys.stderr)
    print(summary)
    return 1 if summary.failed else 0
