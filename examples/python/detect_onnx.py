"""Detect objects in an image with an exported file; it needs onnxruntime, numpy and opencv-python-headless alone.

python detect_onnx.py detector.onnx photo.jpg
"""

import json
import sys

import cv2
import numpy as np
import onnxruntime


def load(path):
    """(session, metadata) of a file that tools/export.py wrote."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map.get("ghostnet_detection")
    if text is None or json.loads(text)["form"] != "end_to_end":
        raise ValueError(f"{path} is not a detector written by tools/export.py --form end_to_end")
    return session, json.loads(text)


def detect(session, meta, image, threshold=0.3):
    """RGB uint8 [H, W, 3] -> list of {box: [x1, y1, x2, y2] in its pixels, label, name, score}, best first."""
    height, width = image.shape[:2]
    scale = min(meta["short_side"] / min(height, width), meta["long_side"] / max(height, width))
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    shrinks = h < height or w < width
    image = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    # The image is at the top left of a canvas whose sides are multiples of the stride, or fixed in the file.
    canvas_h, canvas_w = meta["size"] or [-(-side // meta["stride"]) * meta["stride"] for side in (h, w)]
    if h > canvas_h or w > canvas_w:
        raise ValueError(f"an image of {w}x{h} pixels is too large for the file's {canvas_w}x{canvas_h}")
    canvas = np.zeros((meta["batch"] or 1, canvas_h, canvas_w, 3), np.uint8)
    canvas[0, :h, :w] = image
    sizes = np.tile(np.array([[h, w]], np.int64), (len(canvas), 1))
    boxes, labels, scores = session.run(["boxes", "labels", "scores"], {"images": canvas, "sizes": sizes})
    boxes = boxes[0] / np.float32([w / width, h / height] * 2)
    boxes = boxes.clip(0, np.float32([width, height] * 2))
    return [
        {"box": box.tolist(), "label": int(label), "name": meta["names"][label - 1], "score": float(score)}
        for box, label, score in zip(boxes, labels[0], scores[0], strict=True)
        if score > threshold
    ]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    image = cv2.imread(sys.argv[2])
    if image is None:
        sys.exit(f"{sys.argv[2]} is not an image that OpenCV can read")
    try:
        boxes = detect(*load(sys.argv[1]), cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        for found in boxes:
            print(json.dumps(found))
        if not boxes:
            print("nothing found that scores above 0.3", file=sys.stderr)
    except Exception as error:  # ONNX Runtime's errors share no other class
        sys.exit(f"error: {error}")
