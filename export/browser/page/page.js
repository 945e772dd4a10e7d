// The page: symbols with their examples, the adaptation, and the recognition of what is drawn next.

import { WrongInput } from "./exported.js";
import { Pad } from "./pad.js";
import { MIN_EXAMPLES, MIN_SYMBOLS, Recogniser } from "./recogniser.js";
import { rasterise, SIZE } from "./strokes.js";

const FIRST_SYMBOLS = 3;
const SETTLED_MS = 500; // after this long without a change, examples that were changed are adapted to again
const NARROW = matchMedia("(max-width: 819px)"); // all parts are below one another
const STILL = matchMedia("(prefers-reduced-motion: reduce)");
const $ = (id) => document.getElementById(id);

let recogniser = null;
let symbols = []; // { field, input, pads }
let tried; // the drawing area of what is to be recognised
let work = Promise.resolve(); // the programs run one after another
let settling = 0; // the timer of the next adaptation
let shownNames = []; // the names of the symbols that the network is adapted to
let labelled = []; // those symbols
let round = 0; // how often everything was cleared
let frame = 0; // the animation frame that recognises next

// --- what is said

function fail(error) {
  const known = error instanceof WrongInput;
  if (!known) console.error(error);
  $("error").textContent = known ? error.message : `Something went wrong: ${error?.message ?? error}`;
  $("error").hidden = false;
}

const say = (text) => {
  $("spoken").textContent = text;
};

const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const nameOf = (symbol) => symbol.input.value.trim() || symbol.input.placeholder;
const percent = (part) => `${Math.round(100 * part)}%`;

// --- symbols

function addSymbol() {
  const field = $("symbol").content.cloneNode(true).firstElementChild;
  const symbol = { field, input: field.querySelector("input"), pads: [] };
  for (let number = 0; number < recogniser.maxExamples; number++) {
    const cell = document.createElement("div");
    cell.className = number < MIN_EXAMPLES ? "cell" : "cell optional";
    field.querySelector(".cells").append(cell);
    symbol.pads.push(new Pad(cell, { changed: exampleChanged, say }));
  }
  symbol.input.addEventListener("input", () => rename());
  field.querySelector(".remove").addEventListener("click", () => removeSymbol(symbol));
  symbols.push(symbol);
  $("symbols").append(field);
  renumber();
  return symbol;
}

function removeSymbol(symbol) {
  const place = symbols.indexOf(symbol);
  for (const pad of symbol.pads) pad.release();
  symbol.field.remove();
  symbols.splice(place, 1);
  renumber();
  symbols[Math.min(place, symbols.length - 1)].input.focus();
  say("Symbol removed");
  exampleChanged();
}

/** Gives symbols their numbers, and shows which buttons there are. */
function renumber() {
  symbols.forEach((symbol, place) => {
    symbol.input.placeholder = `Symbol ${place + 1}`;
    symbol.field.querySelector(".remove").hidden = symbols.length <= MIN_SYMBOLS;
  });
  $("add").hidden = symbols.length >= recogniser.maxSymbols;
  rename();
}

function rename() {
  for (const symbol of symbols) {
    const name = nameOf(symbol);
    symbol.field.querySelector("legend").textContent = name;
    symbol.field.querySelector(".remove").ariaLabel = `Remove ${name}`;
    symbol.pads.forEach((pad, place) => {
      pad.label = `${name}, example ${place + 1}`;
    });
  }
  shownNames = labelled.map(nameOf);
  document.querySelectorAll("#confidence .label").forEach((label, place) => {
    label.textContent = shownNames[place];
  });
  update();
}

const drawn = (symbol) => symbol.pads.filter((pad) => !pad.empty);

// --- adapting

/** What is missing before the network can adapt, in words, or nothing. */
function missing() {
  const begun = symbols.filter((symbol) => drawn(symbol).length > 0);
  const short = begun.find((symbol) => drawn(symbol).length < MIN_EXAMPLES);
  if (short) return `“${nameOf(short)}” needs ${count(MIN_EXAMPLES - drawn(short).length, "more example")}.`;
  if (begun.length < MIN_SYMBOLS) {
    return begun.length ? "Now draw another symbol." : `Draw ${MIN_EXAMPLES} examples of at least ${MIN_SYMBOLS} symbols.`;
  }
  return "";
}

