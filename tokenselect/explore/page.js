"use strict";
const trace = JSON.parse(document.getElementById("trace").textContent);
const bytes = (name) => Uint8Array.from(atob(trace[name]), (c) => c.charCodeAt(0)).buffer;
const { layers, steps, context, heads, kv_heads: kvHeads, pieces } = trace;
const N = pieces.length;
const votes = new Float32Array(bytes("votes")); // (layer, step, N)
const codes = new Uint8Array(bytes("codes")); // (layer, step, head, N)
const ranges = new Float32Array(bytes("ranges")); // (layer, step, head)
const products = new Float64Array(bytes("products")); // (layer, step, step)
const largest = new Float32Array(bytes("largest")); // (layer, step, KV head)
const errors = new Float32Array(bytes("errors")); // (layer, step, head)
const recorded = new Uint8Array(bytes("selected")); // (layer, step, ceil(N / 8))
const element = (id) => document.getElementById(id);
const lengthAt = (t) => context + t + 1;

// --- the algorithm ---

const votesOf = (l, t) => votes.subarray((l * steps + t) * N, (l * steps + t) * N + lengthAt(t));

function regions(n, s) {
  const localStart = Math.max(0, n - s.n_local);
  return [Math.min(s.n_sink, localStart), localStart];
}

// The positions, ascending, and the lowest vote that won. Of equal votes the lower position comes first.
function selectAnew(l, t, s) {
  const n = lengthAt(t), vote = votesOf(l, t), [sinkEnd, localStart] = regions(n, s);
  const ranked = Array.from({ length: localStart - sinkEnd }, (_, i) => sinkEnd + i);
  ranked.sort((a, b) => vote[b] - vote[a] || a - b);
  const winners = ranked.slice(0, s.k);
  const threshold = winners.length ? vote[winners[winners.length - 1]] : null;
  const always = Array.from({ length: sinkEnd + n - localStart }, (_, i) => (i < sinkEnd ? i : localStart + i - sinkEnd));
  return { positions: [...always, ...winners].sort((a, b) => a - b), threshold, since: t };
}

// Algorithm 1, from the first recorded step on, in the library's arithmetic: float64, no root.
function select(l, t, s) {
  if (s.theta === null) return selectAnew(l, t, s);
  const product = (a, b) => products[(l * steps + a) * steps + b];
  let stored = null;
  for (let i = 0; i <= t; i++) {
    const n = lengthAt(i), capacity = Math.min(s.n_sink + s.k + s.n_local + trace.max_reuse, n);
    let reused = false;
    if (stored !== null) {
      const appended = n - lengthAt(stored.since), dot = product(i, stored.since);
      const square = product(i, i) * product(stored.since, stored.since);
      reused = appended <= trace.max_reuse && stored.positions.length + appended <= capacity &&
        square > 0 && square < Infinity && dot * Math.abs(dot) >= s.theta * Math.abs(s.theta) * square;
    }
    if (!reused) stored = selectAnew(l, i, s);
  }
  const appended = Array.from({ length: t - stored.since }, (_, i) => lengthAt(stored.since) + i);
  return { ...stored, positions: [...stored.positions, ...appended] };
}

function windowOf(t, s, count) {
  const n = lengthAt(t), first = Math.min(s.n_sink, count);
  return Array.from({ length: count }, (_, i) => (i < first ? i : n - count + i));
}

// --- how much of the attention is read ---

// The dense softmax of one head, or of all: their mean.
function weights(l, t, head) {
  const n = lengthAt(t);
  if (head === null) return Float64Array.from(votesOf(l, t), (vote) => vote / heads);
  const row = (l * steps + t) * heads + head, range = ranges[row];
  const w = Float64Array.from(codes.subarray(row * N, row * N + n), (c) => Math.exp(-range * (c / 255) ** 2));
  const sum = w.reduce((a, b) => a + b, 0);
  return w.map((x) => x / sum);
}

const massOf = (w, positions) => Math.min(1, positions.reduce((sum, i) => sum + w[i], 0));

