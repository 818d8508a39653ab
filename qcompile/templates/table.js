"use strict";
// Tables sort by the buttons in their headers and are filtered by module path.

function key(row, column, kind) {
  const cell = row.cells[column];
  const text = cell.dataset.key ?? cell.textContent.trim();
  if (text === "none" || text === "") return null;
  return kind === "number" ? Number(text) : text;
}

function compare(a, b) {
  return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
}

function sort(table, header) {
  const order = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const keyed = Array.from(table.tBodies[0].rows, (row) => [
    key(row, header.cellIndex, header.dataset.kind), row,
  ]);
  // What has no value comes last either way.
  keyed.sort(([a], [b]) =>
    a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b));
  table.tBodies[0].append(...keyed.map(([, row]) => row));
}

// As recipes match: a glob over the whole path; without * or ?, any part of it.
function matcher(text) {
  const wanted = text.trim().toLowerCase();
  if (!/[*?]/.test(wanted)) return (path) => path.toLowerCase().includes(wanted);
  const escaped = wanted.replace(/[.+^${}()|[\]\\]/g, "\\$&");
  const glob = new RegExp(`^${escaped.replaceAll("*", ".*").replaceAll("?", ".")}$`);
  return (path) => glob.test(path.toLowerCase());
}

function filter(table, bar) {
  const matches = matcher(bar.querySelector("input[type=search]").value);
  const only = bar.querySelector("input[type=checkbox]:checked")?.dataset.only;
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    row.hidden = !matches(row.dataset.path) || (only !== undefined && !(only in row.dataset));
    shown += !row.hidden;
  }
  bar.querySelector("output").textContent = `${shown} of ${table.tBodies[0].rows.length}`;
}

for (const table of document.querySelectorAll("table.ops")) {
  for (const header of table.tHead.rows[0].cells) {
    header.querySelector("button").addEventListener("click", () => sort(table, header));
  }
  const bar = document.querySelector(`[data-filters="${table.id}"]`);
  bar.hidden = false;
  bar.addEventListener("input", () => filter(table, bar));
}
