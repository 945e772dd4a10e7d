// Adapts the network to symbols, and recognises them: what lies between images and the exported programs.

import { read, WrongInput } from "./exported.js";
import { SIZE } from "./strokes.js";

export const MIN_SYMBOLS = 2;
export const MIN_EXAMPLES = 3;

/** A network that is adapted to up to `maxSymbols` symbols of up to `maxExamples` examples each. */
export class Recogniser {
  #exported;
  #state = null;
  #used = null;

  /**
   * Reads an export; arguments as those of `read`. Every program is run once on paper without ink, because the first run of each takes
   * many times as long as the next.
   */
  static async load(getBytes, ort) {
    const found = new Recogniser(await read(getBytes, ort, ["adapt", "predict", "loss"]));
    const blank = new Float32Array(SIZE * SIZE);
    await found.adapt([[blank], [blank]]);
    await found.recognise(blank);
    found.forget();
    return found;
  }

  constructor(exported) {
    this.#exported = exported;
    const shapes = Object.fromEntries(exported.programs.get("adapt").inputs.map(({ name, spec }) => [name, spec.shape]));
    const rows = shapes["support.inputs.0"]?.[0];
    this.maxSymbols = shapes["support.inputs.1"]?.[0];
    this.maxExamples = rows / this.maxSymbols;
    if (String(shapes["support.inputs.0"]) !== String([rows, 1, SIZE, SIZE]) || !Number.isInteger(this.maxExamples)) {
      throw new WrongInput("The export is of another network than this page is for.");
    }
  }

  /**
   * Adapts to examples: for each symbol a list of images. Returns the losses before each step and after the last, and the milliseconds that
   * the adaptation took.
   */
  async adapt(symbols) {
    const batch = this.#batch(symbols);
    const begin = performance.now();
    const outputs = await this.#exported.run("adapt", named("support", batch));
    const milliseconds = performance.now() - begin;
    const state = this.#exported.stateOf(outputs);
    const { result } = await this.#exported.run("loss", named("batch", batch), state);
    this.#state = state;
    this.#used = batch.used;
    return { losses: [...outputs["result.1"], result[0]], milliseconds };
  }

  /** The probabilities of the symbols, for one image, by what was adapted last. */
  async recognise(image) {
    const used = this.#used;
    const { result } = await this.#exported.run("predict", { "query.0": image, "query.1": used }, this.#state);
    const logits = Array.from(result).slice(0, used.indexOf(0) < 0 ? used.length : used.indexOf(0));
    const largest = Math.max(...logits);
    const parts = logits.map((logit) => Math.exp(logit - largest));
    const sum = parts.reduce((a, b) => a + b, 0);
    return parts.map((part) => part / sum);
  }

  /** Forgets the adaptation. */
  forget() {
    this.#state = this.#used = null;
  }

  get adapted() {
    return this.#state !== null;
  }

  /** Examples in rows, each symbol of equal weight in total. Rows that are left have weight 0, so they change nothing. */
  #batch(symbols) {
    if (symbols.length < MIN_SYMBOLS || symbols.length > this.maxSymbols) {
      throw new WrongInput(`There must be ${MIN_SYMBOLS} to ${this.maxSymbols} symbols.`);
    }
    const rows = this.maxSymbols * this.maxExamples;
    const images = new Float32Array(rows * SIZE * SIZE);
    const [target, weights] = [new BigInt64Array(rows), new Float32Array(rows)];
    let row = 0;
    for (const [label, examples] of symbols.entries()) {
      if (examples.length < 1 || examples.length > this.maxExamples) {
        throw new WrongInput(`A symbol must have 1 to ${this.maxExamples} examples.`);
      }
      for (const image of examples) {
        images.set(image, row * SIZE * SIZE);
        target[row] = BigInt(label);
        weights[row++] = 1 / examples.length;
      }
    }
    const used = Float32Array.from({ length: this.maxSymbols }, (_, label) => (label < symbols.length ? 1 : 0));
    return { images, used, target, weights };
  }
}

const named = (prefix, { images, used, target, weights }) => ({
  [`${prefix}.inputs.0`]: images,
  [`${prefix}.inputs.1`]: used,
  [`${prefix}.target`]: target,
  [`${prefix}.weights`]: weights,
});
