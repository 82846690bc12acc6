// Detect objects in a picture with an exported file: onnxruntime-node, and a canvas that decodes the picture.
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
  const picture = await loadImage(file);
  const context = createCanvas(picture.width, picture.height).getContext("2d");
  context.drawImage(picture, 0, 0);
  const image = context.getImageData(0, 0, picture.width, picture.height);
  const boxes = await detect(ort, detector, image);
  for (const found of boxes) console.log(JSON.stringify(found));
  if (!boxes.length) console.error("nothing found that scores above 0.3");
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exit(1);
}
