"""A small dataset without faults, functions that add one fault each (`FAULTS`), and the codes found in a report."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

Content = dict
WIDTH, HEIGHT = 96, 72


def write_clean_dataset(folder: Path, *, images: int = 12, seed: int = 0, name: str = "set") -> Path:
    """Write images/ and NAME.json: a COCO dataset of different images with two boxes of each of two classes."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    content: Content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    for i in range(images):
        coarse = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        file_name = f"{name} {i:02d}.jpg"
        cv2.imwrite(str(folder / "images" / file_name), image)
        content["images"].append({"id": i + 1, "file_name": file_name, "width": WIDTH, "height": HEIGHT})
        for k in range(4):
            x, y = 6 + 22 * k + int(rng.integers(0, 6)), int(rng.integers(0, 40))
            w, h = int(rng.integers(12, 18)), int(rng.integers(12, 28))
            number = len(content["annotations"]) + 1
            content["annotations"].append(
                {
                    "id": number,
                    "image_id": i + 1,
                    "category_id": 1 + k % 2,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


def apply_fault(path: Path, fault: Callable[[Content, Path], None]) -> Path:
    """Change a dataset with a function that takes the content of its JSON file and its image folder."""
    content = json.loads(path.read_text())
    fault(content, path.parent / "images")
    path.write_text(json.dumps(content))
    return path


def errors_and_warnings(report) -> set[str]:
    return {found.code for found in report.findings if found.severity != "note"}


def all_codes(report) -> set[str]:
    return {found.code for found in report.findings}


def _image(folder: Path, number: int = 3) -> Path:
    return folder / f"set {number:02d}.jpg"


def _annotation(number: int = 10, **fields):
    def fault(content, folder):
        content["annotations"][number].update(fields)

    return fault


def _without(key: str, kind: str = "annotations", number: int = 10):
    def fault(content, folder):
        del content[kind][number][key]

    return fault


def _all_boxes(change):
    def fault(content, folder):
        for annotation in content["annotations"]:
            annotation["bbox"] = change(*annotation["bbox"])

    return fault


def _append(kind: str, **fields):
    def fault(content, folder):
        content[kind].append({**content[kind][0], **fields})

    return fault


def _save(**options):
    """Save image 3 again with Pillow, after converting it to the mode `convert`; options as for Image.save."""
    mode = options.pop("convert", None)

    def fault(content, folder):
        path = _image(folder)
        image = Image.open(path).copy()
        (image.convert(mode) if mode else image).save(path, **options)

    return fault


def _bytes(change):
    def fault(content, folder):
        path = _image(folder)
        path.write_bytes(change(path.read_bytes()))

    return fault


def _rename(to: str):
    def fault(content, folder):
        _image(folder).rename(folder / to)

    return fault


def _named(to: str, **options):
    """`_save`, then rename the file, also in the annotations."""
    save = _save(**options)

    def fault(content, folder):
        save(content, folder)
        _rename(to)(content, folder)
        content["images"][3]["file_name"] = to

    return fault


def _exif(orientation: int, width: int, height: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save = _save(exif=exif)

    def fault(content, folder):
        save(content, folder)
        content["images"][3].update(width=width, height=height)
        # Boxes inside the image with and without rotation.
        for annotation in content["annotations"][12:16]:
            annotation.update(bbox=[2 + annotation["id"] % 7, 3, 40, 30], area=1200)
            annotation["bbox"][1] += 2 * (annotation["id"] - 12)

    return fault


def _transparent(content, folder):
    path = _image(folder)
    image = Image.open(path).convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.arange(WIDTH, dtype=np.uint8), (HEIGHT, 1))))
    path.unlink()
    image.save(folder / "clear.png")
    content["images"][3]["file_name"] = "clear.png"


def _sixteen_bits(content, folder):
    grey = cv2.imread(str(_image(folder)), cv2.IMREAD_GRAYSCALE)
    _image(folder).unlink()
    cv2.imwrite(str(folder / "deep.png"), grey.astype(np.uint16) * 16)
    content["images"][3]["file_name"] = "deep.png"


