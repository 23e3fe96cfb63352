// Sorts a table by the column whose heading is pressed: first descending for numbers, then the other way.
for (const heading of document.querySelectorAll("table.sortable thead th")) {
  const button = heading.querySelector("button");
  if (!button) continue;
  button.addEventListener("click", () => {
    const table = heading.closest("table");
    const column = [...heading.parentNode.children].indexOf(heading);
    const rows = [...table.tBodies[0].rows];
    const numeric = !heading.classList.contains("text");
    const value = (row) => {
      const cell = row.cells[column];
      return numeric ? (cell.dataset.value ?? "") : cell.textContent.trim();
    };
    const before = heading.getAttribute("aria-sort");
    const up = before ? before === "descending" : !numeric;
    const order = (a, b) =>
      numeric ? Number(value(a) || "-Infinity") - Number(value(b) || "-Infinity")
              : value(a).localeCompare(value(b));
    rows.sort((a, b) => (up ? order(a, b) : order(b, a)));
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    table.tBodies[0].append(...rows);
  });
}