function update() {
  if (!recogniser) return;
  for (const symbol of symbols) {
    const done = drawn(symbol).length;
    const enough = done >= MIN_EXAMPLES;
    const text = `${done} of ${enough ? recogniser.maxExamples : MIN_EXAMPLES}`;
    symbol.field.querySelector(".count").textContent = enough ? `✓ ${text}` : text;
    symbol.field.classList.toggle("enough", enough);
  }
  const lacks = missing();
  $("adapt").disabled = lacks !== "";
  if (lacks) show(lacks);
  else if (!recogniser.adapted) show("There are enough examples. Press Adapt.");
}

function show(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

function exampleChanged() {
  clearTimeout(settling);
  update();
  const drawing = symbols.some((symbol) => symbol.pads.some((pad) => pad.drawing));
  if (!drawing && recogniser.adapted && !missing()) settling = setTimeout(adapt, SETTLED_MS);
}

function adapt() {
  clearTimeout(settling);
  const chosen = symbols.filter((symbol) => drawn(symbol).length > 0);
  const images = chosen.map((symbol) => drawn(symbol).map((pad) => rasterise(pad.strokes)));
  const begun = round;
  work = work
    .then(async () => {
      const again = recogniser.adapted;
      const { losses, milliseconds } = await recogniser.adapt(images);
      if (begun !== round) return recogniser.forget(); // cleared in the meantime
      labelled = chosen;
      shownNames = chosen.map(nameOf);
      showLosses(losses);
      const examples = images.reduce((sum, each) => sum + each.length, 0);
      const how = `${count(losses.length - 1, "step")}, ${milliseconds.toFixed(0)} ms`;
      show(`Adapted ${again ? "again " : ""}to ${count(examples, "example")} in ${how}.`);
      document.body.classList.add("adapted");
      if (!again && NARROW.matches) $("adapt").scrollIntoView({ block: "start", behavior: STILL.matches ? "auto" : "smooth" });
      showConfidence(chosen.map(() => null));
      recognise();
    })
    .catch(fail);
  return work;
}

function showLosses(losses) {
  const largest = Math.max(...losses);
  $("losses").replaceChildren(
    ...losses.map((loss, step) => {
      const item = element("li");
      const bar = element("span", "bar");
      bar.ariaHidden = "true";
      const filled = element("span", "filled");
      filled.style.height = `${(100 * loss) / largest}%`;
      bar.append(filled);
      const value = element("span", "value", loss < 0.01 ? "<0.01" : loss.toFixed(2));
      const when = element("span", "when");
      if (step) when.append(element("span", "hidden", "after step "), String(step));
      else when.append("start");
      item.append(bar, value, when);
      return item;
    }),
  );
  $("steps").hidden = false;
}

function element(kind, name = "", text = "") {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}

// --- recognising

/** Recognises in the next frame, however often it is called before. */
function recognise() {
  if (!recogniser?.adapted || frame) return;
  $("confidence").ariaBusy = "true";
  frame = requestAnimationFrame(() => {
    frame = 0;
    work = work.then(recogniseNow).catch(fail);
    work = work.then(() => {
      if (!frame) $("confidence").ariaBusy = "false";
    });
  });
}

async function recogniseNow() {
  if (!recogniser.adapted) return;
  const [image, finished] = [rasterise(tried.strokes), !tried.drawing];
  showSeen(image);
  if (tried.empty) {
    showConfidence(labelled.map(() => null));
    $("answer").textContent = "Now draw one of your symbols here.";
    return;
  }
  const probabilities = await recogniser.recognise(image);
  if (!probabilities.every(Number.isFinite)) throw new WrongInput("The network has lost its numbers. Draw other examples, and adapt again.");
  $("error").hidden = true;
  showConfidence(probabilities);
  if (!finished) return; // a screen reader is told when a stroke is finished
  const best = Math.max(...probabilities);
  $("answer").textContent = `This looks like “${shownNames[probabilities.indexOf(best)]}”, ${percent(best)} sure.`;
}

function showConfidence(probabilities) {
  const list = $("confidence");
  if (list.children.length !== probabilities.length) {
    list.replaceChildren(
      ...probabilities.map(() => {
        const item = element("li");
        const bar = element("span", "bar");
        bar.ariaHidden = "true";
        bar.append(element("span", "filled"));
        item.append(element("span", "label"), bar, element("span", "value"));
        return item;
      }),
    );
  }
  const best = Math.max(...probabilities.map((part) => part ?? -1));
  probabilities.forEach((part, place) => {
    const item = list.children[place];
    item.querySelector(".label").textContent = shownNames[place];
    item.querySelector(".filled").style.width = percent(part ?? 0);
    item.querySelector(".value").textContent = part === null ? "" : percent(part);
    item.classList.toggle("best", part !== null && part === best);
  });
}

function triedChanged() {
  if (recogniser.adapted) recognise();
  else $("answer").textContent = tried.empty ? "" : "The network must adapt to your examples first.";
}

function showSeen(image) {
  const context = $("seen").getContext("2d");
  const [red, green, blue] = getComputedStyle($("seen")).color.match(/\d+/g).map(Number);
  const data = context.createImageData(SIZE, SIZE);
  image.forEach((ink, place) => data.data.set([red, green, blue, Math.round(255 * ink)], 4 * place));
  context.putImageData(data, 0, 0);
}

// --- the beginning

function startAgain() {
  round++;
  clearTimeout(settling);
  for (const symbol of symbols) for (const pad of symbol.pads) pad.release();
  symbols = [];
  labelled = shownNames = [];
  recogniser.forget();
  $("symbols").replaceChildren();
  $("losses").replaceChildren();
  $("steps").hidden = true;
  $("confidence").replaceChildren();
  $("answer").textContent = "";
  document.body.classList.remove("adapted");
  tried.clear();
  showSeen(new Float32Array(SIZE * SIZE));
  for (let place = 0; place < FIRST_SYMBOLS; place++) addSymbol();
  update();
}

function redrawAll() {
  for (const pad of [tried, ...symbols.flatMap((symbol) => symbol.pads)]) pad.draw();
  showSeen(rasterise(tried.strokes));
}

async function bytesOf(name) {
  let response;
  try {
    response = await fetch(`model/${name}`, { cache: "no-cache" });
  } catch {
    throw new WrongInput(`The file ${name} could not be loaded: the server did not answer.`);
  }
  if (!response.ok) {
    throw new WrongInput(`The file ${name} could not be loaded: the server says ${response.status}. Was the page built with its network?`);
  }
  return new Uint8Array(await response.arrayBuffer());
}

async function begin() {
  if (typeof WebAssembly !== "object") throw new WrongInput("This browser has no WebAssembly, in which the network runs.");
  let ort;
  try {
    ort = await import("./onnxruntime/ort.wasm.min.mjs");
  } catch {
    throw new WrongInput("ONNX Runtime could not be loaded: its files are not where the page was built.");
  }
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = new URL("./onnxruntime/", import.meta.url).href;
  recogniser = await Recogniser.load(bytesOf, ort);
  tried = new Pad($("try"), { changed: triedChanged, say });
  tried.label = "What is to be recognised";
  startAgain();
  $("add").addEventListener("click", () => addSymbol().input.focus());
  $("adapt").addEventListener("click", adapt);
  $("restart").addEventListener("click", () => {
    if (symbols.some((symbol) => drawn(symbol).length > 0) || !tried.empty) $("sure").showModal();
    else startAgain();
  });
  $("sure").addEventListener("close", () => {
    if ($("sure").returnValue !== "yes") return;
    startAgain();
    symbols[0].input.focus();
    say("Everything is cleared");
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
  document.body.classList.add("ready");
}

begin().catch((error) => {
  show("The network could not be loaded.");
  fail(error);
});
