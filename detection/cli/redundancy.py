"""Find feature maps of a layer that are nearly filtered copies of others, the redundancy that ghost modules use."""

from collections.abc import Sequence

from detection.cli.arguments import ToolParser, existing_source, existing_weights
from detection.core.extras import require_for_backbone

EXAMPLE = """\
examples:
  python tools/redundancy.py timm/tf_efficientnet_lite0 --weights efficientnet-lite0.pth --images photo.jpg
  python tools/redundancy.py resnet50 --list                               (names for --layer)
  python tools/redundancy.py resnet50 --weights resnet50.pth --layer layer1.1 --images photos/ --count 16
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("redundancy", __doc__, EXAMPLE)
    parser.add_argument("network", help="name of a backbone")
    parser.add_argument("--width", type=float, default=1.0, help="width of the backbone")
    parser.add_argument(
        "--weights", metavar="FILE", type=existing_weights, help="weights, as model.backbone.weights (default: random)"
    )
    parser.add_argument("--layer", help="name of a module (default: one in the first block at stride 4)")
    parser.add_argument("--list", action="store_true", help="list the layers and exit")
    parser.add_argument("--images", nargs="+", metavar="SOURCE", type=existing_source, help="images, folders or globs")
    parser.add_argument("--count", type=int, metavar="N", default=8, help="use at most N images")
    parser.add_argument("--size", type=int, default=224, help="side of the input in pixels")
    parser.add_argument(
        "--kernel-sizes",
        nargs="+",
        type=int,
        default=[1, 3, 5, 7],
        metavar="D",
        help="sizes of the filters that are fitted",
    )
    parser.add_argument(
        "--rank-by", type=int, metavar="D", help="size of the filter that pairs are ordered by (default: 3)"
    )
    parser.add_argument("--pairs", type=int, default=6, help="pairs printed and drawn")
    parser.add_argument("--out", default="redundancy", help="folder for image and CSV")
    parser.add_force()
    args = parser.parse(arguments)
    require_for_backbone(args.network, args.weights)
    if min(args.count, args.pairs) < 1 or args.size < 32:
        parser.error("--count and --pairs must be at least 1, --size at least 32")
    if not args.list and not args.images:
        parser.error("--images (or --list) is needed")

    from detection.ghost.redundancy_report import list_layers_table, redundancy_report

    if args.list:
        print(list_layers_table(args.network, width=args.width, size=args.size))
        return 0
    print(
        redundancy_report(
            args.network,
            args.images,
            width=args.width,
            weights=args.weights,
            layer=args.layer,
            kernel_sizes=args.kernel_sizes,
            ranked_by=args.rank_by,
            size=args.size,
            count=args.count,
            pairs=args.pairs,
            out=args.out,
            force=args.force,
        )
    )
    return 0
