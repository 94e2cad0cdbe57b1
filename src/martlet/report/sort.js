// Column headers become buttons that sort: without JavaScript the table is only not sortable.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const ascending = header.getAttribute("aria-sort") === "descending";
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = new Intl.Collator(undefined, { numeric: true });
      const compare = (a, b) =>
        "value" in a.cells[column].dataset ? value(a) - value(b) : order.compare(value(a), value(b));
      const rows = [...body.rows].sort(compare);
      body.append(...(ascending ? rows : rows.reverse()));
      for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    });
  });
}
