"use strict";
// In the head, so that the page is never painted in the other theme first.
document.documentElement.classList.add("with-scripts");
try {
  const kept = localStorage.getItem("bnlab-theme");
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
} catch {
  // A page from disk may have no storage: it follows the system.
}
