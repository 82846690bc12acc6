# ruff: noqa: E501 – one line a kind reads better than four
"""The table of all kinds of findings: severity, title and remedy of each code (docs/doctor.md explains them)."""

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Kind(NamedTuple):
    """What a code stands for: `title` follows the count, as in "3 images that end early"."""

    severity: Severity
    title: str
    remedy: str


# Errors stop a training, or make it learn or be scored by what is wrong. Warnings cost accuracy, or bite other programs.
# Notes are for information: many good sets have them.
KINDS: dict[str, Kind] = {
    # ---- the file's structure
    "no-images": Kind("error", "images in the file", "give the file that lists the images"),
    "no-boxes": Kind(
        "error", "boxes to learn from in the set", "give the annotated file; without boxes nothing is learnt"
    ),
    "no-categories": Kind(
        "error", "categories in the file", "list the classes under 'categories', each with id and name"
    ),
    "entry-broken": Kind("error", "entries that lack what they need", "complete or remove them; --fix removes them"),
    "file-broken": Kind("error", "annotation files that cannot be read", "mend or remove them"),
    "id-text": Kind("error", "ids that are no whole numbers", 'write ids as numbers (1, not "1"); --fix does'),
    "image-id-twice": Kind(
        "error",
        "image ids that stand for several images",
        "give each image its own id; --fix removes such images where it cannot tell whose the boxes are",
    ),
    "image-listed-twice": Kind(
        "error", "files that are listed as several images", "list each once, with all its boxes; --fix merges them"
    ),
    "category-id-twice": Kind(
        "error",
        "category ids that stand for several classes",
        "give each class its own id; what the boxes meant only you can tell",
    ),
    "class-name-twice": Kind("error", "class names that several ids have", "merge them into one id; --fix does"),
    "class-names-alike": Kind(
        "warning",
        "class names that differ in case, blanks or signs alone",
        "if they mean the same, merge them (data.classes in a config, or in the file)",
    ),
    "annotation-ids": Kind(
        "warning",
        "annotation ids that are absent, below 1 or there twice",
        "number them anew; pycocotools loses such annotations; --fix does",
    ),
    "image-outside": Kind(
        "error",
        "images whose names lead out of the images folder",
        "move them into it, or name a folder that holds all; --fix leaves them out (not opened here)",
    ),
    "image-unknown": Kind(
        "error",
        "annotations of images that the file does not list",
        "add the images or remove the annotations; --fix removes them",
    ),
    "category-unknown": Kind(
        "error",
        "annotations of categories that the file does not list",
        "add the category or remove the annotations; --fix removes them",
    ),
    "size-missing": Kind(
        "error", "images without width and height", "write their sizes in; --fix takes them from the images"
    ),
    "area-missing": Kind("note", "annotations without area", "width x height is taken; --fix writes it in"),
    "crowd-missing": Kind("note", "annotations without iscrowd", "0 is taken; --fix writes it in"),
    "area-wrong": Kind(
        "warning",
        "areas that are not above 0, or above their box's",
        "AP of small, medium and large objects goes by area; --fix writes width x height",
    ),
    # ---- images
    "image-missing": Kind(
        "error",
        "images that are not there",
        "copy them there, give the right --images, or --fix, which leaves them out",
    ),
    "image-unreadable": Kind(
        "error",
        "files that are no images, or of a kind that OpenCV cannot read",
        "convert or replace them; --fix leaves them out",
    ),
    "image-truncated": Kind("error", "images that end early", "copy or download them again; --fix leaves them out"),
    "image-damaged": Kind(
        "error", "images that are damaged inside", "copy or download them again; --fix leaves them out"
    ),
    "image-size": Kind(
        "error",
        "images of another size than their annotation says",
        "mend width and height, and scale the boxes where the image was resized; --fix does where it is certain",
    ),
    "exif-at-odds": Kind(
        "warning",
        "images annotated as stored, which their EXIF tag turns",
        "save them without the tag (jpegtran -copy none); this toolkit reads them as annotated, viewers and other programs turn them",
    ),
    "exif-turned": Kind(
        "note",
        "images that an EXIF tag turns",
        "boxes are taken to fit the upright image; programs that ignore the tag see it lying",
    ),
    "image-extension": Kind(
        "warning",
        "images whose name says another format than their content",
        "rename them; this toolkit goes by the content, other programs may not",
    ),
    "image-grey": Kind("note", "grey images", "they are read as RGB with three equal channels"),
    "image-alpha": Kind(
        "warning",
        "images with transparent parts",
        "transparency is dropped and what lies beneath is seen, often black: save them on a background",
    ),
    "image-cmyk": Kind("warning", "CMYK images", "save them as RGB: each program makes other colors of them"),
    "image-16bit": Kind(
        "warning",
        "images of more than 8 bits a channel",
        "save them as 8 bits, stretched as you want it: the upper 8 bits are read, in which 12-bit images are almost black",
    ),
    "image-frames": Kind("note", "files with several frames or pages", "the first one is read"),
    "image-blank": Kind(
        "warning", "images of one color all over", "look at them; a camera or a conversion may have failed"
    ),
    "image-huge": Kind(
        "warning",
        "images of more than 100 megapixels",
        "cut them into tiles: they take seconds each, and shrink to nothing (not decoded here)",
    ),
    "image-refused": Kind(
        "error",
        "images of more pixels than are decoded",
        "cut them into tiles, or set GHOSTNET_MAX_IMAGE_PIXELS; --fix leaves them out",
    ),
    "image-unlisted": Kind(
        "note",
        "images in the folder that no annotation file names",
        "if they were to be used, their annotations are missing",
    ),
    # ---- boxes
    "box-not-numbers": Kind(
        "error",
        "boxes that are not four finite numbers",
        "write [x, y, width, height] in pixels; --fix takes the polygon's bounds, or removes them",
    ),
    "box-xyxy": Kind(
        "error",
        "boxes that look like x1, y1, x2, y2",
        "COCO has x, y, width, height; --fix converts where all boxes are so",
    ),
    "box-centre": Kind(
        "error",
        "boxes that look like centre x, centre y, width, height",
        "COCO has the upper left corner; --fix converts where all boxes are so",
    ),
    "box-fractions": Kind("error", "boxes that look like fractions of the image", "COCO has pixels; --fix converts"),
    "box-outside": Kind("error", "boxes that lie outside of their image", "mend or remove them; --fix removes them"),
    "box-degenerate": Kind("error", "boxes without width or height", "mend or remove them; --fix removes them"),
    "box-tiny": Kind(
        "warning",
        "boxes with less than a pixel within the image",
        "training drops them, evaluation counts them as missed; --fix removes them",
    ),
    "box-beyond": Kind(
        "warning", "boxes that reach beyond their image", "training clips them, evaluation does not; --fix clips them"
    ),
    "box-beyond-slightly": Kind(
        "note", "boxes that reach a pixel or two beyond their image", "clipped in training; --fix clips them"
    ),
    "box-twice": Kind(
        "warning",
        "boxes that are there twice",
        "remove one: a detector finds one and is charged with the other; --fix removes them",
    ),
    "box-two-classes": Kind(
        "note", "boxes that two classes share", "fine where an object is both; else decide for one"
    ),
    "box-aspect": Kind(
        "note",
        "boxes more than 20 times as long as wide",
        "look at them: no anchor fits; slips of the mouse, or truly thin things?",
    ),
    "crowd-unflagged": Kind(
        "warning",
        "boxes around several boxes of their class, without a crowd flag",
        "look at them: a region of many objects should have iscrowd 1, which training leaves out and evaluation does not count as missed",
    ),
    # ---- classes
    "class-unused": Kind("note", "classes without a box", "leave them out, if they are not to come"),
    "class-few": Kind(
        "warning",
        "classes with fewer than 20 boxes to learn from",
        "collect more, merge them with others, or expect an AP near 0",
    ),
    "class-imbalance": Kind(
        "note",
        "times as many boxes has the most frequent class as the rarest one",
        "watch AP per class; the mean hides the rare ones",
    ),
    "class-only-val": Kind(
        "warning", "classes in val that train has no box of", "move some of their images to train, or leave them out"
    ),
    "class-only-train": Kind("note", "classes in train that val has no box of", "they are not scored"),
    "class-id-gaps": Kind(
        "note",
        "ids between the smallest and the largest category id are not used",
        "no harm: labels inside are 1, 2, 3 … in the order of the ids",
    ),
    "classes-differ": Kind(
        "error", "categories that train and val define differently", "use one list of categories for both"
    ),
    "image-without-boxes": Kind(
        "note", "images without boxes", "they teach what is background, if there is truly nothing on them"
    ),
    # ---- the same image twice
    "image-twice": Kind(
        "warning",
        "images that are exact copies of another in the set",
        "keep one, with all its boxes; --fix does where both have the same boxes",
    ),
    "image-alike": Kind(
        "note",
        "images that look like another in the set",
        "frames of a video? keep such groups on one side of a split",
    ),
    "leak-same": Kind(
        "error", "images of val that train has, too", "take them out of train, or the AP says nothing; --fix does"
    ),
    "leak-alike": Kind(
        "warning",
        "images of val that look like one in train",
        "look at them; split by scene or by video, not by image",
    ),
    # ---- what the network can make of them
    "anchors-miss": Kind(
        "warning", "boxes that no anchor matches at IoU 0.5", "see below which anchor_sizes or input size suit better"
    ),
    "boxes-small": Kind(
        "warning",
        "boxes with a side under 8 pixels at the network's input size",
        "raise data.short_side and data.long_side, or cut the images into tiles",
    ),
    "memory-high": Kind(
        "warning",
        "GB for a training step, more than there is",
        "lower data.batch_size and raise train.accumulate, or lower data.short_side",
    ),
}