// The error of no entry of the output is above 2 (1 - mass) max |v|; of several heads, the largest.
function boundOf(l, t, head, positions) {
  const one = (h) => 2 * (1 - massOf(weights(l, t, h), positions)) *
    largest[(l * steps + t) * kvHeads + Math.floor(h / (heads / kvHeads))];
  return head === null ? Math.max(...Array.from({ length: heads }, (_, h) => one(h))) : one(head);
}

function measuredError(l, t, head) {
  const at = (l * steps + t) * heads;
  return head === null ? Math.max(...errors.subarray(at, at + heads)) : errors[at + head];
}

// --- the recorded settings, and whether this page does what the library did ---

const asRecorded = { k: trace.k, n_sink: trace.n_sink, n_local: trace.n_local, theta: trace.theta };

function recordedSelection(l, t) {
  const size = Math.ceil(N / 8), at = (l * steps + t) * size;
  return Array.from({ length: N }, (_, i) => i).filter((i) => (recorded[at + (i >> 3)] >> (i & 7)) & 1);
}

function countEqual() {
  let equal = 0;
  for (let l = 0; l < layers.length; l++)
    for (let t = 0; t < steps; t++)
      equal += select(l, t, asRecorded).positions.join() === recordedSelection(l, t).join();
  return equal;
}

// --- drawing ---

const percent = (x) => (100 * x).toFixed(1) + "%";
const shown = (i) => JSON.stringify(pieces[i]).slice(1, -1).replace(/^ /, "␣").replace(/\\"/g, '"');
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name);

function canvasOf(id) {
  const canvas = element(id), ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "12px system-ui, sans-serif";
  return { canvas, pen, width, height };
}

const LEFT = 44, TOP = 10, BOTTOM = 20;

function axis(c, ticks, yOf, text) {
  for (const y of ticks) {
    c.pen.fillStyle = colour("line");
    c.pen.fillRect(LEFT, yOf(y), c.width - LEFT, 1);
    c.pen.fillStyle = colour("dim");
    c.pen.fillText(text(y), 4, yOf(y) + 4);
  }
}

function drawVotes(view, chosen) {
  const c = canvasOf("votes"), { pen } = c, vote = votesOf(view.l, view.t), n = vote.length;
  const [sinkEnd, localStart] = regions(n, view);
  const top = Math.max(1, Math.ceil(Math.log10(heads))), low = -5, isRead = new Set(chosen.positions);
  const xOf = (i) => LEFT + (i * (c.width - LEFT)) / n;
  const yOf = (v) => TOP + ((top - Math.max(low, Math.log10(Math.max(v, 1e-9)))) * (c.height - TOP - BOTTOM)) / (top - low);
  pen.fillStyle = colour("region");
  pen.fillRect(LEFT, TOP, xOf(sinkEnd) - LEFT, c.height - TOP - BOTTOM);
  pen.fillRect(xOf(localStart), TOP, c.width - xOf(localStart), c.height - TOP - BOTTOM);
  axis(c, [1, 0.1, 0.01, 0.001, 0.0001], yOf, String);
  for (let i = 0; i < n; i++) {
    pen.fillStyle = colour(isRead.has(i) ? "read" : "left");
    pen.fillRect(xOf(i), yOf(vote[i]), Math.max(0.6, xOf(1) - LEFT - 0.4), c.height - BOTTOM - yOf(vote[i]));
  }
  pen.strokeStyle = pen.fillStyle = colour("mark");
  pen.fillRect(xOf(view.token + 0.5) - 4, c.height - BOTTOM + 2, 8, 4);
  if (chosen.threshold !== null) {
    pen.lineWidth = 2;
    pen.setLineDash([6, 4]);
    pen.beginPath();
    pen.moveTo(LEFT, yOf(chosen.threshold));
    pen.lineTo(c.width, yOf(chosen.threshold));
    pen.stroke();
    pen.setLineDash([]);
  }
  pen.fillStyle = colour("dim");
  pen.fillText("position 0", LEFT, c.height - 4);
  const last = String(n - 1);
  pen.fillText(last, c.width - pen.measureText(last).width - 4, c.height - 4);
  c.canvas.setAttribute("aria-label", `Votes for ${n} tokens. ${describeThreshold(chosen)} ` +
    `The first ${sinkEnd} and the newest ${n - localStart} are always read.`);
  c.canvas.onclick = (event) => {
    set("token", Math.floor(((event.offsetX - LEFT) * n) / (c.width - LEFT)));
    draw();
  };
}

