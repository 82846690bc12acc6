// Detection with a file of tools/export.py, in the browser and in Node.
// `ort` is onnxruntime-web or onnxruntime-node.

const KEY = "ghostnet_detection";

/**
 * A session and the file's metadata.
 * @param {Uint8Array} bytes the .onnx file
 */
export async function load(ort, bytes, options = {}) {
  const meta = readMetadata(bytes);
  if (meta.form !== "end_to_end") {
    throw new Error(`this file gives ${meta.form} outputs; export it with --form end_to_end`);
  }
  return { session: await ort.InferenceSession.create(bytes, options), meta };
}

/**
 * Objects in an image, best first: {box: [x1, y1, x2, y2] in its pixels, label, name, score}.
 * @param {{data: Uint8ClampedArray, width: number, height: number}} image RGBA, as getImageData gives it
 */
export async function detect(ort, { session, meta }, image, threshold = 0.3) {
  const { width, height } = image;
  const [h, w] = resizedShape(image, meta);
  // The image lies at the top left of a canvas whose sides are multiples of the stride, or fixed in the file.
  const [canvasH, canvasW] = meta.size ?? [h, w].map((side) => Math.ceil(side / meta.stride) * meta.stride);
  if (h > canvasH || w > canvasW) throw new Error(`an image of ${w}x${h} pixels is too large for the file's ${canvasW}x${canvasH}`);
  const batch = meta.batch ?? 1;
  const canvases = new Uint8ClampedArray(batch * canvasH * canvasW * 3);
  resizeInto(canvases, canvasW, image, h, w);
  const sizes = BigInt64Array.from(Array(batch).fill([h, w]).flat(), BigInt);
  const outputs = await session.run({
    images: new ort.Tensor("uint8", new Uint8Array(canvases.buffer), [batch, canvasH, canvasW, 3]),
    sizes: new ort.Tensor("int64", sizes, [batch, 2]),
  });
  const [boxes, labels, scores] = ["boxes", "labels", "scores"].map((name) => outputs[name].data);
  const found = [];
  for (let i = 0; i < meta.max_detections && scores[i] > threshold; i++) {
    const box = [w / width, h / height, w / width, h / height].map((factor, k) => boxes[4 * i + k] / factor);
    const label = Number(labels[i]);
    const clipped = box.map((value, k) => Math.min(Math.max(value, 0), k % 2 ? height : width));
    found.push({ box: clipped, label, name: meta.names[label - 1], score: scores[i] });
  }
  return found;
}

/**
 * The metadata that tools/export.py wrote into the file. onnxruntime's JavaScript API cannot read a model's own metadata
 * (github.com/microsoft/onnxruntime/issues/16547), but they are in field 14 (metadata_props) of an ONNX file, a
 * protobuf message, as pairs of key (field 1) and value (field 2).
 */
export function readMetadata(bytes) {
  const text = new TextDecoder();
  for (const [number, content] of protobufFields(bytes)) {
    if (number !== 14) continue;
    const pair = Object.fromEntries(protobufFields(content));
    if (text.decode(pair[1]) === KEY) return JSON.parse(text.decode(pair[2]));
  }
  throw new Error("this is not a detector that tools/export.py wrote: its metadata are missing");
}

/** [number, bytes] of each field of a protobuf message; numbers, which are not needed here, give no bytes. */
function* protobufFields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let factor = 1; at < bytes.length; factor *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
    throw new Error("this is not an ONNX file, or a truncated one");
  };
  // Wire types: 0 a number, 1 and 5 numbers of fixed length, 2 bytes with their length before them.
  const lengths = { 0: () => (varint(), 0), 1: () => 8, 2: varint, 5: () => 4 };
  while (at < bytes.length) {
    const tag = varint();
    const length = lengths[tag % 8]?.() ?? Infinity;
    if (at + length > bytes.length) throw new Error("this is not an ONNX file, or a truncated one");
    yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
    at += length;
  }
}

/** [height, width] that an image is scaled to: its short side to `short_side` unless the long one would exceed `long_side`. */
export function resizedShape({ width, height }, { short_side, long_side }) {
  const scale = Math.min(short_side / Math.min(height, width), long_side / Math.max(height, width));
  return [height, width].map((side) => Math.max(1, roundHalfToEven(side * scale)));
}

