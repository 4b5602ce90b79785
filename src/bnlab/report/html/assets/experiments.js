"use strict";
// The still picture stays until the interactive one is ready, and is the one that is printed.
for (const picture of document.querySelectorAll(".picture")) {
  const specification = picture.querySelector(".specification");
  if (specification === null) continue;
  const moving = picture.querySelector(".moving");
  const still = picture.querySelector(".still");
  const actions = { export: true, source: false, compiled: false, editor: false };
  moving.hidden = false;
  // With ast, Vega interprets its expressions, because the page forbids eval.
  vegaEmbed(moving, JSON.parse(specification.textContent), { ast: true, renderer: "svg", actions })
    .then(() => still.classList.add("only-printed"))
    .catch(() => (moving.hidden = true));
}