const describeThreshold = (chosen) =>
  chosen.threshold === null ? "No token is selected by vote." : `The lowest vote that won is ${chosen.threshold.toPrecision(3)}.`;

function drawCurve(view, chosen) {
  const c = canvasOf("curve"), { pen } = c, n = lengthAt(view.t), vote = votesOf(view.l, view.t);
  const [sinkEnd, localStart] = regions(n, view), w = weights(view.l, view.t, null);
  const ranked = Array.from(vote.subarray(sinkEnd, localStart)).sort((a, b) => b - a);
  const xOf = (k) => LEFT + (k * (c.width - LEFT - 8)) / Math.max(1, ranked.length);
  const yOf = (mass) => TOP + (1 - mass) * (c.height - TOP - BOTTOM);
  axis(c, [0, 0.5, 1], yOf, (x) => 100 * x + "%");
  let mass = w.reduce((sum, x, i) => (i < sinkEnd || i >= localStart ? sum + x : sum), 0);
  pen.strokeStyle = colour("read");
  pen.lineWidth = 2;
  pen.beginPath();
  pen.moveTo(LEFT, yOf(mass));
  ranked.forEach((v, i) => pen.lineTo(xOf(i + 1), yOf((mass += v / heads))));
  pen.stroke();
  const k = Math.min(view.k, ranked.length), at = massOf(w, chosen.positions);
  pen.fillStyle = pen.strokeStyle = colour("read");
  pen.beginPath();
  pen.arc(xOf(k), yOf(at), 5, 0, 7);
  pen.fill();
  pen.beginPath();
  pen.arc(xOf(k), yOf(massOf(w, windowOf(view.t, view, chosen.positions.length))), 5, 0, 7);
  pen.stroke();
  pen.fillStyle = colour("dim");
  pen.fillText("k = 0", LEFT, c.height - 4);
  const last = String(ranked.length);
  pen.fillText(last, c.width - pen.measureText(last).width - 4, c.height - 4);
  c.canvas.setAttribute("aria-label", `Retained mass grows with k; at k = ${view.k} it is ${percent(at)}.`);
  c.canvas.onclick = (event) => {
    set("k", Math.round(((event.offsetX - LEFT) * ranked.length) / (c.width - LEFT - 8)));
    draw();
  };
}

// Per layer, the mass that the selection retains, and that a window of its size does.
const massesOf = (view) => layers.map((_, l) => {
  const w = weights(l, view.t, null), chosen = select(l, view.t, view).positions;
  return [massOf(w, chosen), massOf(w, windowOf(view.t, view, chosen.length))];
});

function mostAboveWindow() {
  const gains = massesOf(viewOf()).map(([mass, windowMass]) => mass - windowMass);
  return gains.indexOf(Math.max(...gains));
}

function drawLayers(view) {
  const c = canvasOf("layers"), { pen } = c, each = (c.width - LEFT) / layers.length;
  const yOf = (mass) => TOP + (1 - mass) * (c.height - TOP - BOTTOM);
  axis(c, [0, 0.5, 1], yOf, (x) => 100 * x + "%");
  const masses = massesOf(view);
  masses.forEach(([mass, windowMass], l) => {
    const x = LEFT + l * each + 1;
    pen.fillStyle = colour(l === view.l ? "read" : "left");
    pen.fillRect(x, yOf(mass), each - 2, yOf(0) - yOf(mass));
    pen.strokeStyle = colour("ink");
    pen.strokeRect(x + 0.5, yOf(windowMass), each - 3, yOf(0) - yOf(windowMass));
  });
  pen.fillStyle = colour("dim");
  pen.fillText("layer " + layers[0], LEFT, c.height - 4);
  const last = String(layers[layers.length - 1]);
  pen.fillText(last, c.width - pen.measureText(last).width - 4, c.height - 4);
  const least = masses.reduce((least, one, l) => (one[0] < masses[least][0] ? l : least), 0);
  c.canvas.setAttribute("aria-label", `Retained mass by layer, least in layer ${layers[least]}: ${percent(masses[least][0])}.`);
  c.canvas.onclick = (event) => {
    set("layer", Math.floor((event.offsetX - LEFT) / each));
    draw();
  };
}

