"""Label images with a detector: annotate a folder, or add the classes that a data set lacks."""

from detection.cli.label import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
