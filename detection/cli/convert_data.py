"""Convert a dataset between COCO, Pascal VOC and YOLO, or split it into train and val without leakage."""

from collections.abc import Sequence

from detection.cli.arguments import ToolParser, existing_path

EXAMPLE = """\
examples:
  python tools/convert_data.py VOC2007 --to coco --out voc_as_coco
  python tools/convert_data.py train=a.json val=b.json --images images --to yolo --out as_yolo --transfer link
  python tools/convert_data.py all.json --to coco --out divided --split 0.8 --group-by '^(video\\d+)_' --transfer none

A SOURCE is a COCO file, a VOC folder, one of its image sets, a folder of XML files, or a data.yaml of YOLO.
What a format cannot hold is lost, and reported: crowd regions and areas in YOLO, areas in VOC, polygons in both.
COCO to COCO (--split, --classes) keeps all fields of the entries.
--split never puts images of the same bytes on both sides.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("convert_data", __doc__, EXAMPLE)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="files or folders; train=SOURCE names the split")
    parser.add_argument("--to", required=True, choices=("coco", "voc", "yolo"), help="format to write")
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder; must be empty or absent")
    parser.add_argument(
        "--images", metavar="DIR", type=existing_path, help="folder of the images (default: as the format says)"
    )
    parser.add_argument(
        "--format",
        default="auto",
        choices=("auto", "coco", "voc", "yolo"),
        help="format of the sources",
    )
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="keep only these classes")
    parser.add_argument(
        "--split", type=float, metavar="SHARE", help="divide: this share of the images is for training, like 0.8"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of --split")
    parser.add_argument(
        "--group-by", metavar="REGEX", help="with --split: files in whose names it finds the same text stay together"
    )
    parser.add_argument(
        "--transfer",
        default="copy",
        choices=("copy", "link", "none"),
        help="copy the images, link to them, or leave them where they are",
    )
    args = vars(parser.parse(arguments))
    # Only now, so that --help is quick.
    from detection.data.prepare.convert import convert_data

    print(convert_data(share=args.pop("split"), **args))
    return 0
