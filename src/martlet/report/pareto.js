// Draws the points on two chosen axes. Text only ever enters as text, so that no name can become markup.
const { axes, points, limits, ...first } = JSON.parse(document.getElementById("data").textContent);
const chart = document.getElementById("chart");
const detail = document.getElementById("detail");
const outside = document.getElementById("outside");
const [across, up, all] = ["x", "y", "all"].map((id) => document.getElementById(id));
const MARGIN = { left: 58, right: 14, top: 16, bottom: 44 };
const hint = detail.firstElementChild;
let pinned = null;
let current = null;

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "line", "path", "text", "use", "circle"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const axisOf = (select) => axes.find((axis) => axis.key === select.value);
const at = (point, axis) => point.values[axis.key]?.at;
const cost = (point, axis) => (axis.better === "higher" ? -1 : 1) * at(point, axis);

function frontOf(x, y) {
  const known = points.filter((p) => p.judged && at(p, x) !== undefined && at(p, y) !== undefined);
  const beats = (a, b) =>
    cost(a, x) <= cost(b, x) && cost(a, y) <= cost(b, y) && (cost(a, x) < cost(b, x) || cost(a, y) < cost(b, y));
  return known.filter((p) => !known.some((q) => beats(q, p))).sort((a, b) => at(a, x) - at(b, x) || at(a, y) - at(b, y));
}

// Round steps that hold what is to be seen.
function scale(axis, shown, from, to) {
  const numbers = shown.flatMap((p) => [p.values[axis.key].at, p.values[axis.key].low, p.values[axis.key].high]);
  if (axis.key in limits) numbers.push(limits[axis.key]);
  const finite = numbers.filter((n) => typeof n === "number");
  let [low, high] = [Math.min(...finite), Math.max(...finite)];
  const room = 0.06 * (high - low) || 0.06 * Math.abs(high) || 1;
  [low, high] = [low - room, high + room];
  const rough = (high - low) / Math.max(2, Math.abs(to - from) / 90);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * (1 - 1e-9));
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(+(i * step).toPrecision(12));
  return { low, high, ticks, at: (value) => from + ((value - low) / (high - low)) * (to - from) };
}

function draw() {
  const [x, y] = [axisOf(across), axisOf(up)];
  const drawable = points.filter((p) => at(p, x) !== undefined && at(p, y) !== undefined);
  const front = frontOf(x, y);
  const near = drawable.filter((p) => front.includes(p) || p.kind !== "candidate" || p.winner || p === pinned);
  const framed = all.checked || !front.length ? drawable : near;
  chart.replaceChildren();
  outside.textContent = "";
  if (!framed.length) {
    outside.textContent = "No point has both numbers.";
    return;
  }
  const svg = make("svg");
  chart.append(svg);
  const { clientWidth: width, clientHeight: height } = svg;
  const sx = scale(x, framed, MARGIN.left, width - MARGIN.right);
  const sy = scale(y, framed, height - MARGIN.bottom, MARGIN.top);
  const line = (kind, x1, y1, x2, y2) => make("line", { class: kind, x1, y1, x2, y2 });
  const text = (kind, px, py, anchor, content) => make("text", { class: kind, x: px, y: py, "text-anchor": anchor }, content);
  const shown = (n) => String(n).replace("-", "−");
  for (const tick of sx.ticks) {
    svg.append(line("grid", sx.at(tick), MARGIN.top, sx.at(tick), height - MARGIN.bottom));
    svg.append(text("step", sx.at(tick), height - MARGIN.bottom + 17, "middle", shown(tick)));
  }
  for (const tick of sy.ticks) {
    svg.append(line("grid", MARGIN.left, sy.at(tick), width - MARGIN.right, sy.at(tick)));
    svg.append(text("step", MARGIN.left - 8, sy.at(tick) + 4, "end", shown(tick)));
  }
  const named = (axis) => `${axis.label}${axis.unit ? `, ${axis.unit}` : ""}; ${axis.better} is better`;
  svg.append(text("title", (MARGIN.left + width - MARGIN.right) / 2, height - 6, "middle", named(x)));
  const title = text("title", 0, 0, "middle", named(y));
  title.setAttribute("transform", `translate(13 ${(MARGIN.top + height - MARGIN.bottom) / 2}) rotate(-90)`);
  svg.append(title);
  if (x.key in limits) svg.append(line("limit", sx.at(limits[x.key]), MARGIN.top, sx.at(limits[x.key]), height - MARGIN.bottom));
  if (y.key in limits) svg.append(line("limit", MARGIN.left, sy.at(limits[y.key]), width - MARGIN.right, sy.at(limits[y.key])));

  // Between two points of the front, nothing better than the worse of both was found: a staircase.
  let path = "";
  front.forEach((p, i) => {
    const [px, py] = [sx.at(at(p, x)), sy.at(at(p, y))];
    const last = front[i - 1];
    if (!last) path = `M${px} ${py}`;
    else if (x.better === "lower") path += `H${px}V${py}`;
    else path += `V${py}H${px}`;
  });
  svg.append(make("path", { class: "front", d: path, "data-ids": front.map((p) => p.id).join(" ") }));

  const inside = drawable.filter(
    (p) => at(p, x) >= sx.low && at(p, x) <= sx.high && at(p, y) >= sy.low && at(p, y) <= sy.high,
  );
  const hidden = drawable.length - inside.length;
  if (hidden) outside.textContent = `${hidden} point${hidden === 1 ? " lies" : "s lie"} outside; tick “all points” to see ${hidden === 1 ? "it" : "them"}.`;
  // What matters most is drawn last, on top.
  const weight = (p) => 4 * p.winner + 2 * (p.kind !== "candidate") + front.includes(p);
  const clamp = (value, s) => s.at(Math.min(Math.max(value, s.low), s.high));
  const marks = new Map();
  for (const p of [...inside].sort((a, b) => weight(a) - weight(b))) {
    const [px, py] = [sx.at(at(p, x)), sy.at(at(p, y))];
    const kinds = ["mark", p.kind, p.stage];
    if (p.winner) kinds.push("winner");
    else if (p.kind === "candidate" && !front.includes(p)) kinds.push("hollow");
    if (p.simulated) kinds.push("pretended");
    if (p === pinned) kinds.push("pinned");
    const label = [p.label, p.about, ...(p.simulated ? ["simulated"] : []), p.values[x.key].text, p.values[y.key].text];
    const g = make("g", { class: kinds.join(" "), role: "button", tabindex: -1, "data-id": p.id, "aria-label": label.join("; "), "aria-pressed": p === pinned });
    const [vx, vy] = [p.values[x.key], p.values[y.key]];
    if (vx.low !== null && vx.high !== null) g.append(line("spread", clamp(vx.low, sx), py, clamp(vx.high, sx), py));
    if (vy.low !== null && vy.high !== null) g.append(line("spread", px, clamp(vy.low, sy), px, clamp(vy.high, sy)));
    const size = p.winner ? 22 : 16;
    g.append(make("use", { class: "shape", href: `#mark-${p.kind}`, x: px - size / 2, y: py - size / 2, width: size, height: size }));
    g.append(make("circle", { class: "halo", cx: px, cy: py, r: p.winner ? 11 : 9 }), make("circle", { class: "hit", cx: px, cy: py, r: 11 }));
    // Not pointerenter, which a mark that is drawn under a resting mouse fires too.
    g.addEventListener("pointermove", () => {
      if (!pinned) tell(p);
    });
    g.addEventListener("focus", () => {
      current = p;
      for (const other of marks.values()) other.setAttribute("tabindex", -1);
      g.setAttribute("tabindex", 0);
      if (!pinned) tell(p);
    });
    g.addEventListener("click", () => pin(p === pinned ? null : p));
    marks.set(p, g);
    svg.append(g);
  }
  name(svg, inside.filter((p) => p.winner || p.kind !== "candidate"), (p) => [sx.at(at(p, x)), sy.at(at(p, y))], width);
  const order = [...inside].sort((a, b) => at(a, x) - at(b, x) || at(a, y) - at(b, y));
  marks.get(inside.includes(current) ? current : order[0])?.setAttribute("tabindex", 0);
  chart.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    const i = order.findIndex((p) => marks.get(p) === document.activeElement);
    if (step && i >= 0) marks.get(order[Math.min(Math.max(i + step, 0), order.length - 1)]).focus();
    else if ((event.key === "Enter" || event.key === " ") && i >= 0) pin(order[i] === pinned ? null : order[i]);
    else if (event.key === "Escape") pin(null);
    else return;
    event.preventDefault();
  };
}

