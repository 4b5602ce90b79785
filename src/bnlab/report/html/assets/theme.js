"use strict";
// This runs in the head, so the page is never painted in the wrong theme first.
document.documentElement.classList.add("with-scripts");
try {
  const kept = localStorage.getItem("bnlab-theme");
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
} catch {
  // A page from disk may have no storage. It then follows the theme of the system.
}
