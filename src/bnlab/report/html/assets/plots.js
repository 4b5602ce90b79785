"use strict";
// Plots of one layer, channel by channel. All labels are set as text, never as markup.
const plots = (() => {
  const WIDTH = 360;
  const HEIGHT = 300;
  const LEFT = 56;
  const RIGHT = 12;
  const TOP = 12;
  const FOOT = 40;

  function shape(name, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function short(value) {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    return String(Number(value.toPrecision(3)));
  }

  // A scale from values to pixels: logarithmic if `log` is set, else linear.
  function scale(values, from, to, { log = false, zero = false } = {}) {
    let low = Infinity;
    let high = -Infinity;
    for (const value of values) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    if (!(low <= high)) [low, high] = [0, 1];
    if (zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
    const inner = log ? Math.log10 : (value) => value;
    let [first, last] = [inner(low), inner(high)];
    const margin = (last - first) * 0.05 || Math.abs(first) * 0.1 || 1;
    first -= zero && low === 0 ? 0 : margin;
    last += margin;
    const at = (value) => from + ((inner(value) - first) / (last - first)) * (to - from);
    const ticks = log && last - first >= 1 ? decades(first, last) : steps(first, last, log);
    return { at, ticks };
  }

  function decades(first, last) {
    const stride = Math.ceil((last - first) / 5);
    const ticks = [];
    for (let exponent = Math.ceil(first); exponent <= last; exponent += stride) ticks.push(10 ** exponent);
    return ticks;
  }

  function steps(first, last, log) {
    const [low, high] = log ? [10 ** first, 10 ** last] : [first, last];
    const rough = (high - low) / 4;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((digit) => power * digit >= rough);
    const ticks = [];
    for (let i = Math.ceil(low / step); i * step <= high && ticks.length < 9; i++) ticks.push(i * step);
    return ticks;
  }

  function frame(label, x, y, xLabel, yLabel) {
    const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
    const foot = HEIGHT - FOOT;
    for (const tick of y.ticks) {
      svg.append(shape("path", { class: "grid", d: `M${LEFT} ${y.at(tick)}H${WIDTH - RIGHT}` }));
      svg.append(shape("text", { x: LEFT - 6, y: y.at(tick) + 4, "text-anchor": "end" }, short(tick)));
    }
    for (const tick of x.ticks) {
      svg.append(shape("path", { class: "grid", d: `M${x.at(tick)} ${TOP}V${foot}` }));
      svg.append(shape("text", { x: x.at(tick), y: foot + 15, "text-anchor": "middle" }, short(tick)));
    }
    const size = { width: WIDTH - LEFT - RIGHT, height: foot - TOP };
    svg.append(shape("rect", { class: "frame", x: LEFT, y: TOP, ...size }));
    const middle = (LEFT + WIDTH - RIGHT) / 2;
    svg.append(shape("text", { x: middle, y: HEIGHT - 6, "text-anchor": "middle" }, xLabel));
    const turned = `translate(11 ${(TOP + foot) / 2}) rotate(-90)`;
    svg.append(shape("text", { transform: turned, "text-anchor": "middle" }, yLabel));
    return svg;
  }

  // Both axes have the same scale, so the identity is a diagonal. Points: [{ channel, x, y, error }].
  function scatter(points, { log, name, xLabel, yLabel }) {
    const ends = points.flatMap((point) => [point.x, point.y]);
    const x = scale(ends, LEFT, WIDTH - RIGHT, { log });
    const y = scale(ends, HEIGHT - FOOT, TOP, { log });
    const svg = frame(`${yLabel} against ${xLabel}`, x, y, xLabel, yLabel);
    svg.append(shape("path", { class: "identity", d: `M${LEFT} ${HEIGHT - FOOT}L${WIDTH - RIGHT} ${TOP}` }));
    const clamped = (value) => Math.min(Math.max(value, LEFT), WIDTH - RIGHT);
    for (const point of points) {
      if (point.error > 0) {
        const low = point.x - 2 * point.error;
        const start = log && low <= 0 ? LEFT : clamped(x.at(low));
        const end = clamped(x.at(point.x + 2 * point.error));
        if (end - start > 3) svg.append(shape("path", { class: "error", d: `M${start} ${y.at(point.y)}H${end}` }));
      }
      const dot = shape("circle", { class: "point", cx: x.at(point.x), cy: y.at(point.y), r: 2.6 });
      const error = point.error > 0 ? ` \u00b1 ${short(2 * point.error)}` : "";
      dot.append(shape("title", {}, `channel ${point.channel}: ${name} ${short(point.y)}, observed ${short(point.x)}${error}`));
      svg.append(dot);
    }
    return svg;
  }

  // Bars: [{ channel, value }], side by side in the order of the channels.
  function bars(items, { log, name, yLabel }) {
    const y = scale(items.map((item) => item.value), HEIGHT - FOOT, TOP, { log, zero: !log });
    const x = { at: (place) => LEFT + ((WIDTH - LEFT - RIGHT) * (place + 0.5)) / items.length, ticks: [] };
    const svg = frame(`${yLabel} by channel`, x, y, "channel", yLabel);
    const foot = log ? HEIGHT - FOOT : y.at(0);
    const width = Math.max(0.6, (0.8 * (WIDTH - LEFT - RIGHT)) / items.length);
    const every = Math.ceil(items.length / 8);
    items.forEach((item, place) => {
      const top = y.at(item.value);
      const size = { width, height: Math.max(0.5, Math.abs(foot - top)) };
      const bar = shape("rect", { class: "point", x: x.at(place) - width / 2, y: Math.min(top, foot), ...size });
      bar.append(shape("title", {}, `channel ${item.channel}: ${name} ${short(item.value)}`));
      svg.append(bar);
      if (place % every) return;
      svg.append(shape("text", { x: x.at(place), y: HEIGHT - FOOT + 15, "text-anchor": "middle" }, item.channel));
    });
    return svg;
  }

  return { scatter, bars };
})();
