"use strict";
// The list of runs: asked again every two seconds, so that curves of running ones grow.
const chosen = new Set();
let seen = "", drawn = "";
document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
language = (navigator.language || "").startsWith("ko") ? "ko" : "en";
document.documentElement.lang = language;
const list = make("div"), curves = make("div", { class: "sheet" });
document.getElementById("page").replaceChildren(make("header", { class: "top" }, make("h1", {}, `${t("Runs")}: ${document.title}`)), make("main", {}, list, curves));
const COLOURS = ["compute", "communication", "tensor", "fault", "host"];
async function ask(path) { const answer = await fetch(path); if (!answer.ok) throw new Error(await answer.text()); return answer.json(); }
function showRuns(runs) {
  const now = JSON.stringify(runs);
  if (now === seen) return;
  seen = now;
  const head = ["Compare", "name", "state", "model", "plan", "step", "loss", "started"];
  list.replaceChildren(make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": t("Runs") }, make("table", {},
    make("thead", {}, make("tr", {}, head.map((name) => make("th", { scope: "col" }, t(name))))),
    make("tbody", {}, runs.map((run) => make("tr", {},
      make("td", {}, make("input", { type: "checkbox", checked: chosen.has(run.name), "aria-label": `${t("Compare")} ${run.name}`,
        onchange: (event) => { if (event.target.checked) chosen.add(run.name); else chosen.delete(run.name); drawn = ""; turn(); } })),
      make("td", { class: "name" }, make("a", { href: `/run/${encodeURIComponent(run.name)}` }, run.name)),
      [run.state, run.model, run.plan].map((text) => make("td", {}, text ?? "")),
      make("td", { class: "number" }, run.num_steps ? `${run.num_steps}/${run.max_steps ?? "?"}` : ""),
      make("td", { class: "number" }, typeof run.loss === "number" ? run.loss.toFixed(4) : ""), make("td", {}, run.started ?? "")))))));
}
function showCurves(all) {
  const now = JSON.stringify(all);
  if (now === drawn) return;
  drawn = now;
  const two = all.length === 2 ? [make("p", {}, make("a", { href: "/diff/" + all.map((each) => encodeURIComponent(each.name)).join("/") }, `${t("Differences")}: ${all[0].name} – ${all[1].name}`))] : [];
  const some = all.filter((each) => each.steps.length > 1);
  const xs = [...new Set(some.flatMap((each) => each.steps))].sort((a, b) => a - b);
  const lines = some.map((each, place) => {
    const known = new Map(each.steps.map((step, at) => [step, each.losses[at]]));
    return { label: each.name, values: xs.map((step) => known.get(step) ?? null), colour: COLOURS[place % COLOURS.length] };
  });
  curves.replaceChildren(...two, ...lines.length ? [make("h3", {}, t("Loss")), curve(t("Loss"), xs, lines, { x: (v) => Number.isInteger(v) ? String(v) : "", y: (v) => v.toFixed(3), label: t("step") })] : []);
}
async function turn() {
  const runs = await ask("/api/runs");
  if (!chosen.size && !seen) runs.filter((run) => run.state === "running").forEach((run) => chosen.add(run.name));
  showRuns(runs);
  const wanted = [...chosen].filter((name) => runs.some((run) => run.name === name));
  showCurves(wanted.length ? await ask("/api/loss?" + wanted.map((name) => "run=" + encodeURIComponent(name)).join("&")) : []);
}
const again = () => turn().catch((error) => console.warn(String(error))).finally(() => setTimeout(again, 2000));
again();
