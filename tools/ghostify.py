"""Replace a network's convolutions by ghost modules; tell what that saves, and how far it is from the original."""

import argparse

from detection.cli.arguments import existing_file, existing_source, existing_weights
from detection.cli.run_tool import run_tool
from detection.config import GhostifyConfig
from detection.core.extras import require_for_backbone
from detection.core.outputs import add_force

EXAMPLE = """\
examples:
  python tools/ghostify.py resnet18                                        (what would be replaced, and the cost)
  python tools/ghostify.py resnet18 --weights resnet18.pth --images photos/ --out ghost_resnet18.pth
  python tools/ghostify.py runs/mine/best.pt --parts neck head --images mine/images --size 320 --out ghosted.pt
  python tools/ghostify.py configs/retina_mobilenet_v2.yaml --ratio 4 --include 'head.*' 'backbone.fpn.*'
"""


def main() -> int:
    default = GhostifyConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", help="name of a backbone, or checkpoint (.pt) or config (.yaml) of a detector")
    parser.add_argument("--width", type=float, default=1.0, help="of a backbone (default: %(default)s)")
    parser.add_argument(
        "--weights", metavar="FILE", type=existing_weights, help="of a backbone: what model.backbone.weights takes"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="SOURCE",
        type=existing_source,
        help="images, folders or globs to fit on",
    )
    parser.add_argument("--count", type=int, default=32, help="at most so many images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side in pixels (default: %(default)s)")
    parser.add_argument("--init", choices=("fit", "random"), default="fit", help="weights written (default: fit)")
    parser.add_argument("--out", metavar="FILE", help="write the ghosted network here")
    parser.add_argument("--ratio", type=int, default=default.ratio, help="s in the paper (default: %(default)s)")
    parser.add_argument(
        "--kernel-size",
        type=int,
        choices=(1, 3, 5, 7),
        default=default.kernel_size,
        help="d in the paper, of the cheap filters (default: %(default)s)",
    )
    parser.add_argument(
        "--parts", nargs="+", choices=("backbone", "neck", "head"), default=default.parts, help="of a detector"
    )
    parser.add_argument("--include", nargs="+", default=default.include, metavar="PATTERN", help="names to replace")
    parser.add_argument("--exclude", nargs="*", default=default.exclude, metavar="PATTERN", help="names to keep")
    parser.add_argument(
        "--min-channels", type=int, default=default.min_channels, help="keep narrower ones (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: %(default)s)")
    add_force(parser)
    args = parser.parse_args()
    if args.network.endswith((".pt", ".pth", ".yaml", ".yml")):
        args.network = existing_file(args.network)
    require_for_backbone(args.network, args.weights)
    if args.ratio < 2:
        parser.error("--ratio must be at least 2")
    if min(args.count, args.min_channels) < 1 or args.size < 32:
        parser.error("--count and --min-channels must be at least 1, --size at least 32")
    spec = GhostifyConfig(
        parts=args.parts,
        ratio=args.ratio,
        kernel_size=args.kernel_size,
        min_channels=args.min_channels,
        include=args.include,
        exclude=args.exclude,
    )

    from detection.ghost.ghostify_detector import ghostify_network

    print(
        ghostify_network(
            args.network,
            spec,
            width=args.width,
            weights=args.weights,
            images=args.images,
            size=args.size,
            count=args.count,
            init=args.init,
            out=args.out,
            device=args.device,
            force=args.force,
        )
    )
    return 0


if __name__ == "__main__":
    run_tool(main)
