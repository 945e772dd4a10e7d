// Reads what `unroll.export(folder, support, query, formats="onnx")` wrote, and runs its programs in ONNX Runtime.
//
// Nothing here knows about drawings. `read` gets a function that returns the bytes of a file of the folder, so it serves a page as well as
// a test without a page.

const FORMAT = "adaptrt export";
const FORMAT_VERSION = 1;
const NAME = /^[A-Za-z0-9_][A-Za-z0-9._-]{0,200}$/;
const ARRAYS = { float32: Float32Array, float64: Float64Array, int64: BigInt64Array, int32: Int32Array, uint8: Uint8Array };
const SAFETENSORS = { F32: "float32", F64: "float64", I64: "int64", I32: "int32", U8: "uint8" };

/** Something that was read or given is not what the programs are for; its message is for the visitor. */
export class WrongInput extends Error {}

/** Reads and checks an export. `getBytes(name)` returns a promise of a Uint8Array, and `ort` is the module of onnxruntime-web. */
export async function read(getBytes, ort, programs) {
  const manifest = await checkedManifest(await getBytes("manifest.json"));
  const files = new Map();
  const get = async (name) => {
    if (!files.has(name)) files.set(name, await checkedFile(name, manifest.files[name], getBytes));
    return files.get(name);
  };
  if (!manifest.files["weights.safetensors"]) throw new WrongInput("The export has no weights.");
  const weights = readWeights(await get("weights.safetensors"));
  const found = new Map();
  for (const name of programs) {
    const program = manifest.programs.find((each) => each.name === name && each.files.onnx);
    if (!program) throw new WrongInput(`The export has no program “${name}” in ONNX.`);
    if (program.noise.length) throw new WrongInput(`The program “${name}” draws random numbers, and this page does not.`);
    const session = await ort.InferenceSession.create(await get(program.files.onnx), { executionProviders: ["wasm"] });
    found.set(name, { ...program, session });
  }
  return new Exported(manifest, weights, found, ort);
}

class Exported {
  constructor(manifest, weights, programs, ort) {
    this.manifest = manifest;
    this.weights = weights;
    this.programs = programs;
    this.ort = ort;
  }

  /** Runs a program. `data` has the arrays of its data by name, `state` those that replace weights; returns all outputs by name. */
  async run(name, data, state = {}) {
    const program = this.programs.get(name);
    const feeds = {};
    for (const { name: input, weight, spec } of program.inputs) {
      const value = weight === null ? data[input] : (state[weight] ?? this.weights[weight]);
      if (value === undefined) throw new WrongInput(`The program “${name}” needs “${weight ?? input}”.`);
      const count = spec.shape.reduce((product, size) => product * size, 1);
      if (value.length !== count || !(value instanceof ARRAYS[spec.dtype])) {
        throw new WrongInput(`“${weight ?? input}” must be ${spec.dtype} of shape [${spec.shape}].`);
      }
      if (weight === null && this.manifest.check_finite && value instanceof Float32Array && !value.every(Number.isFinite)) {
        throw new WrongInput(`“${input}” holds a number that is not finite.`);
      }
      feeds[input] = new this.ort.Tensor(spec.dtype, value, spec.shape);
    }
    this.#checkBounds(program, feeds);
    const results = await program.session.run(feeds);
    const outputs = {};
    for (const { name: output, weight } of program.outputs) outputs[weight ?? output] = results[output].data;
    return outputs;
  }

  /** Labels and indices must exist: ONNX Runtime would not always notice. */
  #checkBounds(program, feeds) {
    const data = program.inputs.filter(({ role }) => role === "data");
    for (const { position, size, ignore_index: ignored, part, of } of program.bounds) {
      if (part !== null) throw new WrongInput("The export has an index that this page cannot check.");
      const { name } = data[position];
      for (const value of feeds[name].data) {
        if ((value < 0 || value >= size) && Number(value) !== ignored) {
          throw new WrongInput(`“${name}” holds ${value}; ${of} are 0 to ${size - 1}.`);
        }
      }
    }
  }

  /** Of what `run` returned, what goes on as a state. */
  stateOf(outputs) {
    return Object.fromEntries(Object.entries(outputs).filter(([name]) => name in this.manifest.state));
  }
}

