import { answered, browser, byMouse, exampleOf, open, ready, SHAPES, tryOf, lossesOf, bestOf } from "./drawing.mjs";
const [url, folder] = process.argv.slice(2);
const chrome = await browser();
for (const [name, options] of Object.entries({
  light: { viewport: { width: 1200, height: 900 } },
  dark: { viewport: { width: 1200, height: 900 }, colorScheme: "dark" },
  phone: { viewport: { width: 360, height: 740 }, deviceScaleFactor: 2, isMobile: true, hasTouch: true },
})) {
  const { page, noted } = await open(chrome, url, options);
  await page.waitForTimeout(2000);
  console.log(name, noted.errors, await page.locator('#error').textContent());
  await ready(page);
  if (name === "phone") await page.screenshot({ path: `${folder}/${name}-empty.png`, fullPage: true });
  const shapes = ["circle", "cross", "zigzag"];
  for (const [s, shape] of shapes.entries()) { await page.locator(".symbol input").nth(s).fill(shape); for (let e = 0; e < 3 + s; e++) await byMouse(page, exampleOf(page, s, e), SHAPES[shape](e)); }
  await page.locator("#adapt").click();
  await page.waitForSelector("body.adapted");
  await byMouse(page, tryOf(page), SHAPES.cross(11)); await answered(page);
  console.log(await page.locator("#status").textContent(), await lossesOf(page), await bestOf(page), await page.locator("#answer").textContent(), noted.errors);
  await page.evaluate(() => scrollTo(0, 0));
  await page.screenshot({ path: `${folder}/${name}.png`, fullPage: true });
}
await chrome.close();
