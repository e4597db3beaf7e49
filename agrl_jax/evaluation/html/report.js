"use strict";
const { curves, runs } = JSON.parse(document.getElementById("data").textContent);
const DASHES = ["", "6 3", "2 2", "8 3 2 3", "1 3"]; // lines differ without colours too
const WIDTH = 280, HEIGHT = 150, LEFT = 38, BOTTOM = 18, TOP = 6;
const AT_ONCE = 20;

// Text always enters the page as text, never as markup.
function element(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const short = (value) => (Math.abs(value) >= 1000 ? value.toFixed(0) : String(+value.toPrecision(3)));
const runClass = (index) => `run${index % DASHES.length}`;
const stroke = (index) => ({ class: runClass(index), "stroke-dasharray": DASHES[index % DASHES.length] });

function chart(metric, title) {
  const lines = runs.map((run) => run.curves[metric] || []);
  const points = lines.flat();
  const values = points.flatMap((p) => [p[1], p[2]]);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = (high - low) * 0.05 || 0.5;
  const [first, last] = [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[0]))];
  const x = (step) => LEFT + ((step - first) / (last - first || 1)) * (WIDTH - LEFT - 6);
  const y = (v) => HEIGHT - BOTTOM - ((v - low + pad) / (high - low + 2 * pad)) * (HEIGHT - BOTTOM - TOP);
  const path = (line, column) =>
    "M" + line.map((p) => `${x(p[0]).toFixed(1)} ${y(p[column]).toFixed(1)}`).join("L");

  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  for (const value of low === high ? [low] : [low, (low + high) / 2, high]) {
    svg.append(element("line", { class: "grid", x1: LEFT, x2: WIDTH - 6, y1: y(value), y2: y(value) }));
    svg.append(element("text", { x: LEFT - 4, y: y(value) + 3, "text-anchor": "end" }, short(value)));
  }
  for (const [step, anchor] of first === last ? [[first, "start"]] : [[first, "start"], [last, "end"]])
    svg.append(element("text", { x: x(step), y: HEIGHT - 4, "text-anchor": anchor }, String(step)));
  lines.forEach((line, i) => {
    if (line.length >= 40) svg.append(element("path", { class: `${runClass(i)} raw`, d: path(line, 1) }));
    if (line.length) svg.append(element("path", { ...stroke(i), d: path(line, 2) }));
  });

  const reading = element("span");
  const read = (step) => {
    const nearest = lines.filter((line) => line.length).map((line) =>
      line.reduce((best, p) => (Math.abs(p[0] - step) < Math.abs(best[0] - step) ? p : best)));
    reading.textContent = nearest.map((p) => `${p[0]}: ${short(p[2])}`).join(" · ");
  };
  read(last);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    read(first + ((at - LEFT) / (WIDTH - LEFT - 6)) * (last - first));
  });
  svg.addEventListener("pointerleave", () => read(last));
  return element("figure", { "data-metric": metric }, element("figcaption", {}, element("b", {}, title), reading), svg);
}

function legend() {
  runs.forEach((run, i) => {
    const line = element("svg", { viewBox: "0 0 32 8", "aria-hidden": "true" });
    line.append(element("path", { ...stroke(i), d: "M0 4H32" }));
    document.getElementById("legend").append(element("li", {}, line, `${run.name} (${run.stage || "no steps"})`));
  });
}

// Right, wrong, or null where the truth is not known.
const verdict = (row, part) => (row.truth[part] === null ? null : row.stated[part] === row.truth[part]);

// The statements of an answer; none if it says nothing else.
function statements(row) {
  const all = row.statements || [];
  return all.reduce((text, one) => text.replace(one, ""), row.forced + row.text).trim() ? [...all] : [];
}

// A text with its statements in bold, so that reasons stand apart; they are taken from the front of `ahead`.
function apart(text, ahead) {
  const pieces = [];
  for (let at; ahead.length && (at = text.indexOf(ahead[0])) >= 0;) {
    const statement = ahead.shift();
    pieces.push(text.slice(0, at), element("b", {}, statement));
    text = text.slice(at + statement.length);
  }
  return [...pieces, text];
}

function answer(row) {
  const chips = Object.keys(row.truth).map((part) => {
    const right = verdict(row, part);
    const truth = right === false ? ` (truth: ${row.truth[part]})` : "";
    const [kind, mark] = right === null ? ["", "?"] : right ? ["right", "✓"] : ["wrong", "✗"];
    const stated = row.stated[part] ?? "none stated";
    return element("span", { class: `chip ${kind}` }, `${mark} ${part}: ${stated}${truth}`);
  });
  const earned = Object.entries(row.parts).map(([part, value]) =>
    `${part} ${value === null ? "not counted" : short(value)}`);
  const text = element("pre"), ahead = statements(row);
  if (row.forced) {
    const title = "forced by guidance, not sampled";
    text.append(element("mark", { class: "forced", title }, ...apart(row.forced, ahead)));
  }
  text.append(...apart(row.text, ahead));
  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
  return element("article", { class: "answer" },
    element("div", { class: "query" }, element("b", {}, row.query), " → ", row.title),
    element("div", { class: "dim" }, [row.run, `step ${row.step}`, row.id, row.family, `answer ${row.sample}`,
      row.guided ? "guided" : "not guided", row.finished ? "finished" : "cut off"].join(" · ")),
    text, element("div", {}, ...chips),
    element("div", {}, element("b", {}, `advantage ${signed(row.advantage)}, reward ${signed(row.reward)}`),
      element("span", { class: "dim" }, `  = ${earned.join(", ")}`)));
}

function browser() {
  const rows = runs.flatMap((run) => run.samples.map((row) => ({ ...row, run: run.name }))).reverse();
  const form = document.getElementById("filters"), answers = document.getElementById("answers");
  const more = document.getElementById("more"), count = document.getElementById("count");
  const distinct = (of) => [...new Set(rows.flatMap(of))].sort();
  const parts = [...new Set(rows.flatMap((row) => Object.keys(row.truth)))];
  const filters = { // name: [choices, whether a row meets the choice]
    run: [distinct((row) => row.run), (row, run) => row.run === run],
    family: [distinct((row) => row.family), (row, family) => row.family === family],
    "true tier": [distinct((row) => row.truth.tier ?? []), (row, tier) => row.truth.tier === tier],
    part: [parts.flatMap((part) => [`${part} right`, `${part} wrong`]), (row, choice) =>
      verdict(row, choice.slice(0, -6)) === choice.endsWith(" right")],
    guided: [["guided", "not guided"], (row, choice) => row.guided === (choice === "guided")],
  };
  for (const [name, [choices]] of Object.entries(filters)) {
    const select = element("select", { name }, element("option", { value: "" }, "all"));
    for (const choice of choices) select.append(element("option", { value: choice }, choice));
    form.append(element("label", {}, name, select));
  }
  let shown = AT_ONCE;
  const draw = () => {
    const chosen = Object.entries(filters).map(([name, [, meets]]) => [form.elements[name].value, meets]);
    const left = rows.filter((row) => chosen.every(([value, meets]) => !value || meets(row, value)));
    answers.replaceChildren(...left.slice(0, shown).map(answer));
    count.textContent = rows.length ? `${left.length} of ${rows.length} answers, the latest first` : "There are none.";
    more.hidden = left.length <= shown;
  };
  form.addEventListener("change", () => { shown = AT_ONCE; draw(); });
  more.addEventListener("click", () => { shown += AT_ONCE; draw(); });
  draw();
}

legend();
document.getElementById("charts").append(...Object.entries(curves).map(([metric, title]) => chart(metric, title)));
browser();
