"use strict";
/* Key figures and tables. */

report.tables = (() => {
  const { element, byId, shown } = report.dom;

  function table({ title, columns, rows, note }) {
    const isNumber = (cell) => /^[-−–]?[\d.,]*( \[.*\])?%?$/.test(cell);
    const head = element("tr", null, columns.map((column) => element("th", { scope: "col" }, column)));
    const body = rows.map((row) =>
      element("tr", null, row.map((cell, at) =>
        at === 0
          ? element("th", { scope: "row" }, cell)
          : element("td", { class: isNumber(cell) ? "number" : false }, cell),
      )),
    );
    return element("section", { class: "card" }, element("h2", null, title),
      element("div", { class: "scroll" }, element("table", null, element("thead", null, head), element("tbody", null, body))),
      note ? element("p", { class: "note" }, note) : null);
  }

  function figures(runs) {
    const names = [...new Set(runs.flatMap((run) => run.figures.map((figure) => figure.name)))];
    if (!names.length) return null;
    const columns = ["metric", ...(runs.length > 1 ? ["run"] : []), "first step", "last step", "least", "most"];
    const rows = names.flatMap((name) =>
      runs.flatMap((run) => {
        const found = run.figures.find((figure) => figure.name === name);
        if (!found) return [];
        const numbers = [found.first, found.last, found.min, found.max].map((value) => shown(value));
        return [[name, ...(runs.length > 1 ? [run.name] : []), ...numbers]];
      }),
    );
    return table({ title: "Key figures", columns, rows, note: "" });
  }

  function update(data) {
    const several = data.runs.length > 1;
    const drawn = data.runs.flatMap((run) => [
      several ? element("h2", { class: "run" }, run.name) : null,
      ...run.tables.map(table),
    ]);
    byId("tables").replaceChildren(...[figures(data.runs), ...drawn].filter(Boolean));
  }

  return { update };
})();
