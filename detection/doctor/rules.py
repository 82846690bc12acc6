# ruff: noqa: E501 – one long line is easier to read than a wrapped string
"""The rules that the doctor checks: severity, title and remedy of each finding code. docs/doctor.md has the same table."""

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Rule(NamedTuple):
    """One rule. `title` follows the count of a finding, as in "3 truncated images"; `remedy` tells the user what to do."""

    severity: Severity
    title: str
    remedy: str


# An error stops training, or makes training or evaluation use wrong data. A warning lowers accuracy or causes problems in
# other programs. A note is information; many good datasets have some.
RULES: dict[str, Rule] = {
    # ---- structure of the file
    "no-images": Rule("error", "images in the file", "pass the file that lists the images"),
    "no-boxes": Rule(
        "error", "boxes to train on", "pass the annotated file; a detector cannot be trained without boxes"
    ),
    "no-categories": Rule(
        "error", "categories in the file", "list the classes under 'categories', each with id and name"
    ),
    "entry-broken": Rule("error", "entries without required keys", "complete or remove them; --fix removes them"),
    "file-broken": Rule("error", "annotation files that cannot be read", "repair or remove them"),
    "id-text": Rule("error", "ids that are not integers", 'write ids as numbers (1, not "1"); --fix converts them'),
    "image-id-twice": Rule(
        "error",
        "image ids used by several images",
        "give each image its own id; --fix removes these images if it cannot tell which boxes belong to which",
    ),
    "image-listed-twice": Rule(
        "error",
        "image files listed more than once",
        "list each file once, with all its boxes; --fix merges the entries",
    ),
    "category-id-twice": Rule(
        "error",
        "category ids used by several classes",
        "give each class its own id, and correct the category_id of its boxes by hand",
    ),
    "class-name-twice": Rule("error", "class names used by several ids", "merge them into one id; --fix merges them"),
    "class-names-alike": Rule(
        "warning",
        "class names that differ only in case, spaces or punctuation",
        "if they mean the same class, merge them (data.classes in a config, or in the file)",
    ),
    "annotation-ids": Rule(
        "warning",
        "annotation ids that are missing, below 1 or repeated",
        "renumber them: pycocotools drops such annotations; --fix renumbers them",
    ),
    "image-outside": Rule(
        "error",
        "image file names that point outside the image folder",
        "move the images into the folder, or pass a folder that contains all of them; --fix removes them (not opened here)",
    ),
    "image-unknown": Rule(
        "error",
        "annotations of images that the file does not list",
        "add the images or remove the annotations; --fix removes them",
    ),
    "category-unknown": Rule(
        "error",
        "annotations of categories that the file does not list",
        "add the categories or remove the annotations; --fix removes them",
    ),
    "size-missing": Rule("error", "images without width and height", "add them; --fix reads them from the image files"),
    "area-missing": Rule("note", "annotations without area", "width x height is used; --fix adds it"),
    "crowd-missing": Rule("note", "annotations without iscrowd", "0 is used; --fix adds it"),
    "area-wrong": Rule(
        "warning",
        "areas that are not positive, or larger than their box",
        "correct them: AP for small, medium and large objects uses the area; --fix writes width x height",
    ),
    # ---- images
    "image-missing": Rule(
        "error",
        "missing image files",
        "copy the files, correct --images, or use --fix, which removes the images from the annotations",
    ),
    "image-unreadable": Rule(
        "error",
        "files that are not images, or in a format that OpenCV cannot read",
        "convert or replace them; --fix removes them",
    ),
    "image-truncated": Rule("error", "truncated images", "copy or download them again; --fix removes them"),
    "image-damaged": Rule("error", "images with corrupt data", "copy or download them again; --fix removes them"),
    "image-size": Rule(
        "error",
        "images whose size differs from the annotated size",
        "correct width and height, and scale the boxes if the image was resized; --fix does both if the boxes determine the size",
    ),
    "exif-at-odds": Rule(
        "warning",
        "images with an EXIF rotation that the annotations ignore",
        "remove the EXIF tag (jpegtran -copy none): this toolkit reads these images unrotated, as annotated, but viewers and other programs rotate them",
    ),
    "exif-turned": Rule(
        "note",
        "images with an EXIF rotation",
        "the boxes match the rotated image; programs that ignore the tag see it unrotated",
    ),
    "image-extension": Rule(
        "warning",
        "images whose file extension does not match their format",
        "rename them: this toolkit detects the format from the content, other programs may not",
    ),
    "image-grey": Rule("note", "grayscale images", "they are read as RGB with three equal channels"),
    "image-alpha": Rule(
        "warning",
        "images with transparent pixels",
        "save them on an opaque background: the alpha channel is dropped, and the hidden color (often black) becomes visible",
    ),
    "image-cmyk": Rule("warning", "CMYK images", "save them as RGB: programs convert CMYK to different colors"),
    "image-16bit": Rule(
        "warning",
        "images with more than 8 bits per channel",
        "convert them to 8 bits with the contrast that you want: only the upper 8 bits are read, which makes 12-bit images almost black",
    ),
    "image-frames": Rule("note", "files with several frames or pages", "only the first one is read"),
    "image-blank": Rule(
        "warning", "images of a single color", "inspect them: a camera or a conversion may have failed"
    ),
    "image-huge": Rule(
        "warning",
        "images of more than 100 megapixels",
        "cut them into tiles: they take seconds to read, and their objects become tiny at the network input (not decoded here)",
    ),
    "image-refused": Rule(
        "error",
        "images above the pixel limit",
        "cut them into tiles, or raise GHOSTNET_MAX_IMAGE_PIXELS; --fix removes them",
    ),
    "image-unlisted": Rule(
        "note",
        "images in the folder that no annotation file lists",
        "if you want to use them, add annotations for them",
    ),
    # ---- boxes
    "box-not-numbers": Rule(
        "error",
        "boxes that are not four finite numbers",
        "write [x, y, width, height] in pixels; --fix uses the bounds of the polygon, or removes the annotation",
    ),
    "box-xyxy": Rule(
        "error",
        "boxes that look like x1, y1, x2, y2",
        "COCO uses x, y, width, height; --fix converts them if all boxes have this format",
    ),
    "box-centre": Rule(
        "error",
        "boxes that look like center x, center y, width, height",
        "COCO uses the top left corner; --fix converts them if all boxes have this format",
    ),
    "box-fractions": Rule(
        "error", "boxes that look normalized to 0…1", "COCO uses pixels; --fix multiplies them by the image size"
    ),
    "box-outside": Rule("error", "boxes outside their image", "correct or remove them; --fix removes them"),
    "box-degenerate": Rule(
        "error", "boxes with zero or negative width or height", "correct or remove them; --fix removes them"
    ),
    "box-tiny": Rule(
        "warning",
        "boxes with less than one pixel inside the image",
        "remove them: training drops them, evaluation counts them as missed; --fix removes them",
    ),
    "box-beyond": Rule(
        "warning",
        "boxes that extend beyond their image",
        "clip them: training clips them, evaluation does not; --fix clips them",
    ),
    "box-beyond-slightly": Rule(
        "note", "boxes that extend a pixel or two beyond their image", "training clips them; --fix clips them"
    ),
    "box-twice": Rule(
        "warning",
        "duplicate boxes",
        "remove the copies: a detector finds one box, and the copy counts as missed; --fix removes them",
    ),
    "box-two-classes": Rule(
        "note", "identical boxes with two classes", "if the object belongs to one class only, remove the other box"
    ),
    "box-aspect": Rule(
        "note",
        "boxes with an aspect ratio above 20",
        "inspect them: they may be annotation mistakes, and no anchor matches such boxes well",
    ),
    "crowd-unflagged": Rule(
        "warning",
        "boxes around several boxes of their class, without iscrowd",
        "inspect them: a box around a group of objects needs iscrowd 1, so that training and evaluation ignore it",
    ),
    # ---- classes
    "class-unused": Rule("note", "classes without boxes", "remove them, unless you will add boxes later"),
    "class-few": Rule(
        "warning",
        "classes with fewer than 20 boxes to train on",
        "collect more, merge them with other classes, or expect an AP near 0",
    ),
    "class-imbalance": Rule(
        "note",
        "times as many boxes of the most frequent class as of the rarest one",
        "check the AP of each class: the mean hides rare classes",
    ),
    "class-complete-nowhere": Rule(
        "error",
        "classes for which no set of data.train is complete",
        "name them in complete_classes of the sets in which every object of theirs has a box, or leave them out with data.classes: without background no detector learns a class",
    ),
    "class-only-val": Rule(
        "warning", "classes with boxes in val but none in train", "move some of their images to train, or remove them"
    ),
    "class-only-train": Rule("note", "classes with boxes in train but none in val", "they have no AP"),
    "class-id-gaps": Rule(
        "note",
        "unused ids between the smallest and the largest category id",
        "no action needed: ids are mapped to the labels 1, 2, 3, … in ascending order",
    ),
    "classes-differ": Rule("error", "categories that differ between train and val", "use the same categories in both"),
    "image-without-boxes": Rule(
        "note", "images without boxes", "they are background examples; check that they really contain no objects"
    ),
    # ---- duplicate images
    "image-twice": Rule(
        "warning",
        "exact copies of other images",
        "keep one of them, with all its boxes; --fix removes copies that have the same boxes",
    ),
    "image-alike": Rule(
        "note",
        "near-duplicates of other images",
        "if they are frames of one video, put each group into the same split",
    ),
    "leak-same": Rule(
        "error",
        "images of val that are also in train",
        "remove them from train, else the AP is too high; --fix removes them",
    ),
    "leak-alike": Rule(
        "warning",
        "images of val with a near-duplicate in train",
        "inspect them; split by scene or video, not by image",
    ),
    # ---- anchors, input size and memory
    "anchors-miss": Rule(
        "warning",
        "boxes that no anchor matches with IoU 0.5",
        "change model.anchor_sizes or the input size; the section on anchors compares them",
    ),
    "boxes-small": Rule(
        "warning",
        "boxes with a side below 8 pixels at the network input",
        "raise data.short_side and data.long_side, or cut the images into tiles",
    ),
    "memory-high": Rule(
        "warning",
        "GB needed for a training step, more than is free",
        "lower data.batch_size and raise train.accumulate, or lower data.short_side",
    ),
}
