"use strict";
// Hovering over the network and moving along it with the keyboard.
(() => {
  const columns = [...document.querySelectorAll("a.column")];
  const tooltip = document.getElementById("tooltip");

  for (const column of columns) {
    const title = column.querySelector("title");
    column.setAttribute("aria-label", title.textContent);
    title.remove();
    column.addEventListener("pointerenter", () => show(column));
    column.addEventListener("focus", () => column.matches(":focus-visible") && show(column));
    column.addEventListener("pointerleave", hide);
    column.addEventListener("blur", hide);
    column.addEventListener("keydown", (event) => step(event, column));
    column.tabIndex = -1;
  }
  if (columns.length) columns[0].tabIndex = 0;

  function show(column) {
    tooltip.textContent = column.getAttribute("aria-label");
    tooltip.hidden = false;
    const place = column.getBoundingClientRect();
    const size = tooltip.getBoundingClientRect();
    const left = Math.min(Math.max(8, place.left + place.width / 2 - size.width / 2), innerWidth - size.width - 8);
    const above = place.top - size.height - 6;
    tooltip.style.left = `${left + scrollX}px`;
    tooltip.style.top = `${(above > 0 ? above : place.bottom + 6) + scrollY}px`;
  }

  function hide() {
    tooltip.hidden = true;
  }

  // The network is one stop of the Tab key; the arrow keys move along it.
  function step(event, column) {
    if (event.key === "Escape") hide();
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const next = columns[columns.indexOf(column) + by];
    if (!next) return;
    event.preventDefault();
    column.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  // Merged layers share a column: mark the column that contains the layer.
  document.addEventListener("layer-opened", (event) => {
    const index = event.detail;
    for (const column of columns) {
      const [first, last] = column.dataset.layers.split(" ").map(Number);
      column.setAttribute("aria-current", String(index !== null && first <= index && index <= last));
    }
  });
  layerView.follow();
})();
