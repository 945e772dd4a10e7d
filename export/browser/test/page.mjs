// Scenarios of the page in Chromium, each a function that throws where the page is not as it should be: node page.mjs URL SCENARIO

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";

import { answered, bestOf, browser, byKeys, byMouse, byTouch, exampleOf, lossesOf, open, ready, SHAPES, tryOf } from "./drawing.mjs";

const [url, scenario, folder] = process.argv.slice(2);
const PHONE = { viewport: { width: 360, height: 740 }, deviceScaleFactor: 2, isMobile: true, hasTouch: true };
const DESK = { viewport: { width: 1200, height: 900 } };
const KNOWN = ["circle", "cross", "zigzag"];
const axe = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

/** Draws examples of shapes, and names them. */
async function teach(page, by, numExamples, shapes = KNOWN) {
  for (const [place, shape] of shapes.entries()) {
    await page.locator(".symbol input").nth(place).fill(shape);
    for (let example = 0; example < numExamples; example++) await by(page, exampleOf(page, place, example), SHAPES[shape](example));
  }
}

async function adapt(page) {
  await page.locator("#adapt").click();
  await page.waitForSelector("body.adapted");
}

/** Losses fall from that of a network that knows nothing. */
async function fallen(page, numSymbols) {
  const losses = (await lossesOf(page)).map((text) => parseFloat(text.replace("<", "")));
  assert.equal(losses.length, 5, "four steps, and the loss after the last");
  assert.ok(Math.abs(losses[0] - Math.log(numSymbols)) < 0.006, `the first loss is ${losses[0]}`);
  for (const [step, loss] of losses.slice(1).entries()) assert.ok(loss <= losses[step], `losses are ${losses}`);
  assert.ok(losses.at(-1) < losses[0] / 2, `losses are ${losses}`);
}

/** New drawings of the shapes are recognised. */
async function recognised(page, by, shapes = KNOWN) {
  for (const shape of shapes) {
    for (const number of [20, 21]) {
      await by(page, tryOf(page), SHAPES[shape](number));
      await answered(page);
      const { name, sure } = await bestOf(page);
      assert.equal(name, shape);
      assert.ok(sure > 0.5, `only ${sure} sure of ${shape}`);
      assert.match(await page.locator("#answer").textContent(), new RegExp(`^This looks like “${shape}”, ${Math.round(100 * sure)}% sure`));
      await page.locator("#try .clear").click();
      await page.waitForFunction(() => document.querySelector("#answer").textContent.startsWith("Now draw"));
    }
  }
}

