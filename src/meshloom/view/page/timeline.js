"use strict";
// The timeline: rows of slices that never overlap, found by binary search, so that a frame costs pixels, not slices.
async function unpack(text) {
  const raw = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}
async function readRows(data) {
  const bytes = await unpack(data.packed), rows = [];
  const total = data.rows.reduce((sum, row) => sum + row.count, 0);
  const column = (place) => new Uint32Array(bytes, 4 * total * place, total);
  const [deltas, lengths, names, nodes] = [column(0), column(1), column(2), column(3)];
  let at = 0;
  for (const row of data.rows) {
    const starts = new Float64Array(row.count), ends = new Float64Array(row.count), sums = new Float64Array(row.count + 1);
    let time = 0;
    for (let i = 0; i < row.count; i++) {
      time += deltas[at + i] * data.unit;
      starts[i] = time;
      ends[i] = time + lengths[at + i] * data.unit;
      sums[i + 1] = sums[i] + (ends[i] - starts[i]);
    }
    rows.push({ ...row, starts, ends, sums, names: names.subarray(at, at + row.count), nodes: nodes.subarray(at, at + row.count) });
    at += row.count;
  }
  return rows;
}
function firstAfter(values, limit, from = 0) { // the first index whose value is above the limit
  let low = from, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] > limit) high = middle; else low = middle + 1;
  }
  return low;
}
class Timeline {
  constructor(data, rows) {
    this.data = data; this.rows = rows; this.left = 132; this.top = 0; this.chosen = null; this.find = "";
    this.source = "both"; this.host = rows.some((row) => row.kind === "host") && !rows.some((row) => row.source === "measured" && row.kind === "compute");
    this.length = Math.max(1, ...rows.map((row) => row.count ? row.ends.reduce((a, b) => a > b ? a : b, 0) : 0));
    this.from = 0; this.to = this.length; this.frames = 0;
    this.faults = new Set(data.faults.map(([row, slice]) => row * 1e9 + slice));
    this.path = new Set((data.path || []).map(([row, slice]) => row * 1e9 + slice));
    this.flowOf = new Map();
    (data.flows || []).forEach((flow) => flow.forEach(([row, slice]) => this.flowOf.set(row * 1e9 + slice, flow)));
    this.build();
  }
  build() {
    this.canvas = make("canvas", { tabindex: "0", role: "application", "aria-label": t("Timeline") });
    this.told = make("div", { class: "told", "aria-live": "polite" },
      t("Drag or arrow keys move, Ctrl + wheel or + and − zoom, 0 shows all, n and p step through slices."));
    const button = (text, act) => make("button", { type: "button", onclick: act }, t(text));
    const sources = [...new Set(this.rows.map((row) => row.source))];
    const pick = sources.length > 1 ? make("select", { "aria-label": t("Measured and predicted"), onchange: (event) => {
      this.source = event.target.value; this.top = 0; this.draw();
    } }, ["both", ...sources].map((name) => make("option", { value: name }, t(name)))) : null;
    const host = this.rows.some((row) => row.kind === "host") ? make("label", {}, make("input", { type: "checkbox",
      checked: this.host, onchange: (event) => { this.host = event.target.checked; this.top = 0; this.draw(); } }), t("Host ops")) : null;
    const find = make("input", { type: "search", placeholder: t("Find"), "aria-label": t("Find"),
      oninput: (event) => { this.find = event.target.value.trim().toLowerCase(); this.draw(); } });
    const key = (name, text) => make("span", {}, make("i", { style: `background:var(--${name})` }), t(text));
    const scroll = (sign, text, by) => make("button", { type: "button", hidden: true, "aria-label": t(text), title: t(text),
      onclick: () => { this.top += by * this.canvas.clientHeight; this.ask(); } }, sign);
    this.scrolls = [scroll("▲", "Rows above", -0.7), scroll("▼", "Rows below", 0.7)]; // a finger moves the page, not the rows
    this.element = make("div", { class: "sheet" },
      make("div", { class: "bar" }, button("Zoom in", () => this.zoom(0.5)), button("Zoom out", () => this.zoom(2)),
        button("Whole", () => this.look(0, this.length)), this.scrolls, pick, host, find),
      make("div", { class: "legend" }, key("compute", "compute"), key("communication", "communication"), key("host", "host"),
        key("chosen", "on critical path"), this.faults.size ? key("fault", "Faults") : null),
      make("div", { class: "timeline" }, this.canvas, this.told));
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }
  shown() {
    return this.rows.map((row, place) => ({ row, place })).filter(({ row }) =>
      (this.source === "both" || row.source === this.source) && (this.host || row.kind !== "host"));
  }
  look(from, to) {
    const span = Math.min(this.length * 1.02, Math.max(20, to - from));
    this.from = Math.max(-0.01 * this.length, Math.min(from, this.length * 1.01 - span));
    this.to = this.from + span;
    this.ask();
  }
  zoom(factor, at = (this.from + this.to) / 2) { this.look(at - (at - this.from) * factor, at + (this.to - at) * factor); }
  pan(share) { const by = (this.to - this.from) * share; this.look(this.from + by, this.to + by); }
  ask() { if (!this.asked) { this.asked = true; requestAnimationFrame(() => { this.asked = false; this.draw(); }); } }
  timeAt(x) { return this.from + (x - this.left) / (this.width - this.left) * (this.to - this.from); }
  listen() {
    const canvas = this.canvas, fingers = new Map();
    let last = null, moved = 0, pinch = 0;
    canvas.addEventListener("wheel", (event) => {
      if (event.ctrlKey || event.metaKey) {
        event.preventDefault();
        this.zoom(Math.exp(event.deltaY * 0.004), this.timeAt(event.offsetX));
      } else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
        event.preventDefault();
        this.pan((event.deltaX || event.deltaY) / 800);
      } else if (this.most > 0 && !(this.top <= 0 && event.deltaY < 0) && !(this.top >= this.most && event.deltaY > 0)) {
        event.preventDefault();
        this.top += event.deltaY; this.ask();
      }
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      fingers.set(event.pointerId, event); last = event; moved = 0; pinch = 0; canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!fingers.has(event.pointerId)) return;
      fingers.set(event.pointerId, event);
      if (fingers.size === 2) {
        const [a, b] = [...fingers.values()], gap = Math.hypot(a.offsetX - b.offsetX, a.offsetY - b.offsetY);
        if (pinch) this.zoom(pinch / gap, this.timeAt((a.offsetX + b.offsetX) / 2));
        pinch = gap; moved = 9;
        return;
      }
      moved += Math.abs(event.movementX) + Math.abs(event.movementY);
      this.pan(-(event.offsetX - last.offsetX) / (this.width - this.left));
      if (event.pointerType === "mouse") this.top -= event.offsetY - last.offsetY;
      last = event; this.ask();
    });
    const up = (event) => {
      if (fingers.delete(event.pointerId) && moved < 4 && event.type === "pointerup") this.choose(event.offsetX, event.offsetY);
    };
    canvas.addEventListener("pointerup", up);
    canvas.addEventListener("pointercancel", up);
    canvas.addEventListener("dblclick", (event) => this.zoom(0.4, this.timeAt(event.offsetX)));
    canvas.addEventListener("keydown", (event) => {
      const keys = { ArrowLeft: () => this.pan(-0.15), ArrowRight: () => this.pan(0.15), a: () => this.pan(-0.15), d: () => this.pan(0.15),
        "+": () => this.zoom(0.6), "=": () => this.zoom(0.6), w: () => this.zoom(0.6), "-": () => this.zoom(1.6), s: () => this.zoom(1.6),
        0: () => this.look(0, this.length), ArrowDown: () => { this.top += 40; this.ask(); }, ArrowUp: () => { this.top -= 40; this.ask(); },
        n: () => this.step(1), p: () => this.step(-1) };
      if (keys[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey) { event.preventDefault(); keys[event.key](); }
    });
  }
  step(by) {
    const shown = this.shown().filter(({ row }) => row.count);
    if (!shown.length) return;
    const [place, slice] = this.chosen || [shown[0].place, by > 0 ? -1 : 1], row = this.rows[place];
    const next = Math.max(0, Math.min(row.count - 1, slice + by)), middle = (row.starts[next] + row.ends[next]) / 2;
    this.chosen = [place, next]; this.tell();
    if (middle < this.from || middle > this.to) { const half = (this.to - this.from) / 2; this.look(middle - half, middle + half); }
    this.ask();
  }
  choose(x, y) {
    const line = this.lines.find((each) => y >= each.y && y < each.y + each.high);
    if (!line) return;
    const time = this.timeAt(x), slack = (this.to - this.from) / this.width * 2, row = line.row;
    const slice = Math.min(row.count - 1, firstAfter(row.ends, time - slack));
    this.chosen = slice >= 0 && row.starts[slice] <= time + slack ? [line.place, slice] : null;
    this.tell(); this.ask();
  }
  tell() {
    if (!this.chosen) { this.told.textContent = ""; return; }
    const [place, slice] = this.chosen, row = this.rows[place], name = this.data.names[row.names[slice]];
    const parts = [`${t("rank")} ${row.rank} ${t(row.source)}, ${row.name}`, `${t("start")} ${duration(row.starts[slice])}`,
      `${t("duration")} ${duration(row.ends[slice] - row.starts[slice])}`, `node ${row.nodes[slice]}`];
    const mate = this.flowOf.get(place * 1e9 + slice);
    if (mate) parts.push(`${t("ranks")}: ${mate.map(([other]) => this.rows[other].rank).join(", ")}`);
    if (this.path.has(place * 1e9 + slice)) parts.push(t("on critical path"));
    if (this.faults.has(place * 1e9 + slice)) parts.push(t("Faults"));
    this.told.replaceChildren(make("b", {}, name), make("br"), parts.join(" · "));
  }
  draw() {
    const canvas = this.canvas, ratio = window.devicePixelRatio || 1;
    if (!canvas.clientWidth) return;
    const all = this.shown(), high = (row) => row.kind === "host" ? 11 : 18;
    const ranks = new Set(all.map(({ row }) => row.rank + row.source)).size;
    const whole = all.reduce((sum, { row }) => sum + high(row) + 2, 18 * ranks + 34);
    const wanted = Math.round(Math.min(Math.max(160, whole), Math.max(440, 0.7 * window.innerHeight))) + "px";
    if (canvas.style.height !== wanted) canvas.style.height = wanted;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    }
    this.width = width; this.left = width < 500 ? 84 : 132;
    const pen = canvas.getContext("2d"), paint = this.paint();
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.fillStyle = paint.ground; pen.fillRect(0, 0, width, height);
    this.axis(pen, width, height, paint);
    let y = 24, label = "";
    this.most = Math.max(0, whole - height);
    this.scrolls.forEach((each) => { each.hidden = !this.most; });
    this.top = Math.max(0, Math.min(this.top, this.most));
    y -= this.top; this.lines = [];
    pen.save(); pen.beginPath(); pen.rect(0, 22, width, height - 22); pen.clip();
    for (const { row, place } of all) {
      const head = `${t("rank")} ${row.rank} ${t(row.source)}`;
      if (head !== label) {
        label = head;
        if (y > 0 && y < height) { pen.fillStyle = paint.text; pen.font = "600 11px system-ui"; pen.fillText(head, 6, y + 14); }
        y += 18;
      }
      const line = { row, place, y, high: high(row) };
      y += line.high + 2;
      if (line.y + line.high < 22 || line.y > height) continue;
      this.lines.push(line);
      pen.fillStyle = paint.soft; pen.font = "10px system-ui";
      if (!row.lane) pen.fillText(row.name.slice(0, width < 500 ? 13 : 22), 10, line.y + line.high / 2 + 4);
      this.slices(pen, line, width, paint);
    }
    this.links(pen);
    if (this.most) { // what part of the rows is seen
      pen.fillStyle = paint.soft; pen.globalAlpha = 0.6;
      pen.fillRect(width - 5, 22 + (height - 22) * this.top / whole, 4, (height - 22) * height / whole); pen.globalAlpha = 1;
    }
    pen.restore();
    this.frames++;
  }
  paint() {
    const now = document.documentElement.dataset.theme;
    if (!this.colours || this.theme !== now) {
      this.theme = now;
      this.colours = Object.fromEntries(["ground", "panel", "line", "text", "soft", "compute", "communication", "host", "fault", "chosen"].map((name) => [name, colour(name)]));
    }
    return this.colours;
  }
  axis(pen, width, height, paint) {
    const span = this.to - this.from, rough = span / Math.max(3, (width - this.left) / 110), power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((each) => each * power >= rough);
    pen.font = "11px system-ui";
    for (let time = Math.ceil(this.from / step) * step; time < this.to; time += step) {
      const x = this.left + (time - this.from) / span * (width - this.left);
      pen.fillStyle = paint.line; pen.fillRect(x, 18, 1, height);
      pen.fillStyle = paint.soft; pen.fillText(time ? brief(duration(time)) : "0", x + 3, 13);
    }
  }
  slices(pen, { row, place, y, high }, width, paint) {
    const scale = (width - this.left) / (this.to - this.from), first = firstAfter(row.ends, this.from);
    const last = firstAfter(row.starts, this.to), base = paint[row.kind];
    pen.fillStyle = paint.panel; pen.fillRect(this.left, y, width - this.left, high);
    const many = last - first > 2 * (width - this.left) && !this.find;
    pen.save(); pen.beginPath(); pen.rect(this.left, y, width - this.left, high); pen.clip();
    if (many) this.dense(pen, row, first, last, y, high, width, scale, base);
    else this.single(pen, row, place, first, last, y, high, scale, base, paint);
    pen.restore();
  }
  dense(pen, row, first, last, y, high, width, scale, base) { // a pixel shows what share of its time is covered
    pen.fillStyle = base;
    let at = first, begin = -1, shade = -1;
    const flush = (x) => { if (shade > 0) { pen.globalAlpha = 0.25 + 0.75 * shade / 8; pen.fillRect(begin, y, x - begin, high); } };
    for (let x = this.left; x < width; x++) {
      const until = this.from + (x + 1 - this.left) / scale, next = firstAfter(row.starts, until, at);
      const low = until - 1 / scale;
      let busy = row.sums[next] - row.sums[at];
      if (next > at) busy -= Math.max(0, low - row.starts[at]) + Math.max(0, row.ends[next - 1] - until);
      const now = busy <= 0 ? 0 : Math.max(1, Math.min(8, Math.round(8 * busy * scale)));
      if (now !== shade) { flush(x); shade = now; begin = x; }
      at = next > at && row.ends[next - 1] > until ? next - 1 : next;
      if (at >= last) { flush(x + 1); shade = 0; break; }
    }
    flush(width); pen.globalAlpha = 1;
  }
  single(pen, row, place, first, last, y, high, scale, base, paint) {
    const names = this.data.names;
    for (let i = first; i < last; i++) {
      const x = this.left + (row.starts[i] - this.from) * scale, wide = Math.max(0.7, (row.ends[i] - row.starts[i]) * scale);
      const key = place * 1e9 + i, name = names[row.names[i]];
      pen.globalAlpha = this.find && !name.toLowerCase().includes(this.find) ? 0.15 : 0.7 + (row.names[i] * 37 % 31) / 100;
      pen.fillStyle = base; pen.fillRect(x, y, wide > 3 ? wide - 0.6 : wide, high);
      pen.globalAlpha = 1;
      if (this.path.has(key)) { pen.fillStyle = paint.chosen; pen.fillRect(x, y + high - 3, wide, 3); }
      if (this.faults.has(key)) { pen.fillStyle = paint.fault; pen.fillRect(x - 1, y, Math.max(3, wide + 2), 4); }
      if (this.chosen && this.chosen[0] === place && this.chosen[1] === i) {
        pen.strokeStyle = paint.text; pen.lineWidth = 2; pen.strokeRect(x, y + 1, Math.max(2, wide), high - 2);
      }
      if (wide > 34 && high > 10) {
        pen.fillStyle = paint.ground; pen.font = "11px system-ui";
        const from = Math.max(x, this.left), room = Math.floor((x + wide - from - 6) / 6);
        if (room > 2) pen.fillText(name.length > room ? name.slice(0, room - 1) + "…" : name, from + 4, y + high / 2 + 4);
      }
    }
  }
  links(pen) {
    if (!this.chosen) return;
    const flow = this.flowOf.get(this.chosen[0] * 1e9 + this.chosen[1]);
    if (!flow) return;
    const scale = (this.width - this.left) / (this.to - this.from);
    const ends = flow.map(([place, slice]) => [this.lines.find((line) => line.place === place), slice]).filter(([line]) => line);
    pen.strokeStyle = this.colours.text; pen.lineWidth = 1.2; pen.beginPath();
    ends.forEach(([line, slice], place) => {
      const x = Math.max(this.left, this.left + (line.row.starts[slice] - this.from) * scale), y = line.y + line.high / 2;
      if (place) pen.lineTo(x, y); else pen.moveTo(x, y);
    });
    pen.stroke();
  }
}
