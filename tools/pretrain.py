"""Pre-train a backbone by classification, on class folders or CIFAR-10."""

from detection.cli.pretrain import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
