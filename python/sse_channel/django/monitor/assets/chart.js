/**
 * Time series on canvas that move with the clock: lines, stacked areas, stacked bars.
 *
 *     const series = [{ color: "--p99", value: (sample) => sample.p99 }];
 *     const chart = new TimeChart(canvas, { type: "line", series, format: String });
 *     chart.samples = samples; // [{ t: milliseconds, … }], oldest first
 *     chart.draw(Date.now());
 *
 * A color is the name of a custom property of CSS, so that a scheme is the stylesheet's matter. A
 * value of null, and a time without samples, is a gap.
 */

import { linearAxis, logAxis } from "./axis.js";

const GAP_MS = 2500; // two samples that are further apart have a gap between them
const STEPS_A_PIXEL = 4; // what a chart moves before it is drawn anew
const MINUTE_MS = 60_000;
const [LEFT, TOP, BOTTOM] = [46, 6, 18]; // room for the axes
const MINUTES = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
const minutes = new Intl.DateTimeFormat("en", MINUTES);
const seconds = new Intl.DateTimeFormat("en", { ...MINUTES, second: "2-digit" });

/** Where the middle of the cursor's label is: where the cursor is, but whole. */
function labelOf(cursor, { x, left, right }) {
  return Math.max(left + 28, Math.min(right - 30, x(cursor)));
}

/**
 * Options: `type` ("line", "area", "bars"), `series`, `format` (of a value, for the axis), `scale`
 * ("linear", "log"), `least` (what the axis reaches at least), `bucket` (milliseconds that a bar
 * adds up), `isBare` (without axes), `isFilled` (a line has a tint beneath).
 */
export class TimeChart {
  span = 300_000; // milliseconds that are shown
  isMoving = false; // whether the axis is still under way
  #canvas;
  #context;
  #options;
  #samples = [];
  #series;
  #points = []; // { t, values } in order, with a value or null for each series
  #axis = null; // { low, high } as shown, which follows what it should be
  #drawn = null; // the time that it was drawn for
  #styles = new Map();

