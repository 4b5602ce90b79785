"use strict";
// The still picture stays until the other is there, and is what is printed.
for (const picture of document.querySelectorAll(".picture")) {
  const specification = picture.querySelector(".specification");
  if (specification === null) continue;
  const moving = picture.querySelector(".moving");
  const still = picture.querySelector(".still");
  const actions = { export: true, source: false, compiled: false, editor: false };
  moving.hidden = false;
  // ast: expressions are interpreted, because the page forbids eval.
  vegaEmbed(moving, JSON.parse(specification.textContent), { ast: true, renderer: "svg", actions })
    .then(() => still.classList.add("only-printed"))
    .catch(() => (moving.hidden = true));
}
