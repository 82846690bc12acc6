"""Show training batches after augmentation with their boxes, and what a checkpoint detects in them."""

from collections.abc import Sequence
from pathlib import Path

from detection.cli.arguments import ToolParser, existing_detector
from detection.config_io import load_config
from detection.core.extras import require_for_file
from detection.data.source_paths import check_source_paths

EXAMPLE = """\
examples:
  python tools/browse.py configs/demo.yaml                                       (browse/index.html, four batches)
  python tools/browse.py configs/demo.yaml data.augment.mosaic=1 --batches 10 --out mosaics
  python tools/browse.py configs/demo.yaml --split val --checkpoint runs/demo/best.pt
  python tools/browse.py configs/demo.yaml --serve                               (http://127.0.0.1:8000, until Ctrl-C)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("browse", __doc__, EXAMPLE)
    parser.add_config("data.augment.mosaic=1")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="split to show")
    parser.add_argument("--batches", type=int, default=4, help="number of batches to write")
    parser.add_argument("--first", type=int, default=0, help="first batch, counted from 0 over all epochs")
    parser.add_argument(
        "--checkpoint", type=existing_detector, metavar="FILE", help="detect with this checkpoint or exported file"
    )
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score of a detection")
    parser.add_argument("--out", default="browse", metavar="DIR", help="output folder")
    parser.add_argument(
        "--serve", nargs="?", type=int, const=8000, metavar="PORT", help="serve pages on this machine (default 8000)"
    )
    parser.add_force()
    args = parser.parse(arguments)
    if args.batches < 1 or args.first < 0:
        parser.error("--batches must be at least 1, --first at least 0")
    if not 0 <= args.threshold <= 1:
        parser.error("--threshold must be between 0 and 1")
    config = load_config(args.config, args.overrides)
    check_source_paths(config, (args.split,), weights=False)
    if args.checkpoint is not None:
        require_for_file(args.checkpoint)

    from detection.report.batch_browser import BatchBrowser, BatchDetector, write_batches
    from detection.report.batch_server import serve

    detector = BatchDetector(args.checkpoint, config.device, args.threshold) if args.checkpoint else None
    browser = BatchBrowser(config, args.split, detector)
    if args.serve is not None:
        serve(browser, args.serve)
    else:
        page = write_batches(browser, Path(args.out), first=args.first, count=args.batches, force=args.force)
        print(f"page and images: {page}")
    return 0
