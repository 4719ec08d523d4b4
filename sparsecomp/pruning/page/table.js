"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent.trim();
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const number = head.classList.contains("n"), before = head.getAttribute("aria-sort");
    // figures begin with the largest, names with the first
    const down = before ? before === "ascending" : number && i > 0;
    for (const each of heads) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const order = (a, b) => number ? parseFloat(a) - parseFloat(b) : a.localeCompare(b, "en", { numeric: true });
    // what has no value comes last either way
    rows.sort((a, b) => {
      const x = value(a, i), y = value(b, i);
      if (x === "" || y === "") return (x === "") - (y === "");
      return (down ? -1 : 1) * order(x, y);
    });
    body.append(...rows);
  }));
  const filter = table.closest("section").querySelector(".filter");
  const input = filter.querySelector("input"), shown = filter.querySelector("output");
  filter.hidden = false;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
      count += !row.hidden;
    }
    shown.textContent = `${count} of ${rows.length}`;
  });
}
