// Uses examples/web as a visitor does, in headless Chromium, and prints what came of it as JSON.
//
//     node page.mjs BROWSER URL OUT IMAGE THRESHOLD

import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { basename, join } from "node:path";

const [browserPath, url, out, image, threshold] = process.argv.slice(2);
const { chromium } = createRequire(new URL("../../examples/web/package.json", import.meta.url))("playwright-core");

const browser = await chromium.launch({
  executablePath: browserPath,
  args: [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
  ],
});
const result = { console: [], requests: [], saved: {} };
try {
  const page = await browser.newPage({ viewport: { width: 900, height: 900 } });
  page.setDefaultTimeout(60000);
  page.on("console", (message) => result.console.push(`${message.type()}: ${message.text()}`));
  page.on("pageerror", (error) => result.console.push(`page: ${error}`));
  page.on("request", (request) => result.requests.push(`${request.method()} ${request.url()}`));

  const says = async (id, words) => {
    await page.waitForFunction(([id, words]) => document.getElementById(id).textContent.includes(words), [id, words]);
    return page.textContent(`#${id}`);
  };
  const save = async (name) => {
    const [download] = await Promise.all([page.waitForEvent("download"), page.click("#save")]);
    await download.saveAs(join(out, `${name}.json`));
    result.saved[name] = download.suggestedFilename();
  };

  await page.goto(url);
  result.model = await says("model", "classes");
  result.loading = result.requests.length;
  await page.fill("#threshold", threshold);

  await page.setInputFiles("#image-file", image);
  result.chosen = await says("status", "objects in");
  await save("chosen");
  await page.screenshot({ path: join(out, "page.png"), fullPage: true });

  const bytes = readFileSync(image).toString("base64");
  const dropped = await page.evaluateHandle(([bytes, name]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name));
    return transfer;
  }, [bytes, `dropped ${basename(image)}`]);
  await page.dispatchEvent("#drop", "drop", { dataTransfer: dropped });
  result.dropped = await says("status", "dropped");
  await save("dropped");

  await page.click("#camera");
  result.camera = await says("status", "camera: ");
  await page.click("#camera");

  await page.setInputFiles("#image-file", { name: "broken.png", mimeType: "image/png", buffer: Buffer.from("?") });
  result.brokenImage = await says("status", "broken.png");
  await page.setInputFiles("#model-file", { name: "other.onnx", mimeType: "", buffer: Buffer.from("no model") });
  result.noModel = await says("model", "other.onnx cannot be used");
} finally {
  await browser.close();
}
console.log(JSON.stringify(result));
