"""Train a detector from a config."""

from collections.abc import Sequence
from pathlib import Path

from detection.cli.arguments import ToolParser
from detection.config_io import load_config
from detection.core.errors import UserError
from detection.core.extras import require_for_config
from detection.data.source_paths import check_source_paths
from detection.engine.run_folder import check_output_dir

EXAMPLE = """\
example:
  python tools/train.py configs/retina_ghost_320.yaml \\
      data.train.annotations=mine/train.json data.val.annotations=mine/val.json output_dir=runs/mine
  torchrun --nproc-per-node 8 tools/train.py configs/retina_ghost.yaml     (eight GPUs; see docs/training.md)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("train", __doc__, EXAMPLE)
    parser.add_config("optim.lr=0.02")
    parser.add_argument("--resume", action="store_true", help="continue from output_dir/last.pt")
    parser.add_argument(
        "--dry-run", action="store_true", help="run one batch, print shapes, memory and time; write nothing"
    )
    parser.add_argument(
        "--profile", action="store_true", help="time ten steps: print a table, write output_dir/trace.json"
    )
    parser.add_argument(
        "--auto-batch", action="store_true", help="use the largest batch that fits into the memory of the GPU"
    )
    parser.add_argument("--detect-anomaly", action="store_true", help="name the operation that produces a NaN (slow)")
    args = parser.parse(arguments)
    config = load_config(args.config, args.overrides)
    if not (args.dry_run or args.profile):
        check_output_dir(config, args.resume)
    check_source_paths(config)
    require_for_config(config)
    # Only now: torch takes seconds to import, and a misspelt key or path should not wait for it.
    from detection.engine.train_detector import dry_run, run_training

    if args.detect_anomaly:
        import torch

        torch.autograd.set_detect_anomaly(True)
    if args.auto_batch:
        from detection.engine.auto_batch import with_largest_batch

        config = with_largest_batch(config)
    if args.profile:
        from detection.engine.profile import profile_training

        print(profile_training(config))
        return 0
    if args.dry_run:
        print(dry_run(config))
        return 0
    try:
        return (
            0 if run_training(config, resume=args.resume, on_finished=report if config.train.report else None) else 130
        )
    except RuntimeError as error:
        if not args.detect_anomaly:
            raise
        raise UserError(f"--detect-anomaly: {error} Its forward pass is in the warning above") from error


def report(folder: Path) -> None:
    """Write report.html and report.json of a finished run."""
    # Plots and timing take a second to import, and are of no use before.
    from detection.report.write_report import report_on_training

    report_on_training(folder)