def _deep_color(content, folder):
    image = cv2.imread(str(_image(folder)))
    _image(folder).unlink()
    cv2.imwrite(str(folder / "deep.png"), image.astype(np.uint16) * 200)
    content["images"][3]["file_name"] = "deep.png"


def _blank(content, folder):
    cv2.imwrite(str(_image(folder)), np.full((HEIGHT, WIDTH, 3), 90, np.uint8))


def _damaged_png(content, folder):
    image = cv2.imread(str(_image(folder)))
    _image(folder).unlink()
    path = folder / "bad.png"
    cv2.imwrite(str(path), image)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    path.write_bytes(data)
    content["images"][3]["file_name"] = "bad.png"


def _copy_of_an_image(content, folder):
    shutil.copy(_image(folder, 2), _image(folder, 3))


def _resaved(content, folder):
    small = cv2.resize(cv2.imread(str(_image(folder, 2))), (WIDTH // 2, HEIGHT // 2), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(_image(folder, 3)), small, [cv2.IMWRITE_JPEG_QUALITY, 80])
    content["images"][3].update(width=WIDTH // 2, height=HEIGHT // 2)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 4]


def _region(content, folder):
    own = content["annotations"][12:16]
    for i, annotation in enumerate(own):
        annotation.update(bbox=[5 + 20 * i, 10, 14, 14], area=196, category_id=1)
    content["annotations"] += [
        {**own[0], "id": 901, "bbox": [8, 40, 14, 14]},
        {**own[0], "id": 902, "bbox": [1, 1, 94, 70], "area": 94 * 70},
    ]


def _few(content, folder):
    content["categories"].append({"id": 3, "name": "fox"})
    content["annotations"][5]["category_id"] = 3


def _empty(content, folder):
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 4]


def _nothing(content, folder):
    content["annotations"] = []


def _listed_twice(content, folder):
    content["images"].append({**content["images"][3], "id": 77})


def _id_of_two(content, folder):
    content["images"][3]["id"] = content["images"][2]["id"]


FAULTS: dict[str, tuple[Callable, set[str]]] = {
    # code (and a variant) -> function that adds the fault, and all errors and warnings that it causes
    "entry-broken": (_without("category_id"), {"entry-broken"}),
    "entry-broken image": (_without("file_name", "images", 3), {"entry-broken", "image-unknown"}),
    "entry-broken list": (lambda c, f: c["annotations"].append([1, 2]), {"entry-broken"}),
    "id-text": (_annotation(image_id="3"), {"id-text"}),
    "image-id-twice": (_id_of_two, {"image-id-twice", "image-unknown"}),
    "image-listed-twice": (_listed_twice, {"image-listed-twice"}),
    "category-id-twice": (_append("categories", name="cow"), {"category-id-twice"}),
    "class-name-twice": (_append("categories", id=9), {"class-name-twice"}),
    "class-names-alike": (_append("categories", id=9, name="Cat "), {"class-names-alike"}),
    "annotation-ids": (_annotation(id=3), {"annotation-ids"}),
    "annotation-ids zero": (_annotation(id=0), {"annotation-ids"}),
    "image-unknown": (_annotation(image_id=99), {"image-unknown"}),
    "category-unknown": (_annotation(category_id=99), {"category-unknown"}),
    "size-missing": (_without("width", "images", 3), {"size-missing"}),
    "area-missing": (_without("area"), set()),
    "crowd-missing": (_without("iscrowd"), set()),
    "area-wrong": (_annotation(area=99999), {"area-wrong"}),
    "image-outside": (lambda c, f: c["images"][3].update(file_name="../../passwd.jpg"), {"image-outside"}),
    "image-missing": (lambda c, f: _image(f).unlink(), {"image-missing"}),
    "image-missing renamed": (_rename("SET 03.JPG"), {"image-missing"}),
    "image-unreadable": (_bytes(lambda data: b"<html>404 not found</html>"), {"image-unreadable"}),
    "image-unreadable empty": (_bytes(lambda data: b""), {"image-unreadable"}),
    "image-unreadable lfs": (_bytes(lambda data: b"version https://git-lfs.x/v1\n"), {"image-unreadable"}),
    "image-truncated": (_bytes(lambda data: data[: len(data) * 2 // 3]), {"image-truncated"}),
    # With an end marker after the remaining data, as left by an embedded thumbnail.
    "image-truncated marked": (_bytes(lambda data: data[: len(data) // 2] + b"\xff\xd9"), {"image-truncated"}),
    "image-damaged": (_bytes(lambda data: data[:-500] + bytes(60) + data[-440:]), {"image-damaged"}),
    "image-damaged png": (_damaged_png, {"image-damaged"}),
    "image-size": (lambda c, f: c["images"][3].update(width=200, height=100), {"image-size"}),
    "exif-at-odds": (_exif(6, WIDTH, HEIGHT), {"exif-at-odds"}),
    "exif-turned": (_exif(6, HEIGHT, WIDTH), set()),
    "image-extension": (_save(format="PNG"), {"image-extension"}),
    "image-grey": (_save(convert="L"), set()),
    "image-alpha": (_transparent, {"image-alpha"}),
    "image-cmyk": (_save(convert="CMYK"), {"image-cmyk"}),
    "image-16bit": (_sixteen_bits, {"image-16bit"}),
    "image-16bit color": (_deep_color, {"image-16bit"}),
    "image-frames": (_named("two.tif", save_all=True, format="TIFF", append_images=[Image.new("RGB", (8, 8))]), set()),
    "image-blank": (_blank, {"image-blank"}),
    "box-not-numbers": (_annotation(bbox=[1, 2, 3]), {"box-not-numbers"}),
    "box-not-numbers nan": (_annotation(bbox=[1, 2, 3, float("nan")]), {"box-not-numbers"}),
    "box-not-numbers null": (_annotation(bbox=None), {"box-not-numbers"}),
    "box-xyxy": (_all_boxes(lambda x, y, w, h: [x, y, x + w, y + h]), {"box-xyxy"}),
    "box-centre": (_all_boxes(lambda x, y, w, h: [x + w / 2, y + h / 2, w, h]), {"box-centre"}),
    "box-fractions": (_all_boxes(lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]), {"box-fractions"}),
    "box-outside": (_annotation(bbox=[200, 10, 20, 20], area=400), {"box-outside"}),
    "box-degenerate": (_annotation(bbox=[20, 10, 0, 20], area=1), {"box-degenerate"}),
    "box-degenerate negative": (_annotation(bbox=[20, 10, 10, -20], area=200), {"box-degenerate"}),
    "box-tiny": (_annotation(bbox=[20, 10, 0.4, 20], area=8), {"box-tiny"}),
    "box-beyond": (_annotation(bbox=[80, 10, 30, 20], area=600), {"box-beyond"}),
    "box-beyond-slightly": (_annotation(bbox=[80, 10, 17, 20], area=340), set()),
    "box-twice": (_append("annotations", id=999), {"box-twice"}),
    "box-two-classes": (_append("annotations", id=999, category_id=2), set()),
    "box-aspect": (_annotation(bbox=[1, 10, 90, 3], area=270), set()),
    "crowd-unflagged": (_region, {"crowd-unflagged"}),
    "class-unused": (_append("categories", id=9, name="cow"), set()),
    "class-few": (_few, {"class-few"}),
    "class-id-gaps": (_append("categories", id=9, name="cow"), set()),
    "image-without-boxes": (_empty, set()),
    "no-boxes": (_nothing, {"no-boxes"}),
    "image-twice": (_copy_of_an_image, {"image-twice"}),
    "image-alike": (_resaved, set()),
}  # fmt: skip
