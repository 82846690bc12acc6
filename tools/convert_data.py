"""Convert a dataset between COCO, Pascal VOC and YOLO, or split it into train and val without leakage."""

from detection.cli.convert_data import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
