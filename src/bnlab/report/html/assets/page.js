"use strict";

(function switchTheme() {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => (button.textContent = isDark() ? "Light" : "Dark");
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("bnlab-theme", root.dataset.theme);
    } catch {
      // Without storage, the choice lasts as long as the page is open.
    }
    label();
  });
  system.addEventListener("change", label);
  label();
})();

(function sortTables() {
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => {
        const ascending = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        sortBy(table.tBodies[0], column, ascending);
      });
      head.append(button);
    });
  }

  function sortBy(body, column, ascending) {
    const rows = [...body.rows].map((row) => ({ row, key: keyOf(row.cells[column]) }));
    rows.sort((left, right) => compare(left.key, right.key, ascending ? 1 : -1));
    body.append(...rows.map((item) => item.row));
  }

  function keyOf(cell) {
    const text = (cell.dataset.value ?? cell.textContent).trim();
    // A range is sorted by its upper end.
    const last = text.split(" .. ").at(-1);
    const number = last === "" ? NaN : Number(last.replaceAll(",", ""));
    return { text, number, isEmpty: text === "" || text === "-" || text === "nan" };
  }

  // Empty cells come last in either direction.
  function compare(left, right, sign) {
    if (left.isEmpty || right.isEmpty) return left.isEmpty - right.isEmpty;
    const byNumber = left.number - right.number;
    if (!Number.isNaN(byNumber)) return sign * byNumber;
    return sign * left.text.localeCompare(right.text, undefined, { numeric: true });
  }
})();

(function filterTables() {
  for (const input of document.querySelectorAll("[data-filter-for]")) {
    const rows = [...document.getElementById(input.dataset.filterFor).tBodies[0].rows];
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const count = document.createElement("output");
    (input.closest("label") ?? input).after(count);
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, index) => {
        row.hidden = !words.every((word) => texts[index].includes(word));
        shown += !row.hidden;
      });
      count.textContent = words.length ? `${shown} of ${rows.length}` : "";
    });
  }
})();

(function copyCommands() {
  for (const button of document.querySelectorAll("button.copy")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        // The page has no access to the clipboard: select the command, so that the reader can copy it.
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => (button.textContent = "Copy"), 2000);
    });
  }
})();

(function printEverything() {
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((details) => (details.open = true));
  });
  addEventListener("afterprint", () => closed.forEach((details) => (details.open = false)));
})();
