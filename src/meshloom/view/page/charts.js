"use strict";
// Curves by uPlot; the roofline, the matrix and the device grid by hand.
function curve(title, times, series, format, marks) {
  const box = make("div", { class: "chart", role: "img", "aria-label": title });
  const axis = () => ({ stroke: colour("text"), grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line") } });
  const build = () => {
    const wide = Math.max(260, box.clientWidth - 12);
    const lines = [...series, ...(marks || []).map((mark) => ({ ...mark, values: times.map(() => mark.value), dash: [6, 4] }))];
    box.replaceChildren();
    new uPlot({
      width: wide, height: 220, cursor: { drag: { x: true, y: false } }, scales: { x: { time: false } },
      axes: [{ ...axis(), space: 90, values: (_, all) => all.map((each) => brief(format.x(each))) }, { ...axis(), size: 76, values: (_, all) => all.map((each) => brief(format.y(each))) }],
      series: [{ label: format.label, value: (_, each) => each === null ? "" : format.x(each) },
        ...lines.map((line) => ({ label: line.label, stroke: colour(line.colour), width: 1.6, dash: line.dash, points: { show: false },
          value: (_, each) => each === null || each === undefined ? "" : format.y(each) }))],
    }, [times, ...lines.map((line) => line.values)], box);
  };
  requestAnimationFrame(build);
  new ResizeObserver(() => { if (box.clientWidth && Math.abs(box.clientWidth - (box.seen || 0)) > 20) { box.seen = box.clientWidth; build(); } }).observe(box);
  return box;
}
function rooflinePlot(roofline) {
  const points = roofline.points, roofs = roofline.roofs, W = 900, H = 380, L = 78, B = 44, R = roofs ? 190 : 20; // the names of the roofs stand right of them
  const peaks = roofs ? Object.entries(roofs.flops_per_second) : [];
  const xs = points.map((p) => p.intensity).concat(roofs ? peaks.map(([, peak]) => peak / roofs.memory_bytes_per_second) : []);
  const ys = points.map((p) => p.flops_per_second).concat(peaks.map(([, peak]) => peak));
  const log = Math.log10, [x0, x1] = [Math.floor(log(Math.min(...xs))), Math.ceil(log(Math.max(...xs)) + 0.01)];
  const [y0, y1] = [Math.floor(log(Math.min(...ys))), Math.ceil(log(Math.max(...ys)) + 0.01)];
  const X = (v) => L + (log(v) - x0) / (x1 - x0) * (W - L - R), Y = (v) => H - B - (log(v) - y0) / (y1 - y0) * (H - B - 16);
  const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": t("Roofline") });
  for (let e = x0; e <= x1; e++) svg.append(draw("line", { x1: X(10 ** e), x2: X(10 ** e), y1: 16, y2: H - B, stroke: "var(--line)" }), draw("text", { x: X(10 ** e), y: H - B + 18, "text-anchor": "middle" }, String(10 ** e)));
  for (let e = y0; e <= y1; e++) svg.append(draw("line", { x1: L, x2: W - R, y1: Y(10 ** e), y2: Y(10 ** e), stroke: "var(--line)" }), draw("text", { x: L - 8, y: Y(10 ** e) + 4, "text-anchor": "end" }, si(10 ** e, "").replace(".00", "")));
  svg.append(draw("text", { x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle" }, t("FLOP a byte")), draw("text", { x: L + 6, y: 12 }, "FLOP/s"));
  if (roofs) {
    const top = Math.max(...peaks.map(([, peak]) => peak)), knee = top / roofs.memory_bytes_per_second;
    const from = 10 ** x0, low = Math.max(from * roofs.memory_bytes_per_second, 10 ** y0);
    svg.append(draw("path", { d: `M${X(low / roofs.memory_bytes_per_second)} ${Y(low)}L${X(knee)} ${Y(top)}`, stroke: "var(--fault)", fill: "none", "stroke-width": 2 }));
    const alike = new Map(); // dtypes of one speed share a line
    for (const [name, peak] of peaks) alike.set(peak, [...(alike.get(peak) || []), name]);
    let below = H;
    for (const [peak, names] of [...alike].sort((a, b) => a[0] - b[0])) {
      below = Math.min(below - 14, Y(peak) + 4);
      svg.append(draw("line", { x1: X(peak / roofs.memory_bytes_per_second), x2: W - R, y1: Y(peak), y2: Y(peak), stroke: "var(--fault)", "stroke-width": 1.5 }),
        draw("text", { x: W - R + 6, y: below }, `${names.join(", ")} ${brief(si(peak, "FLOP/s"))}`));
    }
  }
  const most = Math.max(1, ...points.map((p) => p.time_ns));
  for (const p of points) svg.append(draw("circle", { cx: X(p.intensity), cy: Y(p.flops_per_second), r: 3 + 9 * Math.sqrt(p.time_ns / most),
    fill: p.kind === "gemm" || p.kind === "attention" ? "var(--compute)" : "var(--tensor)", "fill-opacity": 0.65, stroke: "var(--ground)" },
  draw("title", {}, `${p.name}: ${p.intensity.toFixed(2)} FLOP/B, ${si(p.flops_per_second, "FLOP/s")}, ${duration(p.time_ns)}`)));
  return make("div", { class: "chart" }, svg);
}
function matrixPlot(ranks, table) {
  const n = ranks.length, side = Math.max(3, Math.min(36, Math.floor(560 / n))), size = n * side;
  const canvas = make("canvas", { width: size + 44, height: size + 24, role: "img", style: "max-width:100%",
    "aria-label": t("Bytes each rank sends to each other, collectives as a ring moves them") });
  const pen = canvas.getContext("2d"), most = Math.max(1, ...table.map((row) => Math.max(...row)));
  pen.fillStyle = colour("ground"); pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.font = "11px system-ui"; pen.textAlign = "center";
  const every = Math.max(1, Math.ceil(26 / side));
  ranks.forEach((rank, i) => {
    if (i % every === 0) { pen.fillStyle = colour("text"); pen.fillText(rank, 44 + i * side + side / 2, 14); pen.fillText(rank, 22, 24 + i * side + side / 2 + 4); }
    table[i].forEach((value, j) => {
      pen.fillStyle = colour("panel"); pen.fillRect(44 + j * side, 24 + i * side, side - 1, side - 1);
      if (value) { pen.globalAlpha = 0.15 + 0.85 * value / most; pen.fillStyle = colour("communication"); pen.fillRect(44 + j * side, 24 + i * side, side - 1, side - 1); pen.globalAlpha = 1; }
    });
  });
  return make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": t("Communication") }, canvas,
    make("div", { class: "legend", style: "padding:.2rem .6rem" }, make("span", { class: "soft" }, `${t("from")} ↓ · ${t("to")} →`),
      make("span", {}, make("i", { style: "background:var(--communication)" }), si(most, "B"))));
}
function deviceGrid(grid) {
  return make("div", { class: "stages", tabindex: "0", role: "region", "aria-label": t("Devices") }, grid.stages.map((stage, pp) =>
    make("div", { class: "stage" }, make("span", { class: "soft" }, `pp ${pp}`), stage.map((group) =>
      make("div", { class: "group" }, group.map((device) => make("div", { class: device.traced ? "device" : "device out", title: device.title }, String(device.rank))))))));
}
function sharesBars(rows) {
  const part = (name, share) => make("div", { style: `width:${100 * share}%;background:var(--${name})`, title: `${(100 * share).toFixed(1)} %` });
  return make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": t("Where the time went") }, make("table", {}, make("thead", {}, make("tr", {},
    ["rank", "share", "compute", "exposed communication", "idle", "gaps"].map((name, place) => make("th", { scope: "col", class: place > 1 ? "number" : "" }, t(name))))),
  make("tbody", {}, rows.slice(0, 64).map((row) => make("tr", {}, make("td", {}, String(row.rank)),
    make("td", {}, make("div", { class: "stack" }, part("compute", row.compute), part("communication", row.exposed))),
    ["compute", "exposed", "idle"].map((name) => make("td", { class: "number" }, (100 * row[name]).toFixed(1) + " %")), make("td", { class: "number" }, String(row.gaps)))))));
}
