const PAUSE_MS = 60; // a chart of five minutes moves by about a pixel in a second

/**
 * Charts with one clock and one cursor. They move while the page is shown and they are in view;
 * where the user wants less motion, they are drawn only when there is something new.
 */
export class ChartGroup {
  #charts = []; // { chart, isPointed }
  #delay; // how far the right edge is behind the newest sample, so that the lines reach it
  #onCursor;
  #offset = null; // of the samples' clock from this machine's
  #cursor = null; // as a fraction of the span, so that it stays where the pointer is
  #request = 0;
  #timer;
  #seen = new Set(); // the canvases that are in view
  #calm = matchMedia("(prefers-reduced-motion: reduce)");
  #sizes = new ResizeObserver(() => this.restyle());
  #views = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      this.#seen[isIntersecting ? "add" : "delete"](target);
    }
    this.#plan();
  });

  constructor({ delay = 1200, onCursor = () => {} } = {}) {
    this.#delay = delay;
    this.#onCursor = onCursor;
    document.addEventListener("visibilitychange", () => this.#plan());
    for (const query of [this.#calm, matchMedia("(prefers-color-scheme: dark)")]) {
      query.addEventListener("change", () => this.restyle());
    }
    // A finger leaves the cursor where it was, until it touches something else.
    document.addEventListener("pointerdown", ({ target }) => {
      if (!this.#charts.some(({ chart }) => chart.canvas === target)) this.#point(null);
    });
  }

  /** The samples' time at the right edge. */
  get now() {
    return Date.now() + (this.#offset ?? 0) - this.#delay;
  }

  /** The time that the cursor is at; null without one. */
  get cursor() {
    if (this.#cursor === null || !this.#charts.length) return null;
    return this.now - this.#charts[0].chart.span * (1 - this.#cursor);
  }

  /** `isPointed`: it has the cursor, and moves it. */
  add(chart, isPointed = true) {
    const { canvas } = chart;
    this.#charts.push({ chart, isPointed });
    this.#sizes.observe(canvas);
    this.#views.observe(canvas);
    if (!isPointed) return chart;
    const point = ({ clientX }) => this.#point(chart.fractionAt(clientX));
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("pointerleave", ({ pointerType }) => {
      if (pointerType === "mouse") this.#point(null);
    });
    canvas.addEventListener("blur", () => this.#point(null));
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") this.#point(null);
      else if (step) {
        event.preventDefault();
        const by = (step * (event.shiftKey ? 10_000 : 1000)) / chart.span;
        this.#point(Math.max(0, Math.min(1, (this.#cursor ?? 1) + by)));
      }
    });
    return chart;
  }

  /** A sample of time `t` has come just now. */
  sync(t) {
    const offset = t - Date.now();
    const isFar = this.#offset === null || Math.abs(offset - this.#offset) > 1500;
    // Else by a little, since not each one takes the same time to come.
    this.#offset = isFar ? offset : this.#offset + (offset - this.#offset) / 10;
    this.#plan();
  }

  /** The colors, the sizes or what the charts are to show have changed. */
  restyle() {
    for (const { chart } of this.#charts) chart.restyle();
    this.#plan();
  }

  #point(fraction) {
    if (fraction === this.#cursor) return;
    this.#cursor = fraction;
    this.restyle();
    this.#onCursor(this.cursor);
  }

  #plan() {
    if (!this.#request && !document.hidden) {
      this.#request = requestAnimationFrame(() => this.#draw());
    }
  }

  #draw() {
    this.#request = 0;
    const { now, cursor } = this;
    const isMoved = !this.#calm.matches;
    clearTimeout(this.#timer);
    for (const { chart, isPointed } of this.#charts) {
      const isSeen = this.#seen.has(chart.canvas);
      if (chart.isDue(now, isSeen)) chart.draw(now, isPointed ? cursor : null, isMoved && isSeen);
    }
    if (cursor !== null) this.#onCursor(cursor);
    if (!isMoved || !this.#seen.size) return;
    if (this.#charts.some(({ chart }) => chart.isMoving)) this.#plan();
    else this.#timer = setTimeout(() => this.#plan(), PAUSE_MS);
  }
}
