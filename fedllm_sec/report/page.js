"use strict";
// A table that is wider than the screen says that it scrolls, as long as it does.
const widths = new ResizeObserver((changed) => requestAnimationFrame(() => {
  for (const { target } of changed) {
    const box = target.closest(".scroll");
    box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
  }
}));
for (const box of document.querySelectorAll(".scroll")) {
  widths.observe(box);
  for (const table of box.children) widths.observe(table);
}
// A click on a column's title sorts the table by it; a second click turns the order round. Cells without a number stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const order = down ? -1 : 1;
    const compare = (a, b) => {
      const [x, y] = [a.cells[place], b.cells[place]];
      if (x.dataset.sort === undefined) return order * x.textContent.trim().localeCompare(y.textContent.trim(), undefined, { numeric: true });
      if (x.dataset.sort === "" || y.dataset.sort === "") return (x.dataset.sort === "") - (y.dataset.sort === "");
      return order * (Number(x.dataset.sort) - Number(y.dataset.sort));
    };
    body.append(...[...body.rows].sort(compare));
  }));
}
