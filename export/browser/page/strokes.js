// Turns strokes into the image that the network sees.
//
// A stroke is a list of points [x, y], y downwards, in units of the drawing area's side. `rasterise` is the same function as that of
// ../strokes.py, operation by operation, so that both give equal pixels: the network is trained on the one and used with the other.

export const SIZE = 28; // pixels of a side of an image
export const INK = 22; // pixels of the longer side of what is drawn
export const RADIUS = 1.1; // half the width of a line, in pixels
const SMALLEST = 0.1; // what is smaller than this part of the drawing area is not enlarged further; a dot stays a dot

/** Returns the image of a drawing, a Float32Array of SIZE * SIZE from 0 (paper) to 1 (ink). */
export function rasterise(strokes) {
  const image = new Float32Array(SIZE * SIZE);
  const points = strokes.flat();
  if (points.length === 0) return image;
  let [left, top] = points[0];
  let [right, bottom] = points[0];
  for (const [x, y] of points) {
    left = Math.min(left, x);
    right = Math.max(right, x);
    top = Math.min(top, y);
    bottom = Math.max(bottom, y);
  }
  const scale = INK / Math.max(right - left, bottom - top, SMALLEST);
  const [middleX, middleY] = [(left + right) / 2, (top + bottom) / 2];
  const placed = ([x, y]) => [(x - middleX) * scale + SIZE / 2, (y - middleY) * scale + SIZE / 2];

  // The square of each pixel's distance from the nearest line.
  const nearest = new Float64Array(SIZE * SIZE).fill(Infinity);
  for (const stroke of strokes) {
    const there = stroke.map(placed);
    for (let i = 0; i < Math.max(there.length - 1, Math.min(there.length, 1)); i++) {
      const [ax, ay] = there[i];
      const [bx, by] = there[i + 1] ?? there[i]; // a stroke of one point is a line from there to there
      const [dx, dy] = [bx - ax, by - ay];
      const squared = dx * dx + dy * dy;
      for (let row = 0; row < SIZE; row++) {
        const py = row + 0.5 - ay;
        for (let column = 0; column < SIZE; column++) {
          const px = column + 0.5 - ax;
          const along = squared > 0 ? Math.min(Math.max((px * dx + py * dy) / squared, 0), 1) : 0;
          const ex = px - along * dx;
          const ey = py - along * dy;
          const distance = ex * ex + ey * ey;
          const place = row * SIZE + column;
          if (distance < nearest[place]) nearest[place] = distance;
        }
      }
    }
  }
  for (let place = 0; place < image.length; place++) {
    image[place] = Math.min(Math.max(RADIUS + 0.5 - Math.sqrt(nearest[place]), 0), 1);
  }
  return image;
}
