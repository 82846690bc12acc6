// Detect objects in an image with an exported file: onnxruntime-node, and a canvas that decodes the image.
//
//     npm install && node detect.js detector.onnx photo.jpg

import { readFile } from "node:fs/promises";
import { createCanvas, loadImage } from "@napi-rs/canvas";
import * as ort from "onnxruntime-node";
import { detect, load } from "../web/detector.js";

const [model, file] = process.argv.slice(2);
if (!file) {
  console.error("usage: node detect.js detector.onnx photo.jpg");
  process.exit(2);
}
try {
  const detector = await load(ort, await readFile(model));
  const image = await loadImage(file);
  const context = createCanvas(image.width, image.height).getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, image.width, image.height);
  const boxes = await detect(ort, detector, pixels);
  for (const found of boxes) console.log(JSON.stringify(found));
  if (!boxes.length) console.error("nothing found that scores above 0.3");
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exit(1);
}
