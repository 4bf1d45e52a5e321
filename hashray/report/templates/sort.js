// Sorts a table by the column whose header is clicked; a second click turns the order around.
const number = (text) => {
  const match = /^[-+]?(\d[\d,]*)?\.?\d+(e[-+]?\d+)?|^[-+]?\d/i.exec(text);
  return match ? Number(match[0].replaceAll(",", "")) : NaN;
};
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.parentElement;
    const body = header.closest("table").tBodies[0];
    const text = (row) => row.cells[header.cellIndex].textContent.trim();
    const empty = (row) => ["", "-", "float"].includes(text(row));
    const rows = [...body.rows];
    const numeric = rows.every((row) => empty(row) || !Number.isNaN(number(text(row))));
    const down = header.ariaSort === "ascending";
    const compare = (a, b) =>
      empty(a) - empty(b) ||
      (down ? -1 : 1) * (numeric ? number(text(a)) - number(text(b)) : text(a).localeCompare(text(b), "en", { numeric: true }));
    for (const other of header.parentElement.cells) if (other.ariaSort) other.ariaSort = "none";
    header.ariaSort = down ? "descending" : "ascending";
    body.append(...rows.sort(compare));
  });
}
