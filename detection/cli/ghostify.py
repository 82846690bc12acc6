"""Replace a network's convolutions with ghost modules; report the cost saved and the error it brings."""

from collections.abc import Sequence

from detection.cli.arguments import ToolParser, existing_file, existing_source, existing_weights
from detection.cli.find_config import SUFFIXES, existing_or_shipped
from detection.config import GhostifyConfig
from detection.core.extras import require_for_backbone

EXAMPLE = """\
examples:
  python tools/ghostify.py resnet18                                        (what would be replaced, and the cost)
  python tools/ghostify.py resnet18 --weights resnet18.pth --images photos/ --out ghost_resnet18.pth
  python tools/ghostify.py runs/mine/best.pt --parts neck head --images mine/images --size 320 --out ghosted.pt
  python tools/ghostify.py configs/retina_mobilenet_v2.yaml --ratio 4 --include 'head.*' 'backbone.fpn.*'
"""


def main(arguments: Sequence[str] | None = None) -> int:
    default = GhostifyConfig()
    parser = ToolParser("ghostify", __doc__, EXAMPLE)
    parser.add_argument("network", help="name of a backbone, or checkpoint (.pt) or config (.yaml) of a detector")
    parser.add_argument("--width", type=float, default=1.0, help="width of a backbone")
    parser.add_argument(
        "--weights", metavar="FILE", type=existing_weights, help="weights of a backbone, as model.backbone.weights"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="SOURCE",
        type=existing_source,
        help="images, folders or globs to fit on",
    )
    parser.add_argument("--count", type=int, metavar="N", default=32, help="fit on at most N images")
    parser.add_argument("--size", type=int, default=224, help="side of the input in pixels")
    parser.add_argument(
        "--init",
        choices=("fit", "random"),
        default="fit",
        help="weights of the ghost modules: fitted to the original or random",
    )
    parser.add_argument("--out", metavar="FILE", help="write the ghosted network to this file")
    parser.add_argument("--ratio", type=int, default=default.ratio, help="s in the paper")
    parser.add_argument(
        "--kernel-size",
        type=int,
        choices=(1, 3, 5, 7),
        default=default.kernel_size,
        help="d in the paper, of the cheap filters",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("backbone", "neck", "head"),
        default=default.parts,
        help="parts of a detector to ghost",
    )
    parser.add_argument(
        "--include", nargs="+", default=default.include, metavar="PATTERN", help="names of layers to replace"
    )
    parser.add_argument(
        "--exclude", nargs="*", default=default.exclude, metavar="PATTERN", help="names of layers to keep"
    )
    parser.add_argument(
        "--min-channels",
        type=int,
        default=default.min_channels,
        help="keep layers with fewer channels",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_force()
    args = parser.parse(arguments)
    args.network = existing_or_shipped(args.network)
    if args.network.endswith((".pt", ".pth", *SUFFIXES)):
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

    from detection.ghost.ghostify_network import ghostify_network

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
