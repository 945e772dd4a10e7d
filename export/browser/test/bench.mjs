// The time of one adaptation in Chromium, by the page's own modules: node bench.mjs URL FOLDER CALLS DATA.json prints it as JSON.
//
// URL is a site that has the page's modules and, in FOLDER, an export; DATA has the arrays of the data of its program `adapt` by name.

import { readFile } from "node:fs/promises";

import { browser, open } from "./drawing.mjs";

const [url, folder, calls, file] = process.argv.slice(2);
const chrome = await browser();
try {
  const { page } = await open(chrome, `${url}icon.svg`); // a page of that origin on which nothing else runs
  const found = await page.evaluate(
    async ([name, count, given]) => {
      const ort = await import("/onnxruntime/ort.wasm.min.mjs");
      const { read } = await import("/exported.js");
      ort.env.wasm.numThreads = 1;
      ort.env.wasm.wasmPaths = new URL("/onnxruntime/", location.href).href;
      const begin = performance.now();
      const bytesOf = async (each) => new Uint8Array(await (await fetch(`/${name}/${each}`)).arrayBuffer());
      const exported = await read(bytesOf, ort, ["adapt"]);
      const load = performance.now() - begin;
      const kinds = { float32: Float32Array, int64: BigInt64Array };
      const data = {};
      for (const { name: input, role, spec } of exported.programs.get("adapt").inputs) {
        if (role === "data") data[input] = kinds[spec.dtype].from(spec.dtype === "int64" ? given[input].map(BigInt) : given[input]);
      }
      const milliseconds = [];
      let outputs;
      for (let call = 0; call < count; call++) {
        const started = performance.now();
        outputs = await exported.run("adapt", data);
        milliseconds.push(performance.now() - started);
      }
      const arrays = Object.fromEntries(Object.entries(outputs).map(([output, value]) => [output, Array.from(value, Number)]));
      return { load, milliseconds, outputs: arrays };
    },
    [folder, Number(calls), JSON.parse(await readFile(file))],
  );
  process.stdout.write(JSON.stringify({ ...found, browser: chrome.version() }));
} finally {
  await chrome.close();
}
