// What the tests of the page share: a browser, and a hand that draws with real pointer events.

import { chromium } from "playwright-core";

const FLAGS =
  "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync";

/** Starts the Chromium of the system. */
export const browser = () =>
  chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", headless: true, args: FLAGS.split(" ") });

/**
 * Opens the page, and notes every request, every answer and everything that goes wrong in it. Requests are those of the whole context, so
 * those of workers are among them.
 */
export async function open(chrome, url, options = {}) {
  const context = await chrome.newContext(options);
  const page = await context.newPage();
  const noted = { requests: [], errors: [], responses: [] };
  context.on("request", (request) => noted.requests.push(request.url()));
  context.on("response", (response) => noted.responses.push(response));
  page.on("pageerror", (error) => noted.errors.push(String(error)));
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) noted.errors.push(message.text());
  });
  await page.goto(url);
  return { page, context, noted };
}

export const ready = (page) => page.waitForSelector("body.ready", { timeout: 60_000 });

// Shapes as a person draws them: with proportions, places and tremors of their own, which follow from the drawing's number.

const wobble = (seed) => {
  let state = seed * 2654435761 + 12345;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32 - 0.5;
  };
};

function along(corners, number, { steps = 8, amount = 0.02 } = {}) {
  const random = wobble(number + 1);
  const [dx, dy, wide, high] = [0.1 * random(), 0.1 * random(), 1 + 0.2 * random(), 1 + 0.2 * random()];
  const moved = corners.map(([x, y]) => [
    0.5 + (x - 0.5) * wide + dx + amount * random(),
    0.5 + (y - 0.5) * high + dy + amount * random(),
  ]);
  const between = (from, to, part) => from + (to - from) * part + 0.005 * random();
  return moved.flatMap(([x, y], i) => {
    if (i + 1 === moved.length) return [[x, y]];
    const [nextX, nextY] = moved[i + 1];
    return Array.from({ length: steps }, (_, j) => [between(x, nextX, j / steps), between(y, nextY, j / steps)]);
  });
}

const turn = (angle, radius = 0.33) => [0.5 + radius * Math.cos(angle), 0.5 + radius * Math.sin(angle)];

export const SHAPES = {
  circle: (number) => [along(Array.from({ length: 21 }, (_, i) => turn((2 * Math.PI * i) / 20 + number)), number, { steps: 2 })],
  cross: (number) => [along([[0.2, 0.2], [0.8, 0.8]], number), along([[0.8, 0.2], [0.2, 0.8]], number)],
  zigzag: (number) => [along([[0.15, 0.6], [0.3, 0.35], [0.45, 0.6], [0.6, 0.35], [0.75, 0.6], [0.9, 0.35]], number, { steps: 4 })],
  triangle: (number) => [along([[0.5, 0.2], [0.8, 0.75], [0.2, 0.75], [0.5, 0.2]], number, { amount: 0.04 })],
  plus: (number) => [along([[0.5, 0.2], [0.5, 0.8]], number), along([[0.2, 0.5], [0.8, 0.5]], number)],
};

/** The drawing area of an example, or that of what is to be recognised. */
export const exampleOf = (page, symbol, example) => page.locator("#symbols .symbol").nth(symbol).locator("canvas").nth(example);
export const tryOf = (page) => page.locator("#try canvas");

async function onScreen(canvas) {
  await canvas.scrollIntoViewIfNeeded();
  const box = await canvas.boundingBox();
  return ([x, y]) => [box.x + x * box.width, box.y + y * box.height];
}

/** Draws with the mouse. */
export async function byMouse(page, canvas, strokes) {
  const place = await onScreen(canvas);
  for (const stroke of strokes) {
    await page.mouse.move(...place(stroke[0]));
    await page.mouse.down();
    for (const point of stroke.slice(1)) await page.mouse.move(...place(point));
    await page.mouse.up();
  }
}

/** Draws with a finger: touches as the browser gets them from a screen. */
export async function byTouch(page, canvas, strokes) {
  const place = await onScreen(canvas);
  const session = await page.context().newCDPSession(page);
  const send = (type, points) =>
    session.send("Input.dispatchTouchEvent", { type, touchPoints: points.map(([x, y]) => ({ x, y, radiusX: 8, radiusY: 8, force: 0.5 })) });
  for (const stroke of strokes) {
    await send("touchStart", [place(stroke[0])]);
    for (const point of stroke.slice(1)) await send("touchMove", [place(point)]);
    await send("touchEnd", []);
  }
  await session.detach();
}

/** Draws by keys: the pen goes from where it is to each point, in steps of an arrow key. `pen` is where it is, and is changed. */
export async function byKeys(page, strokes, pen) {
  const go = async ([x, y]) => {
    for (const [axis, wanted, less, more] of [[0, x, "ArrowLeft", "ArrowRight"], [1, y, "ArrowUp", "ArrowDown"]]) {
      const steps = Math.round((wanted - pen[axis]) / 0.05);
      for (let i = 0; i < Math.abs(steps); i++) await page.keyboard.press(steps < 0 ? less : more);
      pen[axis] += steps * 0.05;
    }
  };
  for (const stroke of strokes) {
    await go(stroke[0]);
    await page.keyboard.press("Space");
    for (const point of stroke.slice(1)) await go(point);
    await page.keyboard.press("Space");
  }
}

/** Losses as the page shows them, before each step and after the last. */
export const lossesOf = (page) => page.locator("#losses .value").allTextContents();

/** The name of the symbol of which the page is most sure, and how sure it is. */
export async function bestOf(page) {
  const item = page.locator("#confidence .best");
  return { name: await item.locator(".label").textContent(), sure: parseInt(await item.locator(".value").textContent(), 10) / 100 };
}

/** Waits until the page has recognised what was drawn last. */
export const answered = (page) =>
  page.waitForFunction(
    () =>
      document.querySelector("#confidence").ariaBusy === "false" &&
      document.querySelector("#answer").textContent.startsWith("This looks like"),
  );
