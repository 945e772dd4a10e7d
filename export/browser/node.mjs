// The page's network in Node.js, for measurements and tests: the same modules, with files from a folder.

import { readFile } from "node:fs/promises";
import { join } from "node:path";

import * as ort from "onnxruntime-web/wasm";

import { Recogniser } from "./page/recogniser.js";

ort.env.wasm.numThreads = 1;

export { ort };
export const bytesOf = (folder) => async (name) => new Uint8Array(await readFile(join(folder, name)));
export const load = (folder) => Recogniser.load(bytesOf(folder), ort);
