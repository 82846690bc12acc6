"""Pre-train a backbone by classification, on class folders or CIFAR-10."""

from collections.abc import Sequence

from detection.cli.arguments import ToolParser
from detection.config_io import read_config
from detection.core.extras import require_for_pretraining
from detection.engine.run_folder import check_output_dir
from detection.pretraining.source_folders import check_pretraining_paths

EXAMPLE = """\
example:
  python tools/pretrain.py configs/pretrain/ghostnet_imagenet.yaml model.width=1.1 \\
      data.train=imagenet/train data.val=imagenet/val output_dir=runs/pretrain_ghostnet11
  torchrun --nproc-per-node 8 tools/pretrain.py configs/pretrain/ghostnet_imagenet.yaml
then:
  python tools/train.py configs/retina_ghost.yaml model.backbone.weights=runs/pretrain_ghostnet11/backbone.pth
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("pretrain", __doc__, EXAMPLE)
    parser.add_config("optim.lr=0.02", folder="pretrain")
    parser.add_argument("--resume", action="store_true", help="continue from output_dir/last.pt")
    parser.add_argument(
        "--dry-run", action="store_true", help="run one batch, print shapes, memory and time; write nothing"
    )
    args = parser.parse(arguments)
    from detection.pretraining.classification_config import ClassificationConfig

    config = read_config(ClassificationConfig, args.config, args.overrides)
    if not args.dry_run:
        check_output_dir(config, args.resume)
    check_pretraining_paths(config)
    require_for_pretraining(config)
    # Only now: torch takes seconds to import, and a misspelt key or path should not wait for it.
    from detection.pretraining.classification_task import dry_run, run_pretraining

    if args.dry_run:
        print(dry_run(config))
        return 0
    return 0 if run_pretraining(config, resume=args.resume) else 130
