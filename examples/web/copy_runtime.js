// Copies the three files of onnxruntime-web that the page loads to ort/, so that this folder can be served as it is.
import { copyFileSync, mkdirSync } from "node:fs";

const here = new URL(".", import.meta.url);
mkdirSync(new URL("ort/", here), { recursive: true });
for (const name of ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]) {
  copyFileSync(new URL(`node_modules/onnxruntime-web/dist/${name}`, here), new URL(`ort/${name}`, here));
}
