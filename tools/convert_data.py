"""Convert a data set between COCO, Pascal VOC and YOLO, and divide it into training and validation without leakage."""

import argparse

from detection.cli.arguments import existing_path
from detection.cli.run_tool import run_tool

EXAMPLE = """\
examples:
  python tools/convert_data.py VOC2007 --to coco --out voc_as_coco
  python tools/convert_data.py train=a.json val=b.json --images images --to yolo --out as_yolo --transfer link
  python tools/convert_data.py all.json --to coco --out divided --split 0.8 --group-by '^(video\\d+)_' --transfer none

A SOURCE is a COCO file, a VOC folder, one of its image sets, a folder of XML files, or a data.yaml of YOLO.
What a format has no place for is lost, and said: crowd regions and areas in YOLO, areas in VOC, polygons in both.
COCO to COCO (--split, --classes) keeps all that stands in the entries.
Images with the same bytes are never on both sides of --split.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="files or folders; train=SOURCE names the split")
    parser.add_argument("--to", required=True, choices=("coco", "voc", "yolo"))
    parser.add_argument("--out", required=True, metavar="DIR", help="made; must be empty if it is there")
    parser.add_argument(
        "--images", metavar="DIR", type=existing_path, help="the images, where they are not in the usual place"
    )
    parser.add_argument("--format", default="auto", choices=("auto", "coco", "voc", "yolo"), help="of the sources")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--split", type=float, metavar="SHARE", help="divide: this share is for training, like 0.8")
    parser.add_argument("--seed", type=int, default=0, help="of --split: another one, another split (default 0)")
    parser.add_argument(
        "--group-by", metavar="REGEX", help="of --split: file names in which it finds the same stay together"
    )
    parser.add_argument(
        "--transfer",
        default="copy",
        choices=("copy", "link", "none"),
        help="default copy; none leaves them where they are",
    )
    args = vars(parser.parse_args())
    # Only now, so that --help is quick.
    from detection.data.prepare.convert import convert_data

    print(convert_data(share=args.pop("split"), **args))


if __name__ == "__main__":
    run_tool(main)
