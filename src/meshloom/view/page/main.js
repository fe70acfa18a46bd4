"use strict";
// Builds the page from the data; again when theme or language change.
const DATA = JSON.parse(document.getElementById("data").textContent);
const timelines = [];
window.meshloom = { timelines, ready: false };
const kept = { get: (name) => { try { return localStorage.getItem(name); } catch { return null; } },
  set: (name, value) => { try { localStorage.setItem(name, value); } catch { /* a page from a file may not keep anything */ } } };
const card = (value, title) => value === null || value === undefined || value === "" ? null : make("div", { class: "card" }, make("b", {}, String(value)), make("span", {}, t(title)));
function section(title, ...inside) { return inside.flat().some((each) => each) ? [make("h3", {}, t(title)), ...inside] : []; }
const table = (spec, title) => spec && spec.rows.length ? makeTable(spec, t(title)) : null;

function overview() {
  const run = DATA.run, steps = DATA.steps, parts = [];
  const cards = [card(run.state && t(run.state), "state"), card(run.model, "model"), card(run.plan, "plan")];
  if (steps.length) {
    const speeds = steps.filter((each) => !each.recorded && each.tokens_per_second).map((each) => each.tokens_per_second).sort((a, b) => a - b);
    cards.push(card(steps.length, "steps"), card(`${steps[0].loss.toFixed(3)} → ${steps.at(-1).loss.toFixed(3)}`, "loss"));
    if (speeds.length) cards.push(card(Math.round(speeds[speeds.length >> 1]).toLocaleString("en"), "tokens/s, median"));
  }
  parts.push(make("div", { class: "cards" }, cards));
  if (steps.length > 1) {
    const xs = steps.map((each) => each.step + 1), x = (v) => Number.isInteger(v) ? String(v) : "";
    parts.push(section("Loss", curve(t("Loss"), xs, [{ label: t("loss"), values: steps.map((e) => e.loss), colour: "compute" }], { x, y: (v) => v.toFixed(3), label: t("step") })));
    if (steps.some((each) => each.memory_bytes)) {
      const limit = DATA.scenes.map((scene) => scene.memory && scene.memory.capacity).find((each) => each);
      parts.push(section("Memory", make("p", { class: "soft" }, t("what the training held at each step")),
        curve(t("Memory"), xs, [{ label: t("memory"), values: steps.map((e) => e.memory_bytes ?? null), colour: "tensor" }], { x, y: (v) => si(v, "B"), label: t("step") },
          limit && run.on_device ? [{ label: t("capacity"), value: limit, colour: "fault" }] : [])));
    }
  }
  return parts.flat();
}
function faults(scene) {
  if (!scene.findings.total) return [make("p", { class: "soft" }, t("No fault found: ids, dependencies, cycles, and collectives across ranks."))];
  return [make("p", { class: "bad" }, `${scene.findings.total} ${t("faults")}`), make("div", { class: "faults", tabindex: "0", role: "region", "aria-label": t("Faults") },
    make("ul", {}, scene.findings.shown.map((text) => make("li", {}, text))))];
}
function chapter(scene, place) {
  const parts = [make("h2", { id: `scene${place}` }, scene.name)];
  parts.push(make("div", { class: "cards" }, Object.entries(scene.facts).map(([name, value]) => card(value, name)),
    Object.entries(scene.steps).map(([source, step]) => card(duration(step.step_ns), `step time, ${source}`))));
  parts.push(section("Faults", ...faults(scene)));
  const hole = make("div", {}, make("p", { class: "soft" }, "…"));
  if (scene.timeline) {
    parts.push(section("Timeline", hole));
    readRows(scene.timeline).then((rows) => { const line = new Timeline(scene.timeline, rows); timelines.push(line); hole.replaceChildren(line.element); line.draw(); window.meshloom.ready = true; })
      .catch((error) => { hole.replaceChildren(make("p", { class: "bad" }, String(error))); });
  } else parts.push(make("p", { class: "soft" }, t("Nothing was timed: run `meshloom simulate` or record a step.")));
  for (const [source, rows] of Object.entries(scene.shares)) parts.push(section("Where the time went", make("p", { class: "soft" }, t(source)), sharesBars(rows)));
  parts.push(section("Longest gaps", table(scene.gaps, "Longest gaps")));
  parts.push(section("Measured and predicted", table(scene.compare, "Measured and predicted")));
  parts.push(section("Ops", table(scene.ops, "Ops")), section("Modules", table(scene.modules, "Modules")), section("Layers", table(scene.layers, "Layers")));
  if (scene.matrix) parts.push(section("Communication", make("p", { class: "soft" }, t("Bytes each rank sends to each other, collectives as a ring moves them")), matrixPlot(scene.matrix.ranks, scene.matrix.table), table(scene.matrix.pairs, "Communication")));
  parts.push(section("Collectives and messages", table(scene.collectives, "Collectives and messages")));
  if (scene.memory && scene.memory.times.length > 1) parts.push(section("Memory", make("p", { class: "soft" }, `${t("What a rank's results take, from their making to their last use")} (${t("rank")} ${scene.memory.rank}); ${t("peak")} ${si(Math.max(...scene.memory.values), "B")}${scene.memory.capacity ? `, ${t("capacity")} ${si(scene.memory.capacity, "B")}` : ""}`),
    curve(t("Memory"), scene.memory.times, [{ label: t("bytes"), values: scene.memory.values, colour: "tensor" }], { x: duration, y: (v) => si(v, "B"), label: t("time") }, scene.memory.capacity && Math.max(...scene.memory.values) > 0.05 * scene.memory.capacity ? [{ label: t("capacity"), value: scene.memory.capacity, colour: "fault" }] : [])));
  if (scene.roofline && scene.roofline.points.length) parts.push(section("Roofline", make("p", { class: "soft" }, [scene.roofline.times ? t(scene.roofline.times) : "", scene.roofline.roofs ? scene.roofline.roofs.name : ""].filter((each) => each).join(", ")), rooflinePlot(scene.roofline)));
  if (scene.path) parts.push(section("Critical path", make("div", { class: "cards" }, Object.entries(scene.path.parts).map(([name, value]) => card(duration(value), name))), table(scene.path.rows, "Critical path")));
  if (scene.grid) parts.push(section("Devices", make("p", { class: "soft" }, t("devices, by stage and group")), deviceGrid(scene.grid)));
  return parts.flat(3);
}
function differences() {
  const side = (facts, letter) => card(`${facts.name}${facts.step_ns ? ", " + duration(facts.step_ns) : ""}`, `${letter} ${facts.times || ""}`);
  return [make("div", { class: "cards" }, side(DATA.a, "A"), side(DATA.b, "B")), section("Ops", table(DATA.ops, "Ops")), section("Collectives and messages", table(DATA.collectives, "Collectives and messages"))].flat(2);
}
function build() {
  const root = document.documentElement;
  root.lang = language;
  timelines.length = 0; window.meshloom.ready = false;
  const dark = root.dataset.theme === "dark";
  const top = make("header", { class: "top" }, make("h1", {}, DATA.name),
    make("button", { type: "button", id: "language", lang: language === "ko" ? "en" : "ko", onclick: () => { language = language === "ko" ? "en" : "ko"; kept.set("language", language); build(); } }, language === "ko" ? "English" : "한국어"),
    make("button", { type: "button", id: "theme", onclick: () => { root.dataset.theme = dark ? "light" : "dark"; kept.set("theme", root.dataset.theme); build(); } }, t(dark ? "Light" : "Dark")));
  const main = make("main", {});
  if (DATA.kind === "diff") main.append(...differences());
  else {
    if (DATA.scenes.length > 1) main.append(make("nav", { "aria-label": t("Overview") }, DATA.scenes.map((scene, place) => make("a", { href: `#scene${place}` }, scene.name))));
    main.append(...overview(), ...DATA.scenes.flatMap(chapter));
  }
  document.getElementById("page").replaceChildren(top, main);
  if (DATA.kind === "diff" || !DATA.scenes.some((scene) => scene.timeline)) window.meshloom.ready = true;
}
language = kept.get("language") || (navigator.language || "").startsWith("ko") && "ko" || "en";
document.documentElement.dataset.theme = kept.get("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
build();