/** Nothing that axe knows of keeps anybody out. Axe's script is not the page's, so it is run past the page's policy. */
async function accessible(page) {
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  assert.deepEqual(violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.html).join(" ")}`), []);
}

/** Every request went to where the page came from, and the policy allows no other. */
function kept(noted) {
  const { origin } = new URL(url);
  assert.ok(noted.requests.length > 10);
  for (const request of noted.requests) assert.equal(new URL(request).origin, origin, request);
  assert.deepEqual(noted.errors, []);
}

const filled = (page) => page.locator(".inked").count();

const scenarios = {
  /** Five examples of three symbols by mouse, with everything that can be done afterwards. */
  async mouse(chrome) {
    const { page, noted } = await open(chrome, url, DESK);
    await ready(page);
    await accessible(page);
    assert.ok(await page.locator("#adapt").isDisabled());
    await byMouse(page, tryOf(page), SHAPES.cross(0));
    assert.equal(await page.locator("#answer").textContent(), "The network must adapt to your examples first.");
    await page.locator("#try .clear").click();
    await teach(page, byMouse, 5);
    await adapt(page);
    assert.match(await page.locator("#status").textContent(), /^Adapted to 15 examples in 4 steps, \d+ ms\.$/);
    await fallen(page, 3);
    await accessible(page);
    await recognised(page, byMouse);

    // While a stroke is drawn, confidence is shown, but not said.
    const said = await page.locator("#answer").textContent();
    const box = await tryOf(page).boundingBox();
    await page.mouse.move(box.x + 0.2 * box.width, box.y + 0.2 * box.height);
    await page.mouse.down();
    await page.mouse.move(box.x + 0.8 * box.width, box.y + 0.8 * box.height, { steps: 5 });
    await page.waitForFunction(() => document.querySelectorAll("#confidence .best").length === 1);
    assert.equal(await page.locator("#answer").textContent(), said);
    await page.mouse.up();
    await answered(page);

    // A stroke is undone, and what was changed is adapted to again.
    await exampleOf(page, 1, 4).scrollIntoViewIfNeeded();
    await page.locator(".symbol").nth(1).locator(".undo").nth(4).click();
    assert.match(await exampleOf(page, 1, 4).getAttribute("aria-label"), /^cross, example 5, 1 stroke$/);
    await page.waitForFunction(() => document.querySelector("#status").textContent.startsWith("Adapted again to 15 examples"));
    await page.locator(".symbol").nth(1).locator(".clear").nth(4).click();
    await page.waitForFunction(() => document.querySelector("#status").textContent.startsWith("Adapted again to 14 examples"));
    await page.locator(".symbol input").nth(1).fill("St Andrew");
    assert.deepEqual(await page.locator("#confidence .label").allTextContents(), ["circle", "St Andrew", "zigzag"]);

    // Starting again asks first.
    await page.locator("#restart").click();
    await page.getByRole("button", { name: "Keep them" }).click();
    assert.equal(await filled(page), 15);
    await page.locator("#restart").click();
    await accessible(page);
    await page.getByRole("button", { name: "Clear everything" }).click();
    await page.waitForFunction(() => document.querySelectorAll(".inked").length === 0);
    assert.equal(await page.locator("#confidence li").count(), 0);
    assert.equal(await page.locator("#losses li").count(), 0);
    assert.equal(await page.locator(".symbol input").first().inputValue(), "");
    assert.ok(await page.locator("#adapt").isDisabled());
    assert.equal(await page.evaluate(() => document.activeElement === document.querySelector(".symbol input")), true);

    // The next symbols have nothing to do with those before.
    await teach(page, byMouse, 3, ["triangle", "plus"]);
    await adapt(page);
    await fallen(page, 2);
    await recognised(page, byMouse, ["triangle", "plus"]);
    kept(noted);
  },

  /** Three examples by finger on a small screen, which must not scroll under it. */
  async touch(chrome) {
    const { page, noted } = await open(chrome, url, { ...PHONE, colorScheme: "dark" });
    await ready(page);
    assert.equal(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), true, "wider than the screen");
    assert.equal(await page.locator("canvas.paper:visible").count(), 3 * 3 + 1);
    await teach(page, byTouch, 3);
    assert.equal(await page.locator("canvas.paper:visible").count(), 3 * 5 + 1);
    const before = await page.evaluate(() => scrollY);
    await byTouch(page, exampleOf(page, 2, 3), [Array.from({ length: 12 }, (_, i) => [0.5, 0.9 - 0.07 * i])]);
    assert.equal(await page.evaluate(() => scrollY), before, "the page scrolled while it was drawn on");
    await page.locator(".symbol").nth(2).locator(".clear").nth(3).tap();
    for (const button of await page.locator("button:visible").all()) {
      const { width, height } = await button.boundingBox();
      assert.ok(width >= 24 && height >= 24, `${await button.textContent()} is ${width} by ${height}`);
    }
    await page.locator("#adapt").tap();
    await page.waitForSelector("body.adapted");
    await fallen(page, 3);
    await recognised(page, byTouch);
    await accessible(page);

    // A second finger does not draw.
    const box = await tryOf(page).boundingBox();
    const session = await page.context().newCDPSession(page);
    const at = (x, y, id) => ({ x: box.x + x * box.width, y: box.y + y * box.height, id });
    await session.send("Input.dispatchTouchEvent", { type: "touchStart", touchPoints: [at(0.2, 0.2, 0)] });
    await session.send("Input.dispatchTouchEvent", { type: "touchStart", touchPoints: [at(0.2, 0.2, 0), at(0.8, 0.2, 1)] });
    await session.send("Input.dispatchTouchEvent", { type: "touchMove", touchPoints: [at(0.2, 0.8, 0), at(0.8, 0.8, 1)] });
    await session.send("Input.dispatchTouchEvent", { type: "touchEnd", touchPoints: [] });
    await page.waitForFunction(() => document.querySelector("#try canvas").ariaLabel.endsWith(", 1 stroke"));
    kept(noted);
  },

  /** Everything by keys alone, from the first Tab on. */
  async keyboard(chrome) {
    const { page, noted } = await open(chrome, url, DESK);
    await ready(page);
    const focused = () => page.evaluate(() => document.activeElement.ariaLabel ?? document.activeElement.textContent.trim());
    const tabTo = async (wanted) => {
      for (let i = 0; i < 80; i++) {
        if (wanted.test(await focused())) return;
        await page.keyboard.press("Tab");
      }
      assert.fail(`no Tab reaches ${wanted}, only ${await focused()}`);
    };
    const plus = [[[0.5, 0.2], [0.5, 0.8]], [[0.2, 0.5], [0.8, 0.5]]];
    const vee = [[[0.2, 0.2], [0.5, 0.8], [0.8, 0.2]]];
    const moved = (strokes, by) => strokes.map((stroke) => stroke.map(([x, y]) => [x + by, y]));
    for (const [symbol, strokes] of [[1, plus], [2, vee]]) {
      for (const example of [1, 2, 3]) {
        await tabTo(new RegExp(`^Symbol ${symbol}, example ${example},`));
        await byKeys(page, moved(strokes, 0.05 * (example - 2)), [0.5, 0.5]);
        assert.match(await focused(), new RegExp(`example ${example}, ${strokes.length} stroke`));
      }
    }
    await page.keyboard.press("Backspace");
    assert.match(await focused(), /^Symbol 2, example 3, empty$/);
    await byKeys(page, vee, [0.8, 0.2]); // the pen stays where it was
    await tabTo(/^Adapt$/);
    await page.keyboard.press("Enter");
    await page.waitForSelector("body.adapted");
    await fallen(page, 2);
    await tabTo(/^What is to be recognised/);
    await byKeys(page, vee, [0.5, 0.5]);
    await answered(page);
    assert.equal((await bestOf(page)).name, "Symbol 2");
    await page.keyboard.press("Delete");
    await page.waitForFunction(() => document.querySelector("#answer").textContent.startsWith("Now draw"));
    const said = await page.locator("#spoken").textContent();
    assert.equal(said, "Cleared");
    kept(noted);
  },

  /** Two to five symbols: they can be added and removed. */
  async symbols(chrome) {
    const { page, noted } = await open(chrome, url, DESK);
    await ready(page);
    await page.locator("#add").click();
    await page.locator("#add").click();
    assert.equal(await page.locator(".symbol").count(), 5);
    assert.ok(await page.locator("#add").isHidden());
    await teach(page, byMouse, 3, Object.keys(SHAPES));
    await adapt(page);
    await fallen(page, 5);
    assert.equal(await page.locator("#confidence li").count(), 5);
    for (const name of ["plus", "circle", "zigzag"]) await page.getByRole("button", { name: `Remove ${name}` }).click();
    assert.equal(await page.locator(".remove:visible").count(), 0);
    await page.waitForFunction(() => document.querySelector("#status").textContent.startsWith("Adapted again to 6 examples"));
    assert.deepEqual(await page.locator("#confidence .label").allTextContents(), ["cross", "triangle"]);
    await recognised(page, byMouse, ["cross", "triangle"]);
    kept(noted);
  },

  /** Headers: nothing from another origin would be let in, or let out. */
  async headers(chrome) {
    const { page, noted } = await open(chrome, url, DESK);
    await ready(page);
    for (const response of noted.responses) {
      const policy = response.headers()["content-security-policy"];
      assert.match(policy, /default-src 'self'/);
      assert.ok(!/unsafe-inline|'unsafe-eval'|https?:|\*/.test(policy), policy);
    }
    const refused = await page.evaluate(async () => {
      const ways = {
        fetch: () => fetch("http://127.0.0.1:9/"),
        image: () =>
          new Promise((resolve, reject) => {
            Object.assign(new Image(), { onload: resolve, onerror: reject, src: "http://127.0.0.1:9/x.png" });
          }),
        eval: async () => Function("return 1")(),
      };
      const found = {};
      const violated = new Set();
      addEventListener("securitypolicyviolation", ({ effectiveDirective }) => violated.add(effectiveDirective));
      for (const [name, way] of Object.entries(ways)) found[name] = await way().then(() => "allowed", () => "refused");
      await new Promise((resolve) => setTimeout(resolve, 100));
      return { found, violated: [...violated].sort() };
    });
    assert.deepEqual(refused.violated, ["connect-src", "img-src", "script-src"]);
    assert.equal(refused.found.fetch, "refused");
    assert.equal(refused.found.image, "refused");
    assert.equal(refused.found.eval, "refused");
    assert.equal((await fetch(`${url}model/`)).status, 404);
    assert.equal((await fetch(`${url}../page.css`)).status, 200); // clients resolve dots before they ask
    assert.equal((await fetch(`${url}%2e%2e/trained`)).status, 404);
  },

  /** What goes wrong is said in words. */
  async wrong(chrome) {
    const cases = [
      ["**/model/adapt.onnx", changed, /The file adapt\.onnx is not the one that was exported: its hash differs/],
      ["**/model/weights.safetensors", changed, /The file weights\.safetensors is not the one/],
      ["**/model/predict.onnx", (route) => route.fulfill({ status: 404 }), /The file predict\.onnx could not be loaded: the server says 404/],
      ["**/model/manifest.json", rewritten, /manifest\.json was damaged: its digest/],
      ["**/model/manifest.json", (route) => route.fulfill({ body: "<p>" }), /manifest\.json is no JSON/],
      ["**/model/manifest.json", (route) => route.abort(), /The file manifest\.json could not be loaded: the server did not answer/],
      ["**/ort.wasm.min.mjs", (route) => route.fulfill({ status: 404 }), /ONNX Runtime could not be loaded/],
    ];
    for (const [pattern, answer, message] of cases) {
      const context = await chrome.newContext();
      await context.route(pattern, answer);
      const page = await context.newPage();
      await page.goto(url);
      await page.waitForSelector("#error:not([hidden])");
      assert.match(await page.locator("#error").textContent(), message);
      assert.ok(await page.locator("#adapt").isDisabled());
      await context.close();
    }
    const context = await chrome.newContext();
    await context.addInitScript(() => delete globalThis.WebAssembly);
    const page = await context.newPage();
    await page.goto(url);
    await page.waitForSelector("#error:not([hidden])");
    assert.match(await page.locator("#error").textContent(), /This browser has no WebAssembly/);
  },

  /** Pictures of the page, for people to look at. */
  async pictures(chrome) {
    for (const [name, options] of Object.entries({ light: DESK, dark: { ...DESK, colorScheme: "dark" }, phone: PHONE })) {
      const { page } = await open(chrome, url, options);
      await ready(page);
      await page.screenshot({ path: `${folder}/${name}-empty.png`, fullPage: true });
      await teach(page, byMouse, 4);
      await adapt(page);
      await byMouse(page, tryOf(page), SHAPES.zigzag(30));
      await answered(page);
      await page.evaluate(() => scrollTo(0, 0));
      await page.screenshot({ path: `${folder}/${name}.png`, fullPage: true });
    }
  },
};

async function changed(route) {
  const response = await route.fetch();
  const body = await response.body();
  body[body.length >> 1] ^= 1;
  await route.fulfill({ response, body });
}

async function rewritten(route) {
  const response = await route.fetch();
  await route.fulfill({ response, body: (await response.text()).replace('"k": 4', '"k": 5') });
}

const chrome = await browser();
try {
  await scenarios[scenario](chrome);
} finally {
  await chrome.close();
}
