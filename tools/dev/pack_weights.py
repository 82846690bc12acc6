"""Write the weights of a trained detector for distribution, and into the file what it was measured to be."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from detection.benchmark.detector_cost import detector_total
from detection.checkpoint import classes_of, config_of, read_checkpoint
from detection.cli.arguments import ToolParser, existing_file
from detection.cli.run_tool import run_tool
from detection.core.errors import UserError
from detection.evaluation.score import score_checkpoint
from detection.models.build import build_model
from detection.weights_file import write_weights_file

EXAMPLE = """\
example:
  python tools/dev/pack_weights.py runs/zoo/small/best.pt detection/zoo/weights/ghostdet_small.safetensors \\
      --data person/val=data/person/val.json coco128/val=data/coco128/val.json
"""


def pack_weights(checkpoint: str, out: Path, data: dict[str, str]) -> str:
    """Write OUT with half-precision weights, evaluate that file, and write the numbers into it.

    Args:
        data: name -> COCO file of each evaluation.

    Raises:
        UserError: the checkpoint or the data cannot be read; a weight is too large for half precision.
    """
    content = read_checkpoint(checkpoint)
    config = config_of(content, checkpoint)
    # The file stands alone: it names no weights that it was trained from.
    config.model.weights = config.model.backbone.weights = None
    content = {**content, "config": config.model_dump()}
    size = max(config.data.short_side, config.data.long_side)
    model = build_model(config, len(classes_of(content, checkpoint).names)).eval()
    cost = detector_total(model, (size, size))
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / out.name
        write_weights_file(trial, content)
        evaluations: dict[str, dict[str, float | None]] = {}
        for name, annotations in data.items():
            found = score_checkpoint(
                trial, annotations=annotations, predictions_file=str(Path(folder) / f"{len(evaluations)}.json")
            )
            assert found is not None  # of one process
            evaluations[name] = {key: found.to_json()[key] for key in ("AP", "AP50", "AP75")}
    first = next(iter(evaluations.values()), {"AP": None, "AP50": None})
    numbers = {
        **first,
        "evaluations": evaluations,
        "size": size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiply_adds": cost.macs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_weights_file(out, {**content, "numbers": numbers})
    return f"{out}: {out.stat().st_size / 1e6:.2f} MB\n{json.dumps(numbers, indent=2)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ToolParser("dev/pack_weights", __doc__, EXAMPLE)
    parser.add_argument("checkpoint", type=existing_file)
    parser.add_argument("out", type=Path, help=".safetensors file")
    parser.add_argument("--data", nargs="+", metavar="NAME=FILE", default=[], help="COCO files to evaluate on")
    args = parser.parse(arguments)
    if args.out.suffix != ".safetensors":
        raise UserError(f"{args.out}: expected: a name that ends in .safetensors")
    data = dict(text.partition("=")[::2] for text in args.data)
    for annotations in data.values():
        existing_file(annotations)
    print(pack_weights(args.checkpoint, args.out, data))


if __name__ == "__main__":
    run_tool(main)
