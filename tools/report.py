"""What is wrong with a detector: a page about a run, or about the difference of two."""

import argparse
from pathlib import Path

from detection.cli.arguments import existing_file, existing_path
from detection.cli.run_tool import run_tool
from detection.core.errors import UserError
from detection.core.extras import require_for_file
from detection.core.outputs import add_force

EXAMPLE = """\
examples:
  python tools/report.py runs/mine                             (writes runs/mine/report.html and report.json)
  python tools/report.py runs/a runs/b                         (compares: runs/b/compare.html, compare.json)
  python tools/report.py runs/mine --data test.json --images test/
  python tools/report.py runs/mine data.val.images=moved/images data.val.annotations=moved/val.json device=cpu
  python tools/report.py --predictions found.json --data val.json --images val/       (no model needed)
  python tools/report.py --predictions a.json b.json --data val.json

What each part of the page means is told in docs/report.md.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN key=value",
        help="a run's folder or checkpoint, two are compared; config overrides",
    )
    parser.add_argument(
        "--predictions",
        nargs="+",
        metavar="FILE",
        type=existing_file,
        help="COCO results files in the place of runs",
    )
    parser.add_argument("--data", metavar="JSON", type=existing_path, help="annotations (default: data.val of the run)")
    parser.add_argument(
        "--images", metavar="DIR", type=existing_path, help="their images (default: images/ beside --data)"
    )
    parser.add_argument("--out", metavar="FILE", help="the page, .html; numbers are written beside it, .json")
    parser.add_argument("--no-latency", action="store_true", help="do not time the checkpoint")
    parser.add_argument("--resamples", type=int, default=500, help="of the comparison (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (default: %(default)s)")
    parser.add_argument(
        "--max-mb", type=float, default=6.0, help="most megabytes of images in a page (default: %(default)s)"
    )
    add_force(parser)
    args = parser.parse_intermixed_args()
    hint = "name a run's folder (output_dir) or its best.pt"
    runs = [existing_path(name, hint) for name in args.runs if "=" not in name]
    overrides = [name for name in args.runs if "=" in name]
    named = args.predictions or runs
    if bool(args.predictions) == bool(runs) or len(named) > 2:
        parser.error("name one or two runs, or one or two files with --predictions")
    if args.predictions and args.data is None:
        raise UserError("--predictions needs --data, the annotations that they are to be scored on")
    if args.resamples < 1:
        raise UserError(f"--resamples {args.resamples}: at least 1 is needed")
    for run in runs:
        require_for_file(run)

    from detection.report.compare import write_comparison
    from detection.report.run_data import read_file, read_run
    from detection.report.write_report import numbers_path, output_path, write_report

    default = Path(named[-1]) if Path(named[-1]).is_dir() else Path(named[-1]).parent
    out = output_path(args.out or default / ("report.html" if len(named) == 1 else "compare.html"))
    checked = {"outputs": [out, numbers_path(out)], "force": args.force}
    if args.predictions:
        sources = [read_file(name, args.data, args.images, **checked) for name in named]
    else:
        sources = [read_run(name, data=args.data, images=args.images, overrides=overrides, **checked) for name in named]
    max_bytes = round(args.max_mb * 1e6)
    if len(sources) == 1:
        numbers = write_report(sources[0], out, latency=not args.no_latency, max_bytes=max_bytes)
        print(sources[0].analysis.matches.evaluation.table())
    else:
        text, numbers = write_comparison(
            sources[0], sources[1], out, resamples=args.resamples, seed=args.seed, max_bytes=max_bytes
        )
        print(text)
    print(f"\npage written to {out}, numbers to {numbers}")
    return 0


if __name__ == "__main__":
    run_tool(main)
