"""Check a dataset before training: files, images, boxes, classes, splits, anchors."""

from detection.cli.check_data import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
