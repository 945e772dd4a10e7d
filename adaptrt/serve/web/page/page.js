// Asks the server once a second what it does, and shows it. Nothing is stored.

const INTERVAL_MS = 1000;
const POINTS = 120;
const SVG = "http://www.w3.org/2000/svg";

const load = [];
let before = null;

const byId = (id) => document.getElementById(id);

function show(id, value) {
  byId(id).textContent = value;
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function milliseconds(value) {
  return `${value < 10 ? value.toFixed(2) : value.toFixed(0)} ms`;
}

function showLatency(latency) {
  const rows = Object.entries(latency).map(([route, found]) => {
    const row = document.createElement("tr");
    row.append(element("td", route), ...["p50", "p90", "p99"].map((part) => element("td", milliseconds(found[part]))));
    return row;
  });
  if (rows.length) byId("latency").replaceChildren(...rows);
}

function line(x1, y1, x2, y2) {
  const made = document.createElementNS(SVG, "line");
  for (const [name, value] of Object.entries({ x1, y1, x2, y2 })) made.setAttribute(name, value);
  return made;
}

function showLoad() {
  const most = Math.max(1, ...load);
  const [left, right, top, bottom] = [4, 596, 8, 112];
  const at = (value, index) => {
    const x = right - ((load.length - 1 - index) * (right - left)) / (POINTS - 1);
    return `${x.toFixed(1)},${(bottom - (value / most) * (bottom - top)).toFixed(1)}`;
  };
  const curve = document.createElementNS(SVG, "polyline");
  curve.setAttribute("points", load.map(at).join(" "));
  show("most", `(top line: ${most < 10 ? most.toFixed(1) : most.toFixed(0)})`);
  byId("load").replaceChildren(line(left, bottom, right, bottom), line(left, top, right, top), curve);
}

function showBatches(batches) {
  const found = Object.entries(batches);
  const most = Math.max(1, ...found.map(([, count]) => count));
  const parts = found.flatMap(([requests, count]) => {
    const bar = document.createElement("meter");
    bar.max = most;
    bar.value = count;
    bar.setAttribute("aria-label", `${count} batches of ${requests}`);
    return [element("span", requests), bar, element("span", count)];
  });
  if (parts.length) byId("batches").replaceChildren(...parts);
}

function showEvents(events) {
  byId("events").replaceChildren(
    ...Object.entries(events).map(([name, count]) => {
      const entry = document.createElement("div");
      entry.append(element("dt", name), element("dd", count));
      return entry;
    }),
  );
}

// Counted from one second to the next, as the server's own mean covers a minute.
function requestsPerSecond(events, now) {
  const count = (events.adapt ?? 0) + (events.predict ?? 0);
  const rate = before && count >= before.count ? ((count - before.count) * 1000) / (now - before.now) : 0;
  before = { count, now };
  return rate;
}

function showSummary(summary) {
  show("model", summary.model);
  show("stage", summary.stage);
  byId("stage").className = summary.stage;
  show("refused", summary.refused);
  showLatency(summary.latency_ms);
  const engine = summary.engine;
  if (!engine) return;
  load.push(requestsPerSecond(engine.events, performance.now()));
  if (load.length > POINTS) load.shift();
  show("rate", load.at(-1).toFixed(load.at(-1) < 10 ? 1 : 0));
  show("waiting", engine.waiting);
  show("guards", engine.guards_fired);
  show("states", engine.cached_states);
  show("compiled", engine.compiled_after_ready);
  byId("compiled").parentElement.className = engine.compiled_after_ready ? "bad" : "";
  showLoad();
  showBatches(engine.batches);
  showEvents(engine.events);
}

async function ask() {
  try {
    const answer = await fetch("/page/summary");
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    showSummary(await answer.json());
  } catch (error) {
    show("stage", `no answer: ${error.message}`);
    byId("stage").className = "lost";
  }
  setTimeout(ask, INTERVAL_MS);
}

ask();
