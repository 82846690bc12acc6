"""Write a random annotation file as large as COCO's instances_train2017.json: 118 k images, 860 k boxes."""

from detection.cli.make_coco_like import main
from detection.cli.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
