"""Evaluate a checkpoint, an exported file or a COCO results file with pycocotools."""

from detection.cli.evaluate import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
