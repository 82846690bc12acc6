"""Cut objects out of COCO datasets into class folders for pre-training; train and val share no image."""

from detection.cli.make_crops import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
