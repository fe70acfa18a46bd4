"use strict";
// A table that sorts by each column and filters by text; long ones show a part first.
function makeTable(spec, title) {
  const PART = 60;
  const columns = spec.columns;
  const isText = (column) => column.type === "text" || column.type === "word";
  let shown = PART, by = spec.sort ?? -1, down = true, wanted = "";
  const body = make("tbody"), told = make("span", { class: "soft", "aria-live": "polite" });
  const more = make("button", { type: "button", onclick: () => { shown *= 4; fill(); } }, t("Show more"));
  const heads = columns.map((column, place) => make("th", { scope: "col", class: isText(column) ? "" : "number" },
    make("button", { type: "button", onclick: () => {
      down = by === place ? !down : !isText(column); by = place; fill();
    } }, t(column.title))));
  const texts = new Map();
  const textOf = (row) => {
    if (!texts.has(row)) texts.set(row, columns.map((c, i) => isText(c) ? String(row[i]) + " " + t(String(row[i])) : "").join(" ").toLowerCase());
    return texts.get(row);
  };
  function fill() {
    let rows = wanted ? spec.rows.filter((row) => textOf(row).includes(wanted)) : spec.rows.slice();
    if (by >= 0) {
      const sign = down ? -1 : 1;
      rows.sort((a, b) => {
        const [x, y] = [a[by], b[by]];
        if (x === y) return 0;
        if (x === null) return 1;
        if (y === null) return -1;
        return sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y)));
      });
    }
    heads.forEach((head, place) => place === by ? head.setAttribute("aria-sort", down ? "descending" : "ascending")
      : head.removeAttribute("aria-sort"));
    body.replaceChildren(...rows.slice(0, shown).map((row) => make("tr", {}, columns.map((column, place) => make("td", {
      class: isText(column) ? (column.title === "change" ? row[place] : place === 0 || column.wide ? "name" : "") : "number" },
      SHOWN[column.type](row[place]))))));
    more.hidden = rows.length <= shown;
    told.textContent = `${Math.min(shown, rows.length)} ${t("of")} ${rows.length} ${t("rows")}`;
  }
  const search = make("input", { type: "search", placeholder: t("filter"), "aria-label": `${t("filter")}: ${title}`,
    oninput: (event) => { wanted = event.target.value.trim().toLowerCase(); shown = PART; fill(); } });
  fill();
  return make("div", { class: "sheet" },
    spec.rows.length > 8 ? make("div", { class: "bar" }, search, told, more) : null,
    make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": title },
      make("table", {}, make("thead", {}, make("tr", {}, heads)), body)));
}
