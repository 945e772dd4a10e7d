// A square that is drawn on, by mouse, finger, pen or keyboard.

const NEAR = 0.003; // points that are nearer to the last one than this part of the side add nothing
const LINE = 0.05; // the width of a line on the screen, as a part of the side
const STEP = 0.05; // how far an arrow key moves the pen
const SMALL_STEP = 0.01;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** A drawing area. `strokes` are lists of points [x, y] in units of the side; the last one may still be drawn. */
export class Pad {
  strokes = [];
  #canvas;
  #undo;
  #clear;
  #changed;
  #say;
  #pointer = null; // the id of the pointer that draws
  #pen = [0.5, 0.5]; // where the keyboard's pen is
  #down = false;
  #keyboard = false; // whether the pen is shown

  /**
   * Fills `element` with a drawing area. `changed()` is called at every change, and `say(text)` tells a
   * screen reader something.
   */
  constructor(element, { changed, say }) {
    element.append(document.getElementById("cell").content.cloneNode(true));
    this.element = element;
    this.#canvas = element.querySelector("canvas");
    [this.#undo, this.#clear] = element.querySelectorAll("button");
    [this.#changed, this.#say] = [changed, say];
    this.#canvas.addEventListener("pointerdown", (event) => this.#pressed(event));
    this.#canvas.addEventListener("pointermove", (event) => this.#moved(event));
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
      this.#canvas.addEventListener(end, (event) => this.#lifted(event));
    }
    this.#canvas.addEventListener("keydown", (event) => this.#key(event));
    this.#canvas.addEventListener("focus", () => this.#showPen(this.#canvas.matches(":focus-visible") && this.#pointer === null));
    this.#canvas.addEventListener("blur", () => this.#left());
    this.#undo.addEventListener("click", () => this.undo());
    this.#clear.addEventListener("click", () => this.clear());
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.#canvas);
    this.#tools();
  }

  /** Says what the area is for, such as "Circle, example 2". */
  set label(text) {
    this.#canvas.ariaLabel = `${text}, ${this.#inWords()}`;
    this.#undo.querySelector(".hidden").textContent = `Undo the last stroke of ${text}`;
    this.#clear.querySelector(".hidden").textContent = `Clear ${text}`;
    this.#undo.title = "Undo";
    this.#clear.title = "Clear";
    this.text = text;
  }

  get empty() {
    return this.strokes.length === 0;
  }

  /** Whether a stroke is being drawn. */
  get drawing() {
    return this.#pointer !== null || this.#down;
  }

  undo() {
    this.#stop();
    this.strokes.pop();
    this.#after(`Stroke removed, ${this.#inWords()}`);
  }

  clear() {
    const said = this.empty ? "" : "Cleared";
    this.#stop();
    this.strokes = [];
    this.#after(said);
  }

  focus() {
    this.#canvas.focus();
  }

  /** Removes what watches the area. */
  release() {
    this.resized.disconnect();
  }

  /** Draws all strokes, at the resolution of the screen. */
  draw() {
    const canvas = this.#canvas;
    const side = Math.round(canvas.clientWidth * devicePixelRatio);
    if (!side) return;
    if (canvas.width !== side) canvas.width = canvas.height = side;
    const style = getComputedStyle(canvas);
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, side, side);
    context.lineWidth = side * LINE;
    context.lineCap = context.lineJoin = "round";
    context.strokeStyle = style.getPropertyValue("--ink");
    for (const stroke of this.strokes) {
      context.beginPath();
      context.moveTo(stroke[0][0] * side, stroke[0][1] * side);
      for (const [x, y] of stroke) context.lineTo(x * side, y * side);
      context.stroke();
    }
    if (this.#keyboard) {
      const [x, y] = this.#pen.map((part) => part * side);
      context.lineWidth = Math.max(side * 0.012, 1.5 * devicePixelRatio);
      context.strokeStyle = style.getPropertyValue("--accent");
      context.beginPath();
      context.arc(x, y, side * (this.#down ? 0.03 : 0.06), 0, 2 * Math.PI);
      for (const [dx, dy] of Object.values(ARROWS)) {
        context.moveTo(x + dx * side * 0.06, y + dy * side * 0.06);
        context.lineTo(x + dx * side * 0.1, y + dy * side * 0.1);
      }
      context.stroke();
    }
  }

  // --- pointers

  #point(event) {
    const box = this.#canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((part) => Math.min(Math.max(part, 0), 1));
  }

  #pressed(event) {
    if (event.button !== 0 || this.#pointer !== null) return; // one pointer draws at a time
    event.preventDefault();
    this.#stop();
    this.#pointer = event.pointerId;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#canvas.focus({ preventScroll: true });
    this.#showPen(false);
    this.strokes.push([this.#point(event)]);
    this.#after();
  }

  #moved(event) {
    if (event.pointerId !== this.#pointer) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const each of events.length ? events : [event]) this.#add(this.#point(each));
    this.#after();
  }

  #lifted(event) {
    if (event.pointerId !== this.#pointer) return;
    this.#pointer = null;
    this.#after();
  }

  #add([x, y]) {
    const stroke = this.strokes.at(-1);
    const [lastX, lastY] = stroke.at(-1);
    if (Math.abs(x - lastX) > NEAR || Math.abs(y - lastY) > NEAR) stroke.push([x, y]);
  }

  // --- keyboard

  #key(event) {
    if (event.altKey || (event.ctrlKey && event.key !== "z") || event.metaKey) return;
    const arrow = ARROWS[event.key];
    if (this.#pointer !== null || (event.repeat && [" ", "Enter"].includes(event.key))) {
      event.preventDefault(); // a key that is held is pressed once, and a pointer draws alone
      return;
    }
    if (arrow) {
      const step = event.shiftKey ? SMALL_STEP : STEP;
      this.#pen = this.#pen.map((part, axis) => Math.min(Math.max(part + arrow[axis] * step, 0), 1));
      if (this.#down) this.#add(this.#pen);
      this.#showPen(true);
      if (this.#down) this.#after();
      else this.#say(this.#where());
    } else if (event.key === " " || event.key === "Enter") {
      this.#showPen(true);
      this.#down = !this.#down;
      if (this.#down) this.strokes.push([this.#pen]);
      this.#after(this.#down ? `Pen down, ${this.#where()}` : `Pen up, ${this.#inWords()}`);
    } else if (event.key === "Backspace" || (event.key === "z" && event.ctrlKey)) {
      this.undo();
    } else if (event.key === "Delete") {
      this.clear();
    } else {
      return;
    }
    event.preventDefault();
  }

  #left() {
    if (this.#down) {
      this.#down = false;
      this.#after();
    }
    this.#showPen(false);
  }

  #showPen(shown) {
    this.#keyboard = shown;
    this.draw();
  }

  #where() {
    const [x, y] = this.#pen.map((part) => Math.round(part * 100));
    return `${x} percent from the left, ${y} from the top`;
  }

  // --- after any change

  #stop() {
    this.#pointer = null;
    this.#down = false;
  }

  #after(said) {
    this.draw();
    this.#tools();
    if (said) this.#say(said);
    this.#changed();
    if (this.text) this.label = this.text;
  }

  #tools() {
    this.element.classList.toggle("inked", !this.empty);
    // What is invisible is out of the order of focus; a button that is pressed keeps its focus on the drawing area.
    if (this.empty && this.element.querySelector(".tools").contains(document.activeElement)) this.#canvas.focus();
  }

  #inWords() {
    const count = this.strokes.length;
    return count === 0 ? "empty" : count === 1 ? "1 stroke" : `${count} strokes`;
  }
}
