"use strict";

// The number or text behind a cell; null where it is empty, which sorts last in either direction.
function valueOf(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  return cell.title || cell.textContent || null;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortBy(heading) {
  const body = heading.closest("table").tBodies[0];
  const column = heading.cellIndex;
  const down = heading.getAttribute("aria-sort") === "ascending";
  const keyed = [...body.rows].map((row) => [valueOf(row, column), row]);
  keyed.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return down ? compare(b, a) : compare(a, b);
  });
  body.append(...keyed.map(([, row]) => row));
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
}

function filterCards() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/);
  const failedOnly = document.getElementById("failed").checked;
  for (const card of document.querySelectorAll(".card")) {
    const text = card.textContent.toLowerCase();
    const wanted = words.every((word) => text.includes(word));
    card.hidden = !wanted || (failedOnly && card.dataset.status === "ok");
  }
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortBy(button.parentElement));
}
document.getElementById("filter").addEventListener("input", filterCards);
document.getElementById("failed").addEventListener("change", filterCards);
