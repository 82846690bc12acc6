"""Write the demo dataset: drawn Halloween scenes in COCO format."""

from detection.cli.make_demo_data import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
