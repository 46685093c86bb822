// Sorts a table by the column whose title is clicked. Without scripts, tables stay as they are.
for (const table of document.querySelectorAll("table.sortable")) {
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => {
    const button = title.querySelector("button");
    button.disabled = false;
    button.addEventListener("click", () => {
      const down = title.getAttribute("aria-sort") !== "descending";
      titles.forEach((other) => other.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        return cell.dataset.key === undefined ? cell.textContent : Number(cell.dataset.key);
      };
      const order = (a, b) => (typeof a === "number" && typeof b === "number" ? b - a : String(a).localeCompare(String(b)));
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => (down ? 1 : -1) * order(key(a), key(b)));
      table.tBodies[0].append(...rows);
    });
  });
}
