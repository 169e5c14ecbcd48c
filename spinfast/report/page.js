"use strict";
// Values under the pointer on plots, the searchable transcripts, and what is shown of the rollouts. No library, no request, no HTML from data.

function make(tag, options, ...children) {
  const node = Object.assign(document.createElement(tag), options);
  node.append(...children);
  return node;
}

function read(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

// Plots: the nearest x of the first series, every series' value there.

const plots = read("plot-data");

function short(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toPrecision(3) : String(Number(value.toPrecision(4)));
}

function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, i) => { if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = i; });
  return best;
}

function hover(svg) {
  const plot = plots[svg.dataset.plot];
  const figure = svg.closest("figure");
  const tip = figure.appendChild(make("div", { className: "tip", hidden: true }));
  const cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cross.setAttribute("class", "cross");
  svg.append(cross);
  const leave = () => { tip.hidden = true; cross.style.display = "none"; };
  leave();
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = plot.width / box.width;
    const at = plot.x0 + (((event.clientX - box.left) * scale - plot.left) / (plot.right - plot.left)) * (plot.x1 - plot.x0);
    const all = plot.series.flatMap((series) => series.x);
    if (!all.length) return;
    const x = all[nearest(all, at)];
    const place = plot.left + ((x - plot.x0) / (plot.x1 - plot.x0)) * (plot.right - plot.left);
    for (const [name, value] of [["x1", place], ["x2", place], ["y1", plot.top], ["y2", plot.bottom]]) cross.setAttribute(name, value);
    cross.style.display = "";
    const here = plot.series.filter((series) => series.x.length && series.x[0] <= x && x <= series.x.at(-1));
    const lines = here.map((series) => {
      const i = nearest(series.x, x);
      const interval = series.low && series.low[i] !== null ? ` [${short(series.low[i])}, ${short(series.high[i])}]` : "";
      return make("div", {}, make("i", { className: series.look }), `${series.label}: ${short(series.y[i])}${interval}`);
    });
    tip.replaceChildren(make("div", {}, `${plot.x_label} ${plot.ticks[x] ?? short(x)}`), ...lines);
    tip.hidden = false;
    const left = box.left - figure.getBoundingClientRect().left + place / scale;
    tip.style.left = `${Math.max(4, Math.min(left + 10, figure.clientWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${svg.offsetTop + 14}px`;
  });
}

document.querySelectorAll("svg[data-plot]").forEach(hover);

// Transcripts

const runs = read("transcript-data");
const list = document.getElementById("answers");
if (list) {
  const search = document.getElementById("search");
  const which = document.getElementById("which");
  const chosen = document.getElementById("run");
  const more = document.getElementById("more");
  const count = document.getElementById("count");
  const PAGE = 12;
  let shown = PAGE;

  const right = (answer) => answer.right;
  const filters = {
    all: () => true,
    changed: (item) => item.answers.some((answer) => right(answer) !== right(item.answers[0])),
    gained: (item) => right(item.answers[0]) === false && right(item.answers.at(-1)) === true,
    lost: (item) => right(item.answers[0]) === true && right(item.answers.at(-1)) === false,
    wrong: (item) => right(item.answers.at(-1)) === false,
    cut: (item) => item.answers.some((answer) => answer.cut),
  };

  function marked(text, words) {
    const node = make("div", { className: "text" });
    if (!words) { node.textContent = text; return node; }
    let rest = text;
    for (let at = rest.toLowerCase().indexOf(words); at >= 0; at = rest.toLowerCase().indexOf(words)) {
      node.append(rest.slice(0, at), make("mark", {}, rest.slice(at, at + words.length)));
      rest = rest.slice(at + words.length);
    }
    node.append(rest);
    return node;
  }

  function card(item, words) {
    const answers = make("div", { className: "answers" });
    answers.append(make("div", {}, make("h4", {}, "real answer"), marked(item.real, words)));
    for (const answer of item.answers) {
      const head = make("h4", {}, answer.stage);
      if (answer.right !== null) {
        head.append(make("span", { className: answer.right ? "better" : "worse" }, answer.right ? "  ✓ right" : "  ✗ wrong"));
      }
      const cut = answer.cut ? ", cut" : "";
      const size = make("small", {}, `${answer.tokens} tokens${cut}`);
      answers.append(make("div", {}, head, marked(answer.text, words), size));
    }
    return make("article", {}, make("h4", {}, `prompt ${item.index}`), marked(item.prompt, words), answers);
  }

  function show() {
    const words = search.value.trim().toLowerCase();
    const items = runs[chosen ? chosen.value : 0].filter((item) => {
      const text = [item.prompt, item.real, ...item.answers.map((answer) => answer.text)].join("\n").toLowerCase();
      return filters[which.value](item) && text.includes(words);
    });
    list.replaceChildren(...items.slice(0, shown).map((item) => card(item, words)));
    count.textContent = `${items.length} problems`;
    more.hidden = items.length <= shown;
  }

  const again = () => { shown = PAGE; show(); };
  search.addEventListener("input", again);
  which.addEventListener("change", again);
  if (chosen) chosen.addEventListener("change", again);
  more.addEventListener("click", () => { shown += PAGE; show(); });
  show();
}

// Rollouts: they stand in the page; what was not asked for is hidden.

const controls = document.getElementById("rollout-controls");
if (controls) {
  const [search, step, kind, count] = ["search", "step", "kind", "count"].map((name) => document.getElementById(`rollout-${name}`));
  const rollouts = [...document.querySelectorAll("details.rollout")].map((node) => ({
    node,
    groups: [...node.querySelectorAll("article")].map((group) => ({ group, text: group.textContent.toLowerCase() })),
  }));

  const show = () => {
    const words = search.value.trim().toLowerCase();
    let found = 0;
    for (const { node, groups } of rollouts) {
      let here = 0;
      for (const { group, text } of groups) {
        group.hidden = !text.includes(words) || (kind.value !== "" && !group.dataset.kinds.split(" ").includes(kind.value));
        here += group.hidden ? 0 : 1;
      }
      node.hidden = here === 0 || (step.value !== "" && node.dataset.rollout !== step.value);
      found += node.hidden ? 0 : here;
      if (words || step.value !== "") node.open = !node.hidden;
    }
    count.textContent = `${found} groups`;
  };

  search.addEventListener("input", show);
  step.addEventListener("change", show);
  kind.addEventListener("change", show);
  controls.hidden = false;
  show();
}
