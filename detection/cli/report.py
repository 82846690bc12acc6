"""Write an HTML report about a run, or about the difference between two."""

from collections.abc import Sequence
from pathlib import Path

from detection.cli.arguments import ToolParser, existing_file, existing_path, split_overrides
from detection.core.errors import UserError
from detection.core.extras import require_for_file

EXAMPLE = """\
examples:
  python tools/report.py runs/mine                             (writes runs/mine/report.html and report.json)
  python tools/report.py runs/a runs/b                         (compares: runs/b/compare.html, compare.json)
  python tools/report.py runs/mine --data test.json --images test/
  python tools/report.py runs/mine data.val.images=moved/images data.val.annotations=moved/val.json device=cpu
  python tools/report.py --predictions found.json --data val.json --images val/       (no model needed)
  python tools/report.py --predictions a.json b.json --data val.json

docs/report.md explains each part of the page.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("report", __doc__, EXAMPLE)
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN key=value",
        help="folder or checkpoint of a run (two are compared), and config overrides",
    )
    parser.add_argument(
        "--predictions",
        nargs="+",
        metavar="FILE",
        type=existing_file,
        help="COCO results files instead of runs",
    )
    parser.add_argument("--data", metavar="JSON", type=existing_path, help="annotations (default: data.val of the run)")
    parser.add_argument(
        "--images", metavar="DIR", type=existing_path, help="their images (default: images/ beside --data)"
    )
    parser.add_argument("--out", metavar="FILE", help="the page (.html); its numbers are written beside it (.json)")
    parser.add_argument("--no-latency", action="store_true", help="do not measure the latency of the checkpoint")
    parser.add_argument("--resamples", type=int, default=500, help="bootstrap resamples of a comparison")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resamples")
    parser.add_argument("--max-mb", type=float, default=6.0, help="megabytes of images in a page at most")
    parser.add_force()
    args = parser.parse(arguments)
    hint = "name a run's folder (output_dir) or its best.pt"
    runs, overrides = split_overrides(args.runs)
    runs = [existing_path(name, hint) for name in runs]
    named = args.predictions or runs
    if bool(args.predictions) == bool(runs) or len(named) > 2:
        parser.error("name one or two runs, or one or two files with --predictions")
    if args.predictions and args.data is None:
        raise UserError("--predictions needs --data, the annotations that they are to be scored on")
    if args.resamples < 1:
        raise UserError(f"--resamples {args.resamples}: at least 1 is needed")
    for run in runs:
        require_for_file(run)

    from detection.report.comparison_page import write_comparison
    from detection.report.run_data import read_file, read_run
    from detection.report.write_report import checked_page_path, json_path, write_report

    default = Path(named[-1]) if Path(named[-1]).is_dir() else Path(named[-1]).parent
    out = checked_page_path(args.out or default / ("report.html" if len(named) == 1 else "compare.html"))
    checked = {"outputs": [out, json_path(out)], "force": args.force}
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