/**
 * Scale an RGBA image to w x h and write it as RGB to the top left of a canvas of `stride` pixels a row.
 *
 * As OpenCV scales the training images: the mean over the area of a pixel to shrink, linear interpolation to enlarge.
 * The scaling of the browser's canvas differs, and would change the scores (docs/deploy.md).
 */
export function resizeInto(canvas, stride, image, h, w) {
  if (h < image.height || w < image.width) shrinkInto(canvas, stride, image, h, w);
  else enlargeInto(canvas, stride, image, h, w);
}

function shrinkInto(canvas, stride, { data, width, height }, h, w) {
  const columns = coverage(width, w);
  const rows = coverage(height, h);
  // OpenCV rounds a half up when it halves an image; otherwise to the even number, as a clamped array does.
  const nudge = width === 2 * w && height === 2 * h ? 1e-6 : 0;
  const sums = new Float64Array(3 * w);
  for (let y = 0; y < h; y++) {
    sums.fill(nudge);
    for (let r = rows.ends[y]; r < rows.ends[y + 1]; r++) {
      const line = rows.places[r] * width;
      for (let x = 0; x < w; x++) {
        for (let c = columns.ends[x]; c < columns.ends[x + 1]; c++) {
          const weight = rows.weights[r] * columns.weights[c];
          const at = 4 * (line + columns.places[c]);
          sums[3 * x] += weight * data[at];
          sums[3 * x + 1] += weight * data[at + 1];
          sums[3 * x + 2] += weight * data[at + 2];
        }
      }
    }
    canvas.set(sums, 3 * y * stride);
  }
}

/** What each of `target` pixels of a line covers: places and weights in the source from ends[i] to ends[i + 1]. */
function coverage(source, target) {
  const [ends, places, weights] = [[0], [], []];
  for (let i = 0; i < target; i++) {
    const start = (i * source) / target;
    const end = ((i + 1) * source) / target;
    for (let k = Math.floor(start); k < end; k++) {
      places.push(k);
      weights.push((Math.min(end, k + 1) - Math.max(start, k)) / (end - start));
    }
    ends.push(places.length);
  }
  return { ends: Int32Array.from(ends), places: Int32Array.from(places), weights: Float64Array.from(weights) };
}

/** OpenCV uses weights of 11 bits here and drops bits in between, which lowers every eighth value by one grey level. */
function enlargeInto(canvas, stride, { data, width, height }, h, w) {
  const columns = neighbours(width, w);
  const rows = neighbours(height, h);
  for (let y = 0; y < h; y++) {
    const [upper, lower] = [rows.first[y] * width, rows.second[y] * width];
    for (let x = 0; x < w; x++) {
      for (let c = 0; c < 3; c++) {
        const [left, right] = [4 * columns.first[x] + c, 4 * columns.second[x] + c];
        const above = (columns.far[x] * data[4 * upper + left] + columns.near[x] * data[4 * upper + right]) >> 4;
        const below = (columns.far[x] * data[4 * lower + left] + columns.near[x] * data[4 * lower + right]) >> 4;
        canvas[3 * (y * stride + x) + c] = (((rows.far[y] * above) >> 16) + ((rows.near[y] * below) >> 16) + 2) >> 2;
      }
    }
  }
}

/** The two source pixels between which each of `target` pixels of a line lies, and their weights in 1/2048. */
function neighbours(source, target) {
  const lines = { first: [], second: [], far: [], near: [] };
  for (let i = 0; i < target; i++) {
    const place = ((i + 0.5) * source) / target - 0.5;
    const first = Math.floor(place);
    lines.first.push(Math.max(first, 0));
    lines.second.push(Math.min(first + 1, source - 1));
    lines.near.push(roundHalfToEven((place - first) * 2048));
    lines.far.push(roundHalfToEven((1 - (place - first)) * 2048));
  }
  return lines;
}

/** As Python's round, which computes the size of a scaled image. */
function roundHalfToEven(value) {
  const rounded = Math.round(value);
  return rounded - value === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}
