// Adapts to tasks and recognises their drawings, with the page's own modules: node evaluate.mjs MODEL TASKS.json

import { readFile } from "node:fs/promises";

import { load } from "./node.mjs";
import { rasterise } from "./page/strokes.js";

const [model, file] = process.argv.slice(2);
const recogniser = await load(model);
const found = { network: [], neighbour: [], milliseconds: [] };
for (const { examples, queries } of JSON.parse(await readFile(file))) {
  const images = examples.map((drawings) => drawings.map(rasterise));
  found.milliseconds.push((await recogniser.adapt(images)).milliseconds);
  const right = { network: 0, neighbour: 0 };
  for (const [label, drawings] of queries.entries()) {
    for (const image of drawings.map(rasterise)) {
      const probabilities = await recogniser.recognise(image);
      right.network += probabilities.indexOf(Math.max(...probabilities)) === label;
      right.neighbour += nearest(image, images) === label;
    }
  }
  for (const way of ["network", "neighbour"]) found[way].push(right[way] / queries.flat().length);
}
process.stdout.write(JSON.stringify(found));

/** The symbol of the example whose image is the most like this one. */
function nearest(image, symbols) {
  let best = [Infinity, -1];
  for (const [label, examples] of symbols.entries()) {
    for (const example of examples) {
      const distance = image.reduce((sum, ink, place) => sum + (ink - example[place]) ** 2, 0);
      if (distance < best[0]) best = [distance, label];
    }
  }
  return best[1];
}
