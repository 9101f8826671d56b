// A click on a column's head sorts its table, another one turns it round.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const number = (row, k) => {
    const text = row.cells[k].firstChild?.textContent ?? "";
    const value = parseFloat(text);
    return Number.isNaN(value) ? -Infinity : value;
  };
  table.querySelectorAll("thead th").forEach((head, k) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      table.querySelectorAll("th").forEach((x) => x.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const text = k === 0 || head.classList.contains("text");
      const compare = (a, b) =>
        text
          ? b.cells[k].textContent.localeCompare(a.cells[k].textContent)
          : number(b, k) - number(a, k);
      const rows = [...body.rows].sort((a, b) => (up ? -compare(a, b) : compare(a, b)));
      // What the paper reports is on another protocol, and stays below.
      const of_paper = (row) => row.classList.contains("paper");
      body.append(...rows.filter((x) => !of_paper(x)), ...rows.filter(of_paper));
    });
  });
}