async function checkedManifest(bytes) {
  const text = new TextDecoder().decode(bytes);
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch {
    throw new WrongInput("The file manifest.json is no JSON: it was damaged, or is not there.");
  }
  if (manifest?.format !== FORMAT || manifest.format_version !== FORMAT_VERSION) {
    throw new WrongInput(`The file manifest.json is not that of an export in format ${FORMAT_VERSION}.`);
  }
  if ((await sha256(new TextEncoder().encode(canonical(text, "digest")))) !== manifest.digest) {
    throw new WrongInput("The file manifest.json was damaged: its digest is not that of what it says.");
  }
  return manifest;
}

async function checkedFile(name, wanted, getBytes) {
  if (!NAME.test(name) || !wanted) throw new WrongInput(`The manifest does not know a file “${name}”.`);
  const bytes = await getBytes(name);
  if (bytes.length !== wanted.bytes || (await sha256(bytes)) !== wanted.sha256) {
    throw new WrongInput(`The file ${name} is not the one that was exported: its hash differs. It may have been damaged on its way.`);
  }
  return bytes;
}

async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) {
    throw new WrongInput("This page must come from this computer or over HTTPS, or its files cannot be checked.");
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * The text over which the manifest's digest was taken: sorted keys, no spaces, and without the entry `left_out`. Numbers and strings stay as
 * they are written, because JavaScript would write some of them differently.
 */
export function canonical(text, leftOut) {
  const tokens = text.match(/"(?:[^"\\]|\\.)*"|[{}[\]:,]|[^\s{}[\]:,"]+/g) ?? [];
  let place = 0;
  const value = (outermost) => {
    const token = tokens[place++];
    if (token === "[") {
      const items = [];
      while (tokens[place] !== "]") {
        items.push(value(false));
        if (tokens[place] === ",") place++;
      }
      place++;
      return `[${items}]`;
    }
    if (token === "{") {
      const entries = [];
      while (tokens[place] !== "}") {
        const key = tokens[place];
        place += 2;
        entries.push([JSON.parse(key), `${key}:${value(false)}`]);
        if (tokens[place] === ",") place++;
      }
      place++;
      const kept = entries.filter(([key]) => !(outermost && key === leftOut)).sort(([a], [b]) => (a < b ? -1 : 1));
      return `{${kept.map(([, entry]) => entry)}}`;
    }
    return token;
  };
  return value(true);
}

/** The arrays of a safetensors file, by name. */
export function readWeights(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const wrong = () => new WrongInput("The file weights.safetensors cannot be read.");
  if (bytes.length < 8) throw wrong();
  const begin = 8 + Number(view.getBigUint64(0, true));
  if (begin > bytes.length) throw wrong();
  const found = {};
  let entries;
  try {
    entries = Object.entries(JSON.parse(new TextDecoder().decode(bytes.subarray(8, begin))));
  } catch {
    throw wrong();
  }
  for (const [name, entry] of entries) {
    if (name === "__metadata__") continue;
    const Kind = ARRAYS[SAFETENSORS[entry?.dtype]];
    const [first, last] = Array.isArray(entry?.data_offsets) ? entry.data_offsets : [];
    const whole = [first, last].every(Number.isSafeInteger) && 0 <= first && first <= last && begin + last <= bytes.length;
    if (!Kind || !whole || !Array.isArray(entry.shape)) throw wrong();
    if (last - first !== entry.shape.reduce((product, size) => product * size, Kind.BYTES_PER_ELEMENT)) throw wrong();
    // A copy, because the numbers need not lie at a multiple of their size in the file.
    found[name] = new Kind(bytes.slice(begin + first, begin + last).buffer);
  }
  return found;
}
