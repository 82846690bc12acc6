"""Show training batches after augmentation with their boxes, and what a checkpoint detects in them."""

from detection.cli.browse import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