const WAYS = ["dense", "selected", "window"];
const texts = Object.fromEntries(WAYS.map((way) => {
  const spans = pieces.map((piece, i) => {
    const span = document.createElement("span");
    span.textContent = piece;
    span.dataset.position = i;
    return span;
  });
  const box = element("text-" + way);
  box.append(...spans);
  box.onclick = (event) => {
    if (event.target.dataset.position === undefined) return;
    set("token", event.target.dataset.position);
    draw();
  };
  return [way, spans];
}));

function drawTexts(view, w, read) {
  for (const way of WAYS) {
    const isRead = new Set(read[way]), mass = massOf(w, read[way]);
    texts[way].forEach((span, i) => {
      span.hidden = i >= w.length;
      span.className = [isRead.has(i) && "read", i === w.length - 1 && "query", i === view.token && "token"].filter(Boolean).join(" ");
      const shade = isRead.has(i) ? (Math.log10(Math.max(w[i] / mass, 1e-9)) + 4) / 4 : 0;
      span.style.setProperty("--weight", (0.5 * Math.min(1, Math.max(0, shade))).toFixed(3));
    });
  }
}

function row(table, cells, isHead) {
  const tr = document.createElement("tr");
  cells.forEach((cell, i) => {
    const td = document.createElement(i === 0 && isHead ? "th" : "td");
    if (i === 0 && isHead) td.scope = "row";
    td.append(cell);
    tr.append(td);
  });
  table.append(tr);
}

const code = (text) => Object.assign(document.createElement("code"), { textContent: text });

function guesses(way, t) {
  const cell = document.createElement("span");
  trace.guesses[way][t].forEach(([piece, p], i) =>
    cell.append(i ? ", " : "", code(JSON.stringify(piece).slice(1, -1).replace(/^ /, "␣")), " " + percent(p)));
  return cell;
}

function drawTables(view, w, read, isRecorded) {
  const body = element("ways").tBodies[0];
  body.replaceChildren();
  const ofWays = (f) => WAYS.map(f);
  row(body, ["tokens read", ...ofWays((way) => String(read[way].length))], true);
  row(body, ["retained mass", ...ofWays((way) => percent(massOf(w, read[way])))], true);
  row(body, ["error at most", ...ofWays((way) =>
    way === "dense" ? "0" : boundOf(view.l, view.t, view.head, read[way]).toPrecision(2))], true);
  row(body, ["error measured", "0", isRecorded ? measuredError(view.l, view.t, view.head).toPrecision(2) : "—", "—"], true);
  row(body, ["next token, as recorded", ...ofWays((way) => guesses(way, view.t))], true);
  element("ways-note").textContent =
    "Errors are of entries of this layer's attention output" + (view.head === null ? ", the largest over its heads" : ", in this head") +
    ": at most 2 (1 − mass) max |v|. Measured, and next tokens, are of the recorded runs: " +
    "each way read on from the same dense cache, in all layers.";
  const heavy = element("heavy").tBodies[0];
  heavy.replaceChildren();
  const ranked = Array.from(w.keys()).sort((a, b) => w[b] - w[a] || a - b).slice(0, 12);
  const share = (way, i) => (read[way].includes(i) ? percent(w[i] / massOf(w, read[way])) : "—");
  for (const i of ranked) row(heavy, [code(shown(i)), String(i), ...ofWays((way) => share(way, i))]);
}

// --- the controls ---

const value = (id) => Number(element(id).value);

function set(id, to) {
  element(id).value = to;
}

function mostVoted(view) {
  const vote = votesOf(view.l, view.t), [start, stop] = regions(vote.length, view);
  let best = start;
  for (let i = start; i < stop; i++) if (vote[i] > vote[best]) best = i;
  return best;
}

function reset() {
  for (const name of ["k", "n_sink", "n_local"]) set(name, trace[name]);
  element("reuse").checked = trace.theta !== null;
  set("theta", trace.theta === null ? 0.9 : trace.theta);
}

