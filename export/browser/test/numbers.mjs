// The page's modules on given numbers: node numbers.mjs MODEL CASES.json prints what they make of them, as JSON.

import { readFile } from "node:fs/promises";

import { bytesOf, load, ort } from "../node.mjs";
import { canonical, read } from "../page/exported.js";
import { Recogniser } from "../page/recogniser.js";
import { rasterise } from "../page/strokes.js";

const [model, file] = process.argv.slice(2);
const { drawings = [], symbols = null, query = null, texts = [], wrong = [] } = JSON.parse(await readFile(file));
const found = { images: drawings.map((strokes) => Array.from(rasterise(strokes))), texts: texts.map((text) => canonical(text, "digest")) };

const images = (lists) => lists.map((examples) => examples.map((image) => Float32Array.from(image)));
if (symbols) {
  const recogniser = await load(model);
  const { losses } = await recogniser.adapt(images(symbols));
  found.losses = losses;
  found.probabilities = await recogniser.recognise(Float32Array.from(query));
  // As if nothing had been adapted to before.
  found.again = (await recogniser.adapt(images(symbols))).losses;
  found.state = await adaptedState(recogniser, images(symbols));
}

const said = (error) => String(error.message);
found.said = [];
for (const [kind, lists] of wrong) {
  const recogniser = await load(model);
  found.said.push(await recogniser[kind](images(lists)).then(() => null, said));
}
process.stdout.write(JSON.stringify(found));

/** The parameters after adapting, which the page keeps to itself: by the program that it calls, with the data that it gives. */
async function adaptedState(recogniser, lists) {
  const exported = await read(bytesOf(model), ort, ["adapt", "predict", "loss"]);
  let outputs;
  const run = exported.run.bind(exported);
  exported.run = async (name, data, state) => {
    const result = await run(name, data, state);
    if (name === "adapt") outputs = result;
    return result;
  };
  await new Recogniser(exported).adapt(lists);
  const state = exported.stateOf(outputs);
  return Object.fromEntries(Object.entries(state).map(([name, value]) => [name, Array.from(value, Number)]));
}
