// The page: detects in an image or in camera frames; shows boxes on a canvas, a table, and a JSON file.
// The detector is ?model=FILE, by default detector.onnx beside the page, or one that the user chooses.

import * as ort from "./ort/ort.wasm.min.mjs";
import { detect, load } from "./detector.js";

const element = (id) => document.getElementById(id);
const canvas = element("canvas");
const context = canvas.getContext("2d", { willReadFrequently: true });

let detector = null;
let shown = null; // {image, name, found}: RGBA without boxes, and all detections in it
let camera = null; // the MediaStream while it runs
let running = Promise.resolve(); // a session takes one image at a time

function say(id, text, failed = false) {
  element(id).textContent = text;
  element(id).classList.toggle("error", failed);
}

async function useModel(name, bytes) {
  say("model", `Loading ${name} …`);
  detector = null;
  try {
    detector = await load(ort, bytes);
    const { names, short_side, long_side, score_threshold } = detector.meta;
    const some = names.slice(0, 8).join(", ") + (names.length > 8 ? ", …" : "");
    const sides = `images scaled to ${short_side} px, the long side to at most ${long_side}`;
    say("model", `${name}: ${names.length} classes (${some}); ${sides}; scores above ${score_threshold}`);
  } catch (error) {
    say("model", `${name} cannot be used: ${error.message}`, true);
  }
  element("image-file").disabled = element("camera").disabled = detector === null;
  if (shown) await detectShown();
}

async function useImage(file) {
  stopCamera();
  let bitmap;
  try {
    // Upright by its EXIF orientation, colours as stored: as OpenCV reads it in Python.
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    say("status", `${file.name} is not an image that this browser can read`, true);
    return;
  }
  shown = { image: pixels(bitmap, bitmap.width, bitmap.height), name: file.name };
  bitmap.close();
  await detectShown();
}

/** Put a bitmap or video frame on the canvas and read it back as RGBA. */
function pixels(source, width, height) {
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  context.drawImage(source, 0, 0);
  element("drop").classList.add("full");
  return context.getImageData(0, 0, width, height);
}

async function detectShown() {
  if (!detector) return;
  const current = shown;
  running = running.then(async () => {
    const start = performance.now();
    try {
      current.found = await detect(ort, detector, current.image, 0);
      current.milliseconds = Math.round(performance.now() - start);
    } catch (error) {
      say("status", `${current.name}: ${error.message}`, true);
    }
  });
  await running;
  if (current === shown && current.found) show();
}

/** Draw and list detections with scores above the threshold. */
function show() {
  const { image, name, found: all, milliseconds } = shown;
  const found = all.filter(({ score }) => score > Number(element("threshold").value));
  context.putImageData(image, 0, 0);
  draw(found);
  list(found);
  say("status", `${name}: ${found.length} objects in ${milliseconds} ms`);
  offer({ image: name, width: image.width, height: image.height, detections: found });
}

function draw(found) {
  const size = Math.max(canvas.width, canvas.height);
  context.lineWidth = Math.max(1, size / 400);
  context.font = `${Math.max(10, size / 50)}px system-ui, sans-serif`;
  context.textBaseline = "top";
  // The best one last, on top.
  for (const { box: [x1, y1, x2, y2], label, name, score } of found.toReversed()) {
    const color = `hsl(${(label * 222.5) % 360} 85% 50%)`;
    context.strokeStyle = color;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    const text = `${name} ${score.toFixed(2)}`;
    const height = Math.max(10, size / 50) * 1.2;
    const top = y1 >= height ? y1 - height : y1;
    context.fillStyle = color;
    context.fillRect(x1, top, context.measureText(text).width + 4, height);
    context.fillStyle = "white";
    context.fillText(text, x1 + 2, top + height * 0.1);
  }
}

function list(found) {
  const rows = found.map(({ box, name, score }) => {
    const row = document.createElement("tr");
    for (const text of [name, score.toFixed(3), ...box.map((value) => value.toFixed(1))]) {
      row.insertCell().textContent = text;
    }
    return row;
  });
  element("rows").replaceChildren(...rows);
}

/** A link that saves the detections, in the form in which tools/detect.py writes them. */
function offer(record) {
  const link = element("save");
  URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(new Blob([JSON.stringify(record, null, 1)], { type: "application/json" }));
  link.download = `${record.image.replace(/\.[^.]*$/, "")}.json`;
  link.hidden = false;
}

async function startCamera() {
  try {
    camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    say("status", `The camera cannot be used: ${error.message}`, true);
    return;
  }
  const stream = camera;
  const video = document.createElement("video");
  Object.assign(video, { srcObject: stream, muted: true, playsInline: true });
  await video.play();
  element("camera").textContent = "Stop camera";
  while (camera === stream) {
    shown = { image: pixels(video, video.videoWidth, video.videoHeight), name: "camera" };
    await detectShown();
    await new Promise(requestAnimationFrame);
  }
}

function stopCamera() {
  camera?.getTracks().forEach((track) => track.stop());
  camera = null;
  element("camera").textContent = "Start camera";
}

element("camera").addEventListener("click", () => (camera ? stopCamera() : startCamera()));
element("threshold").addEventListener("input", ({ target }) => {
  element("threshold-value").textContent = Number(target.value).toFixed(2);
  if (shown?.found) show();
});
element("model-file").addEventListener("change", async ({ target: { files } }) => {
  if (files.length) await useModel(files[0].name, new Uint8Array(await files[0].arrayBuffer()));
});
element("image-file").addEventListener("change", ({ target: { files } }) => files.length && useImage(files[0]));
const drop = element("drop");
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragenter" || name === "dragover");
    const [file] = event.dataTransfer.files;
    if (name === "drop" && file) useImage(file);
  });
}

const url = new URLSearchParams(location.search).get("model") ?? "detector.onnx";
const answer = await fetch(url);
if (answer.ok) await useModel(url, new Uint8Array(await answer.arrayBuffer()));
else say("model", `${url} is not here: put it beside this page, or choose a file`, true);
