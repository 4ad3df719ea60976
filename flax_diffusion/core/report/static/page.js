"use strict";
(() => {
  const started = performance.now();
  const page = JSON.parse(document.getElementById("data").textContent);
  const FIELDS = 5; // of a bucket: finite values, their mean, their least, their largest, values that are not finite
  const SVG = "http://www.w3.org/2000/svg";
  const MARGIN = { left: 58, right: 14, top: 12, bottom: 26 };

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;

  function decode(curve) {
    const last = new Uint32Array(bytes(curve.last));
    return { width: curve.width, last, values: new Float32Array(bytes(curve.values)) };
  }

  for (const run of page.runs) {
    for (const name of Object.keys(run.curves)) run.curves[name] = decode(run.curves[name]);
  }

  function shown(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3 || size >= 1e6) return value.toExponential(2);
    return value.toLocaleString("en", { maximumSignificantDigits: 4 });
  }

  const steps = (value) => Math.round(value).toLocaleString("en");

  function short(value) {
    if (value >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
    if (value >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
    return steps(value);
  }

  function element(name, attributes, parent) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (parent) parent.append(made);
    return made;
  }

  /** Round numbers between two, about so many of them. */
  function ticks(low, high, count) {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(+at.toPrecision(10));
    return found;
  }

  function logTicks(low, high) {
    const found = [];
    const factors = high / low > 1e3 ? [1] : high / low > 20 ? [1, 3] : [1, 2, 3, 5, 7];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const factor of factors) found.push(+(factor * 10 ** power).toPrecision(6));
    }
    const inside = found.filter((at) => at >= low && at <= high);
    return inside.length > 1 ? inside : ticks(low, high, 4);
  }

  /** Mean of the buckets before and at each one, later ones weighing more. */
  function smoothed(curve, amount) {
    const line = new Float64Array(curve.last.length);
    let sum = 0;
    let weight = 0;
    for (let k = 0; k < line.length; k++) {
      const mean = curve.values[k * FIELDS + 1];
      if (curve.values[k * FIELDS] > 0) {
        sum = amount * sum + (1 - amount) * mean;
        weight = amount * weight + (1 - amount);
      }
      line[k] = curve.values[k * FIELDS] > 0 ? sum / weight : NaN;
    }
    return line;
  }

  class Chart {
    constructor(place, name, title) {
      this.place = place;
      this.name = name;
      this.title = title;
      this.readout = place.parentElement.querySelector(".readout");
      this.dense = name.startsWith("train/"); // a missing step is a gap there
      this.curves = page.runs.map((run) => run.curves[name]).map((curve) => (curve && curve.last.length ? curve : null));
      this.steps = [...new Set(this.curves.flatMap((curve) => (curve ? [...curve.last] : [])))].sort((a, b) => a - b);
      this.at = this.steps.length - 1;
      const attributes = {
        tabindex: "0", role: "slider", "aria-label": `${title}, value by step`, "aria-orientation": "horizontal",
        "aria-valuemin": this.steps[0], "aria-valuemax": this.steps[this.at],
      };
      for (const [key, value] of Object.entries(attributes)) place.setAttribute(key, value);
      place.addEventListener("pointermove", (event) => this.point(event));
      place.addEventListener("pointerdown", (event) => this.point(event));
      place.addEventListener("keydown", (event) => this.key(event));
      place.addEventListener("pointerleave", () => this.tell(false));
      place.addEventListener("focus", () => this.tell(true));
      place.addEventListener("blur", () => this.tell(false));
    }

    /** Least and largest value of all runs; null without any. */
    range() {
      let low = Infinity;
      let high = -Infinity;
      for (const curve of this.curves.filter(Boolean)) {
        for (let k = 0; k < curve.last.length; k++) {
          if (!(curve.values[k * FIELDS] > 0)) continue;
          low = Math.min(low, curve.values[k * FIELDS + 2]);
          high = Math.max(high, curve.values[k * FIELDS + 3]);
        }
      }
      return low <= high ? [low, high] : null;
    }

    draw(options) {
      const { clientWidth: width, clientHeight: height } = this.place;
      if (!width || !this.steps.length) return;
      const range = this.range() || [0, 1];
      this.log = options.log && /loss|norm/.test(this.name) && range[0] > 0;
      let [low, high] = range;
      if (low === high) {
        const margin = Math.abs(low) * 0.1 || 1;
        [low, high] = this.log ? [low / 1.1, high * 1.1] : [low - margin, high + margin];
      }
      const scale = this.log ? Math.log : (value) => value;
      const first = this.steps[0] === this.steps[this.steps.length - 1] ? this.steps[0] - 1 : this.steps[0];
      const end = this.steps[this.steps.length - 1];
      const right = width - MARGIN.right;
      const bottom = height - MARGIN.bottom;
      this.x = (step) => MARGIN.left + ((step - first) / (end - first)) * (right - MARGIN.left);
      this.stepAt = (x) => first + ((x - MARGIN.left) / (right - MARGIN.left)) * (end - first);
      this.y = (value) => bottom - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (bottom - MARGIN.top);
      const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
      this.axes(svg, [first, end], [low, high], { right, bottom });
      this.curves.forEach((curve, number) => curve && this.line(svg, curve, number, options));
      this.cursor = element("line", { class: "cursor", y1: MARGIN.top, y2: bottom, visibility: "hidden" }, svg);
      this.place.replaceChildren(svg);
      this.tell(document.activeElement === this.place);
    }

    axes(svg, [first, end], [low, high], { right, bottom }) {
      for (const at of this.log ? logTicks(low, high) : ticks(low, high, 6)) {
        const y = this.y(at);
        element("line", { class: "axis", x1: MARGIN.left, x2: right, y1: y, y2: y }, svg);
        element("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, svg).textContent = shown(at);
      }
      const count = Math.max(2, Math.floor((right - MARGIN.left) / 65));
      for (const at of ticks(first, end, count).filter(Number.isInteger)) {
        const anchor = this.x(at) > right - 20 ? "end" : "middle";
        const x = anchor === "end" ? right : this.x(at);
        element("text", { x, y: bottom + 17, "text-anchor": anchor }, svg).textContent = short(at);
      }
      element("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }, svg);
    }

    line(svg, curve, number, options) {
      const group = element("g", { class: `run-${number % 6} dash-${(number + Math.floor(number / 6)) % 6}` }, svg);
      const line = smoothed(curve, this.dense && !/learning_rate/.test(this.name) ? options.smooth : 0);
      let [raw, thick, upper, lower, band] = ["", "", "", [], ""];
      let open = false;
      const close = () => {
        if (upper) band += `M${upper}L${lower.reverse().join("L")}Z`;
        [upper, lower, open] = ["", [], false];
      };
      for (let k = 0; k < curve.last.length; k++) {
        const [count, mean, low, high, bad] = curve.values.subarray(k * FIELDS, k * FIELDS + FIELDS);
        const x = this.x(curve.last[k]).toFixed(1);
        if (bad > 0) this.bad(group, +x);
        const place = Math.floor(curve.last[k] / curve.width);
        const before = k ? Math.floor(curve.last[k - 1] / curve.width) : place;
        if (!(count > 0) || (this.dense && place > before + 1)) close();
        if (!(count > 0)) continue;
        const verb = open ? "L" : "M";
        raw += `${verb}${x} ${this.y(mean).toFixed(1)}`;
        thick += `${verb}${x} ${this.y(line[k]).toFixed(1)}`;
        upper += `${upper ? "L" : ""}${x} ${this.y(high).toFixed(1)}`;
        lower.push(`${x} ${this.y(low).toFixed(1)}`);
        open = true;
        if (!this.dense || curve.last.length === 1) {
          element("circle", { class: "dot", cx: x, cy: this.y(mean).toFixed(1), r: 3 }, group);
        }
      }
      close();
      if (this.dense && page.runs.length === 1) element("path", { class: "band", d: band }, group);
      if (this.dense) element("path", { class: "raw", d: raw }, group);
      element("path", { class: "line", d: thick }, group);
    }

    bad(group, x) {
      element("path", { class: "bad", d: `M${x - 4} 2L${x + 4} 2L${x} 10Z` }, group);
    }

    point(event) {
      const step = this.stepAt(event.clientX - this.place.getBoundingClientRect().left);
      let best = 0;
      this.steps.forEach((at, k) => {
        if (Math.abs(at - step) < Math.abs(this.steps[best] - step)) best = k;
      });
      this.at = best;
      this.tell(true);
    }

    key(event) {
      const end = this.steps.length - 1;
      const page = Math.max(1, Math.round(end / 20));
      const moves = {
        ArrowRight: this.at + 1, ArrowUp: this.at + 1, ArrowLeft: this.at - 1, ArrowDown: this.at - 1,
        PageUp: this.at + page, PageDown: this.at - page, Home: 0, End: end,
      };
      if (!(event.key in moves)) return;
      event.preventDefault();
      this.at = Math.min(end, Math.max(0, moves[event.key]));
      this.tell(true);
    }

    /** What the curves are at the cursor. */
    values() {
      const step = this.steps[this.at];
      const parts = this.curves.map((curve, number) => {
        if (!curve) return "";
        let k = curve.last.length - 1;
        while (k > 0 && curve.last[k] > step) k--;
        if (curve.last[k] > step) return "";
        const [count, mean, low, high] = curve.values.subarray(k * FIELDS, k * FIELDS + FIELDS);
        const name = page.runs.length > 1 ? `${page.runs[number].letter}: ` : "";
        if (!(count > 0)) return `${name}not finite`;
        const spread = count > 1 && page.runs.length === 1 ? ` (${shown(low)} to ${shown(high)})` : "";
        return `${name}${shown(mean)}${spread}`;
      });
      return `step ${steps(step)}: ${parts.filter(Boolean).join(", ")}`;
    }

    /** Shows the values at the cursor, or without one the last ones. */
    tell(active) {
      if (!this.cursor) return;
      if (!active) this.at = this.steps.length - 1;
      const text = this.values();
      this.readout.textContent = text[0].toUpperCase() + text.slice(1);
      this.place.setAttribute("aria-valuenow", this.steps[this.at]);
      this.place.setAttribute("aria-valuetext", text);
      const x = this.x(this.steps[this.at]);
      this.cursor.setAttribute("x1", x);
      this.cursor.setAttribute("x2", x);
      this.cursor.setAttribute("visibility", active ? "visible" : "hidden");
    }
  }

  function drawCharts() {
    const places = [...document.querySelectorAll(".plot")];
    if (!places.length) return;
    const titles = Object.fromEntries(page.charts.map((chart) => [chart.name, chart.title]));
    const made = places.map((place) => new Chart(place, place.dataset.curve, titles[place.dataset.curve]));
    const log = document.getElementById("log");
    const smooth = document.getElementById("smooth");
    const draw = () => {
      document.getElementById("smoothing").textContent = (+smooth.value).toFixed(2);
      for (const chart of made) chart.draw({ log: log.checked, smooth: +smooth.value });
    };
    log.addEventListener("change", draw);
    smooth.addEventListener("input", draw);
    let width = places[0].clientWidth;
    new ResizeObserver(() => {
      if (places[0].clientWidth !== width) {
        width = places[0].clientWidth;
        draw();
      }
    }).observe(places[0]);
    draw();
  }

  function showSamples() {
    const slider = document.getElementById("step");
    if (!slider) return;
    const all = [...new Set(page.runs.flatMap((run) => run.grids.map((grid) => grid.step)))].sort((a, b) => a - b);
    const figures = [...document.querySelectorAll(".grid[data-run]")].map((figure) => {
      const { grids } = page.runs[+figure.dataset.run];
      const image = figure.querySelector("img");
      grids[grids.length - 1].src = image.src; // which is not there twice
      return { grids, image, at: figure.querySelector(".at"), captions: figure.querySelector("ol") };
    });
    const [previous, next] = ["previous", "next"].map((name) => document.getElementById(name));
    const show = () => {
      const step = all[+slider.value];
      slider.setAttribute("aria-valuetext", `step ${steps(step)}`);
      document.getElementById("shown").textContent = steps(step);
      previous.disabled = +slider.value === 0;
      next.disabled = +slider.value === all.length - 1;
      for (const { grids, image, at, captions } of figures) {
        const until = grids.filter((grid) => grid.step <= step);
        const grid = until[until.length - 1];
        image.hidden = !grid;
        at.textContent = grid ? `step ${steps(grid.step)}` : `has no grid up to step ${steps(step)}`;
        if (grid) {
          [image.src, image.alt, image.width, image.height] = [grid.src, grid.alt, ...grid.size];
        }
        if (captions) captions.replaceChildren(
          ...(grid ? grid.captions : []).map((caption) => {
            const item = document.createElement("li");
            item.textContent = caption;
            return item;
          }),
        );
      }
    };
    const move = (by) => {
      slider.value = +slider.value + by;
      show();
    };
    slider.addEventListener("input", show);
    previous.addEventListener("click", () => move(-1));
    next.addEventListener("click", () => move(1));
    show();
  }

  drawCharts();
  showSamples();
  document.documentElement.dataset.script = Math.round(performance.now() - started);
  requestAnimationFrame(() =>
    requestAnimationFrame(() => {
      document.documentElement.dataset.drawn = Math.round(performance.now()); // milliseconds after it was opened
    }),
  );
})();