function viewOf() {
  const head = element("head").value;
  return {
    t: value("step"), l: value("layer"), head: head === "" ? null : Number(head), token: value("token"),
    k: value("k"), n_sink: value("n_sink"), n_local: value("n_local"),
    theta: element("reuse").checked ? value("theta") : null,
  };
}

function draw() {
  element("token").max = lengthAt(value("step")) - 1;
  element("theta").disabled = !element("reuse").checked;
  const view = viewOf(), n = lengthAt(view.t), w = weights(view.l, view.t, view.head);
  const chosen = select(view.l, view.t, view);
  const read = {
    dense: Array.from({ length: n }, (_, i) => i),
    selected: chosen.positions,
    window: windowOf(view.t, view, chosen.positions.length),
  };
  const isRecorded = Object.keys(asRecorded).every((name) => asRecorded[name] === view[name]);
  const said = {
    step: `${view.t + 1} of ${steps}`, layer: String(layers[view.l]), token: `${view.token} ${shown(view.token)}`,
    k: view.k, n_sink: view.n_sink, n_local: view.n_local, theta: view.theta === null ? "off" : view.theta.toFixed(2),
  };
  for (const [id, text] of Object.entries(said)) {
    document.querySelector(`output[for=${id}]`).textContent = text;
    element(id).setAttribute("aria-valuetext", text);
  }
  const heard = view.head === null ? "all heads" : "head " + view.head;
  const reuse = view.theta === null ? "" : chosen.since === view.t ? " Selected anew." : ` Reused: selected at step ${chosen.since + 1}.`;
  element("summary").textContent =
    `After “${shown(n - 1)}”, layer ${layers[view.l]} reads ${read.selected.length} of ${n} tokens and keeps ` +
    `${percent(massOf(w, read.selected))} of the attention of ${heard}; a window of that size would keep ` +
    `${percent(massOf(w, read.window))}. ${describeThreshold(chosen)}${reuse} ` +
    `Token ${view.token}, “${shown(view.token)}”, has a vote of ${votesOf(view.l, view.t)[view.token].toPrecision(3)}` +
    ` and is ${read.selected.includes(view.token) ? "" : "not "}read.`;
  drawVotes(view, chosen);
  drawCurve(view, chosen);
  drawLayers(view);
  drawTexts(view, w, read);
  drawTables(view, w, read, isRecorded);
}

element("step").max = steps - 1;
element("layer").max = layers.length - 1;
for (const name of ["k", "n_sink", "n_local"]) element(name).max = N;
element("head").add(new Option("all heads", ""));
for (let h = 0; h < heads; h++) element("head").add(new Option(`${h}, on KV head ${Math.floor(h / (heads / kvHeads))}`, h));
set("step", steps - 1);
reset();
set("layer", mostAboveWindow());
element("token").max = N - 1;
set("token", mostVoted(viewOf()));
element("reset").onclick = () => {
  reset();
  draw();
};
document.forms[0].oninput = draw;
document.forms[0].onsubmit = (event) => event.preventDefault();
window.onresize = draw;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

element("about").textContent =
  `${trace.model} read ${context} tokens of ${trace.title} densely, then ${steps} more one by one, each with ` +
  `a selection of the tokens before it (TokenSelect): the first ${trace.n_sink}, the ${trace.k} that its query heads vote for, ` +
  `and the newest ${trace.n_local}. Move the sliders to select otherwise.`;
const total = layers.length * steps, equal = countEqual();
element("exact").textContent =
  `${equal} of ${total} selections, computed on this page at the recorded settings, are the library's, bit for bit. ` +
  "Votes are the very float32 numbers of its reference backend, and so are those of any other k, n_sink and n_local; " +
  "whether a selection is reused is decided in its own arithmetic, from the first recorded step on. So selections are exact at every setting, " +
  "for the recorded queries and keys; with other settings in all layers, later layers would have asked otherwise. " +
  "Retained mass of all heads is the sum of votes. Of a single head, and in the bound, it comes from logits kept in 8 bits: " +
  `at the recorded settings it is off by ${percent(trace.mass_error)} of the attention at most.`;
draw();
for (const way of WAYS) element("text-" + way).scrollTop = 1e6;