  constructor(canvas, options) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#options = { type: "line", scale: "linear", least: 1, bucket: 5000, ...options };
    this.#series = this.#options.series;
  }

  get canvas() {
    return this.#canvas;
  }

  get series() {
    return this.#series;
  }

  set series(series) {
    this.#series = series;
    this.samples = this.#samples;
  }

  set samples(samples) {
    this.#samples = samples;
    const values = (sample) => this.#series.map(({ value }) => value(sample) ?? null);
    if (this.#options.type === "bars") this.#points = this.#addUp(samples, values);
    else this.#points = samples.map((sample) => ({ t: sample.t, values: values(sample) }));
    this.#drawn = null;
  }

  /** What is shown at `t`, as { t, values }; null in a gap. */
  at(t) {
    const { type, bucket } = this.#options;
    if (type === "bars") return this.#points.find((p) => p.t <= t && t < p.t + bucket) ?? null;
    const distance = (point) => Math.abs(point.t - t);
    const nearer = (a, b) => (distance(b) < distance(a) ? b : a);
    const point = this.#points.length ? this.#points.reduce(nearer) : null;
    return point && distance(point) < GAP_MS / 2 ? point : null;
  }

  /** The sum of the series `index` over the span. */
  total(index) {
    const from = (this.#samples.at(-1)?.t ?? 0) - this.span;
    const shown = this.#samples.filter(({ t }) => t > from);
    return shown.reduce((sum, sample) => sum + (this.#series[index].value(sample) ?? 0), 0);
  }

  /** The place of `x`, in pixels of the page, between the left (0) and the right edge (1). */
  fractionAt(x) {
    const { left, width } = this.#canvas.getBoundingClientRect();
    const from = this.#options.isBare ? 0 : LEFT;
    return Math.max(0, Math.min(1, (x - left - from) / (width - from)));
  }

  /** The colors or the size have changed. */
  restyle() {
    this.#styles.clear();
    this.#drawn = null;
  }

  /** Whether to draw it for `now`; one that is out of view does not move. */
  isDue(now, isSeen) {
    if (this.#drawn === null) return true;
    const step = this.span / (this.#canvas.width * STEPS_A_PIXEL || 1);
    return isSeen && (this.isMoving || Math.abs(now - this.#drawn) >= step);
  }

  /** Draw with `now` at the right edge, and mark what is at `cursor`, a time or null. */
  draw(now, cursor = null, isAnimated = true) {
    const ratio = devicePixelRatio;
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    if (!width || !height) return;
    const size = [Math.round(width * ratio), Math.round(height * ratio)];
    if (size[0] !== this.#canvas.width) this.#canvas.width = size[0];
    if (size[1] !== this.#canvas.height) this.#canvas.height = size[1];
    this.#drawn = now;
    const { isBare, type } = this.#options;
    const [left, top] = isBare ? [0, 3] : [LEFT, TOP];
    const bottom = height - (isBare ? 0 : BOTTOM);
    const from = now - this.span;
    const points = this.#points.filter((point) => point.t > from - GAP_MS - this.#options.bucket);
    const ticks = this.#follow(this.#range(points), isAnimated);
    const { low, high } = this.#axis;
    const isLog = this.#options.scale === "log";
    const placeOf = (value) => ((isLog ? Math.log10(value) : value) - low) / (high - low);
    const view = {
      ...{ points, left, top, bottom, right: width },
      x: (t) => left + ((t - from) / this.span) * (width - left),
      y: (value) => bottom - Math.max(-1, Math.min(2, placeOf(value))) * (bottom - top),
    };
    const context = this.#context;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.lineJoin = context.lineCap = "round";
    if (!isBare) this.#drawAxes(view, ticks, from, now, cursor);
    context.save();
    context.beginPath();
    context.rect(left, 0, width - left, bottom + 1);
    context.clip();
    if (type === "bars") this.#drawBars(view, cursor);
    else if (type === "area") this.#drawAreas(view);
    else this.#series.forEach((series, index) => this.#drawLine(view, series, index));
    context.restore();
    if (cursor !== null && !isBare) this.#drawCursor(view, cursor);
  }

  #addUp(samples, values) {
    const { bucket } = this.#options;
    const buckets = new Map();
    for (const sample of samples) {
      const t = Math.floor(sample.t / bucket) * bucket;
      if (!buckets.has(t)) buckets.set(t, { t, values: this.#series.map(() => 0) });
      const sums = buckets.get(t).values;
      values(sample).forEach((value, index) => (sums[index] += value));
    }
    return [...buckets.values()];
  }

  #range(points) {
    const { scale, least, type } = this.#options;
    const sum = (values) => values.reduce((total, value) => total + value, 0);
    const isLine = type === "line";
    const all = isLine ? points.flatMap((p) => p.values) : points.map((p) => sum(p.values));
    const known = all.filter((value) => value !== null);
    return scale === "log" ? logAxis(known, least) : linearAxis(known, least);
  }

  /** Move the axis on towards where it should be. */
  #follow({ low, high, ticks }, isAnimated) {
    const now = (this.#axis ??= { low, high });
    const isNear = Math.abs(now.high - high) + Math.abs(now.low - low) < (high - low) / 200;
    this.isMoving = isAnimated && !isNear;
    const share = this.isMoving ? 0.2 : 1;
    now.low += (low - now.low) * share;
    now.high += (high - now.high) * share;
    return ticks;
  }

  #style(name) {
    if (!this.#styles.size) {
      const style = getComputedStyle(this.#canvas);
      this.#styles.set("font", `${style.fontSize} ${style.fontFamily}`).set("all", style);
    }
    if (!this.#styles.has(name)) {
      this.#styles.set(name, this.#styles.get("all").getPropertyValue(name).trim());
    }
    return this.#styles.get(name);
  }

  #stroke(color, width, path) {
    const context = this.#context;
    [context.strokeStyle, context.lineWidth] = [this.#style(color), width];
    context.beginPath();
    path(context);
    context.stroke();
  }

  #fill(color, alpha, path) {
    const context = this.#context;
    [context.fillStyle, context.globalAlpha] = [this.#style(color), alpha];
    context.beginPath();
    path(context);
    context.fill();
    context.globalAlpha = 1;
  }

  #write(text, x, y, align, color = "--muted") {
    const context = this.#context;
    [context.font, context.fillStyle] = [this.#style("font"), this.#style(color)];
    [context.textAlign, context.textBaseline] = [align, "middle"];
    context.fillText(text, x, y);
  }

  #drawAxes(view, ticks, from, now, cursor) {
    const { x, y, left, right, top, bottom } = view;
    for (const tick of ticks) {
      const height = Math.round(y(tick)) + 0.5;
      if (height < top - 1 || height > bottom + 1) continue;
      this.#stroke(tick === ticks[0] ? "--axis" : "--grid", 1, (path) => {
        path.moveTo(left, height);
        path.lineTo(right, height);
      });
      this.#write(this.#options.format(tick), left - 8, height, "right");
    }
    const every = [1, 2, 5, 10].find((count) => x(count * MINUTE_MS) - x(0) > 46) * MINUTE_MS;
    for (let t = Math.ceil(from / every) * every; t <= now; t += every) {
      this.#stroke("--grid", 1, (path) => {
        path.moveTo(x(t), top);
        path.lineTo(x(t), bottom);
      });
      const isWhole = x(t) > left + 16 && x(t) < right - 18;
      // The cursor's label would cover a part of it.
      const isFree = cursor === null || Math.abs(x(t) - labelOf(cursor, view)) > 48;
      if (isWhole && isFree) this.#write(minutes.format(t), x(t), bottom + 10, "center");
    }
  }

  /** The points in runs without a gap, for the series `index`, or for all. */
  #runs(points, index = null) {
    const runs = [];
    let before = null;
    for (const point of points) {
      const isGap = index !== null && point.values[index] === null;
      if (!isGap && (before === null || point.t - before > GAP_MS)) runs.push([]);
      if (!isGap) runs.at(-1).push(point);
      before = isGap ? null : point.t;
    }
    return runs;
  }

  #drawLine({ points, x, y, bottom }, { color, width = 1.5 }, index) {
    for (const run of this.#runs(points, index)) {
      const line = (path) => {
        for (const { t, values } of run) path.lineTo(x(t), y(values[index]));
        // One that stands alone is a dot.
        if (run.length === 1) path.lineTo(x(run[0].t) + 0.01, y(run[0].values[index]));
      };
      if (this.#options.isFilled) {
        this.#fill(color, 0.13, (path) => {
          line(path);
          path.lineTo(x(run.at(-1).t), bottom);
          path.lineTo(x(run[0].t), bottom);
        });
      }
      this.#stroke(color, width, line);
    }
  }

  #drawAreas({ points, x, y }) {
    const height = ({ values }, count) => y(values.slice(0, count).reduce((a, b) => a + b, 0));
    for (const run of this.#runs(points)) {
      this.#series.forEach(({ color }, index) => {
        const upper = (path) => run.forEach((p) => path.lineTo(x(p.t), height(p, index + 1)));
        this.#fill(color, 0.3, (path) => {
          upper(path);
          [...run].reverse().forEach((p) => path.lineTo(x(p.t), height(p, index)));
        });
        this.#stroke(color, 1.5, upper);
      });
    }
  }

  #drawBars({ points, x, y, bottom }, cursor) {
    const { bucket } = this.#options;
    const marked = cursor === null ? null : this.at(cursor);
    for (const point of points) {
      const [from, width] = [x(point.t), Math.max(1, 0.8 * (x(bucket) - x(0)))];
      let floor = bottom;
      this.#series.forEach(({ color }, index) => {
        const value = point.values[index];
        if (!value) return;
        const height = Math.max(2, bottom - y(value)); // A single one is seen as well.
        floor -= height;
        const alpha = marked && marked !== point ? 0.45 : 1;
        this.#fill(color, alpha, (path) => path.rect(from, floor, width, height));
      });
    }
  }

  #drawCursor(view, cursor) {
    const { x, y, top, bottom } = view;
    const point = this.at(cursor);
    const isBars = this.#options.type === "bars";
    const place = x(point && !isBars ? point.t : cursor);
    this.#stroke("--cursor", 1, (path) => {
      path.moveTo(place, top);
      path.lineTo(place, bottom);
    });
    let sum = 0;
    for (const [index, value] of (isBars ? [] : (point?.values ?? [])).entries()) {
      if (value === null) continue;
      sum = this.#options.type === "area" ? sum + value : value;
      const { color } = this.#series[index];
      this.#fill("--panel", 1, (path) => path.arc(place, y(sum), 4.5, 0, 7));
      this.#fill(color, 1, (path) => path.arc(place, y(sum), 3, 0, 7));
    }
    const text = seconds.format(point?.t ?? cursor);
    this.#write(text, labelOf(cursor, view), bottom + 10, "center", "--text");
  }
}