// Names beside marks, where there is room for one; what has none is named when pointed at.
function name(svg, named, where, width) {
  const taken = named.map((p) => where(p)).map(([px, py]) => ({ left: px - 8, right: px + 8, top: py - 8, bottom: py + 8 }));
  for (const p of named) {
    const [px, py] = where(p);
    const short = p.label.length > 34 ? `${p.label.slice(0, 33)}…` : p.label;
    const label = make("text", { class: "name", "aria-hidden": true }, short);
    svg.append(label);
    const length = label.getComputedTextLength();
    const places = [[px + 9, py - 8], [px - 9 - length, py - 8], [px + 9, py + 17], [px - 9 - length, py + 17]];
    const box = ([left, base]) => ({ left, right: left + length, top: base - 11, bottom: base + 3 });
    const free = (b) =>
      b.left >= MARGIN.left && b.right <= width && b.top >= 0 &&
      taken.every((t) => b.right < t.left || b.left > t.right || b.bottom < t.top || b.top > t.bottom);
    const place = places.find((candidate) => free(box(candidate)));
    if (!place) {
      label.remove();
      continue;
    }
    taken.push(box(place));
    label.setAttribute("x", place[0]);
    label.setAttribute("y", place[1]);
    label.setAttribute("pointer-events", "none");
  }
}

function tell(p) {
  const title = make("h3", {}, p.label);
  if (p.simulated) title.append(" ", make("span", { class: "simulated" }, "simulated"));
  const numbers = make("dl", { class: "figures" });
  for (const axis of axes.filter((a) => a.key in p.values)) {
    numbers.append(make("div", {}, make("dt", {}, axis.label), make("dd", {}, p.values[axis.key].text)));
  }
  detail.replaceChildren(title, make("p", { class: "note" }, `${p.about}.`), numbers);
  if (p.recipe !== null) detail.append(make("pre", { class: "wrap recipe" }, p.recipe));
  if (p !== pinned) return;
  const command = make("pre", { class: "wrap" }, p.command);
  const button = make("button", { type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(p.command);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(command);
      button.textContent = "Selected: press Ctrl+C";
    }
  });
  detail.append(make("p", { class: "note" }, "What rebuilds it:"), make("div", { class: "command" }, command, button));
}

function pin(p) {
  const focused = document.activeElement?.dataset?.id;
  pinned = p;
  detail.classList.toggle("pinned", p !== null);
  if (p) tell(p);
  else detail.replaceChildren(hint);
  draw();
  chart.querySelector(`[data-id="${focused}"]`)?.focus();
}

document.getElementById("explorer").hidden = false;
across.value = first.x;
up.value = first.y;
for (const control of [across, up, all]) control.addEventListener("change", draw);
let drawnWidth = 0;
new ResizeObserver(() => {
  if (chart.clientWidth !== drawnWidth) {
    drawnWidth = chart.clientWidth;
    draw();
  }
}).observe(chart);
