"use strict";
// The view of one layer, opened by #layer=INDEX.
const layerView = (() => {
  const data = JSON.parse(document.getElementById("layer-data").textContent);
  const section = document.getElementById("layer");
  const heading = document.getElementById("layer-heading");
  const body = document.getElementById("layer-body");
  const sources = { train_data: "the training data", data: "the data" };
  let current = null;
  let opener = null;

  function element(name, text, className) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  // The series of a layer by name; 0 stands for a missing series.
  const seriesOf = (layer) => Object.fromEntries(data.series.map((name, place) => [name, layer.values[place]]));

  // The values of each drawn channel, as { channel, ... }.
  function zipped(layer, names) {
    const values = seriesOf(layer);
    const first = values[Object.values(names)[0]] || [];
    return first.map((_, place) => {
      const item = { channel: layer.channels ? layer.channels[place] : place };
      for (const [key, name] of Object.entries(names)) item[key] = values[name] ? values[name][place] : null;
      return item;
    });
  }

  function figure(svg, caption) {
    const made = element("figure");
    made.append(svg, element("figcaption", caption));
    return made;
  }

  const differMuch = (values) => values.length > 0 && Math.max(...values) > 5 * Math.min(...values);

  function missing(all, drawn, log) {
    const left = all.length - drawn.length;
    if (!left) return "";
    return ` Not drawn: ${left} with a value that is not finite${log ? ", or not positive on the logarithmic axis" : ""}.`;
  }

  function against(layer, kind, unit) {
    const all = zipped(layer, { y: `running_${kind}`, x: kind, error: `${kind}_error` });
    let points = all.filter((point) => point.x !== null && point.y !== null);
    const positive = points.filter((point) => point.x > 0 && point.y > 0);
    const log = kind === "var" && differMuch(positive.flatMap((point) => [point.x, point.y]));
    if (log) points = positive;
    const source = sources[data.source];
    const labels = { xLabel: `${kind} over ${source}, ${unit}`, yLabel: `running_${kind}, ${unit}` };
    const svg = plots.scatter(points, { log, name: `running_${kind}`, ...labels });
    const caption = `running_${kind} against the ${kind} over ${source}. Each point is a channel; bars show two standard errors.`;
    return figure(svg, caption + missing(all, points, log));
  }

  function perChannel(layer, name, label, caption, size = (value) => value) {
    const all = zipped(layer, { value: name });
    let items = all.filter((item) => item.value !== null).map((item) => ({ ...item, value: size(item.value) }));
    const positive = items.filter((item) => item.value > 0);
    const log = name === "running_var" && differMuch(positive.map((item) => item.value));
    if (log) items = positive;
    return figure(plots.bars(items, { log, name: label, yLabel: label }), caption + missing(all, items, log));
  }

  function drawings(layer) {
    const values = seriesOf(layer);
    const figures = [];
    for (const [kind, unit] of [["mean", "input units"], ["var", "input units\u00b2"]]) {
      if (!values[`running_${kind}`]) continue;
      if (values[kind]) figures.push(against(layer, kind, unit));
      else figures.push(perChannel(layer, `running_${kind}`, `running_${kind}`, `running_${kind} of each channel.`));
    }
    if (values.weight) figures.push(perChannel(layer, "weight", "abs(weight)", "abs(weight) of each channel.", Math.abs));
    return figures;
  }

  function missingNote(layer) {
    if (!layer.values) return data.without.channels;
    return seriesOf(layer).mean ? "" : data.without.data;
  }

  function facts(layer) {
    const list = element("dl");
    data.facts.forEach((name, place) => {
      if (layer.facts[place] === "") return;
      list.append(element("dt", name), element("dd", layer.facts[place]));
    });
    return list;
  }

  function findings(layer) {
    const list = element("ul", undefined, "layer-findings");
    for (const [level, code, message] of layer.findings) {
      const item = element("li");
      if (level) item.append(element("span", level === "info" ? "note" : level, `level ${level}`), ` ${code} `);
      item.append(message);
      list.append(item);
    }
    return list;
  }

  function draw(layer) {
    const parts = [];
    if (layer.findings.length) parts.push(findings(layer));
    if (layer.values) {
      const plotList = element("div", undefined, "plots");
      plotList.append(...drawings(layer));
      parts.push(plotList);
      if (layer.channels) {
        const counts = `${layer.channels.length.toLocaleString("en")} of ${layer.count.toLocaleString("en")} channels are drawn`;
        parts.push(element("p", `${counts}: the ones that findings name, the ones furthest off, and some of the others.`, "dim"));
      }
    }
    const note = missingNote(layer);
    if (note) parts.push(element("p", note, "note"));
    parts.push(facts(layer));
    return parts;
  }

  function open(index) {
    const layer = data.layers[index];
    current = index;
    heading.textContent = layer.name;
    body.replaceChildren(...draw(layer));
    section.hidden = false;
    document.getElementById("layer-before").disabled = index === 0;
    document.getElementById("layer-after").disabled = index === data.layers.length - 1;
    document.dispatchEvent(new CustomEvent("layer-opened", { detail: index }));
  }

  function close() {
    section.hidden = true;
    current = null;
    history.replaceState(null, "", location.pathname + location.search);
    document.dispatchEvent(new CustomEvent("layer-opened", { detail: null }));
    opener?.focus();
  }

  function follow() {
    const match = /^#layer=(\d+)$/.exec(location.hash);
    if (!match || !(Number(match[1]) < data.layers.length)) return;
    if (!section.contains(document.activeElement)) opener = document.activeElement;
    open(Number(match[1]));
    section.scrollIntoView({ block: "nearest" });
    heading.focus({ preventScroll: true });
  }

  function walk(by) {
    const next = current + by;
    if (next < 0 || next >= data.layers.length) return;
    history.replaceState(null, "", `#layer=${next}`);
    open(next);
  }

  document.getElementById("layer-before").addEventListener("click", () => walk(-1));
  document.getElementById("layer-after").addEventListener("click", () => walk(1));
  document.getElementById("layer-close").addEventListener("click", close);
  section.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowLeft") walk(-1);
    else if (event.key === "ArrowRight") walk(1);
    else if (event.key === "Escape") close();
  });
  // A link to the layer in the address does not change the hash, so no hashchange event follows.
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (link && link.getAttribute("href") === location.hash && section.hidden) setTimeout(follow);
  });
  addEventListener("hashchange", follow);
  return { follow };
})();
