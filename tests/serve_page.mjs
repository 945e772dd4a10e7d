// Opens the server's page in Chromium: node serve_page.mjs URL PASSWORD prints what it shows after two seconds, as JSON.

import { chromium } from "../export/browser/node_modules/playwright-core/index.mjs";

const [url, password] = process.argv.slice(2);
const flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: flags });
try {
  const page = await browser.newPage({ httpCredentials: { username: "operator", password } });
  const faults = [];
  const origins = new Set();
  page.on("pageerror", (error) => faults.push(error.message));
  page.on("console", (message) => message.type() === "error" && !message.text().includes("401") && faults.push(message.text()));
  page.on("request", (request) => origins.add(new URL(request.url()).origin));
  await page.goto(url);
  await page.waitForFunction(() => document.querySelectorAll("#events dd").length && document.querySelectorAll("#latency td").length > 3);
  await page.waitForTimeout(1500);
  const text = (selector) => page.locator(selector).allTextContents();
  const shown = {
    faults,
    origins: [...origins],
    model: await text("#model"),
    stage: await text("#stage"),
    compiled: await text("#compiled"),
    routes: await text("#latency td:first-child"),
    batches: await text("#batches span"),
    points: await page.locator("#load polyline").getAttribute("points"),
  };
  process.stdout.write(JSON.stringify(shown));
} finally {
  await browser.close();
}
