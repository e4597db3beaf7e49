"use strict";
const { page, comparisons, items } = JSON.parse(document.getElementById("data").textContent);
const STORE = `side by side ${page}`;
const KEYS = { ArrowLeft: "left", ArrowDown: "same", ArrowRight: "right" };
const find = (id) => document.getElementById(id);
const buttons = [...document.querySelectorAll("[data-answer]")];
let answers = own({}); // by query
let at = 0;

// An object without inherited names: a query may be "constructor".
function own(entries) {
  return Object.assign(Object.create(null), entries);
}

function tell(text) {
  find("message").textContent = text;
  find("message").hidden = !text;
}

// Text always enters the page as text, never as markup.
function shown(item) {
  const made = document.createElement("li");
  const add = (name, text, kind) => {
    if (text) made.append(Object.assign(document.createElement(name), { textContent: text, className: kind }));
  };
  add("b", item.title, "");
  add("div", [item.brand, item.color, item.category, item.price].filter(Boolean).join(" · "), "dim");
  add("div", item.description, "description");
  return made;
}

function draw() {
  const done = comparisons.filter(({ query }) => query in answers).length;
  find("count").textContent = `${done} of ${comparisons.length} queries answered`;
  if (!comparisons.length) return tell("The two lists are equal for every query: there is nothing to compare.");
  const { query, left, right } = comparisons[at];
  find("place").textContent = `${at + 1}.`;
  find("query").textContent = query;
  for (const [side, list] of Object.entries({ left, right }))
    find(side).replaceChildren(...list.map((row) => shown(items[row])));
  for (const button of buttons) button.setAttribute("aria-pressed", answers[query] === button.dataset.answer);
  document.querySelector("main").hidden = false;
}

function keep() {
  try {
    localStorage.setItem(STORE, JSON.stringify(answers));
  } catch {
    tell("This browser keeps nothing for this page: save the answers before you close it.");
  }
}

function restore() {
  try {
    answers = own(JSON.parse(localStorage.getItem(STORE)));
  } catch {} // nothing was kept
}

// The next query without an answer, from `first` on and then from the top.
function open(first) {
  const order = comparisons.map((_, i) => (first + i) % comparisons.length);
  return order.find((i) => !(comparisons[i].query in answers));
}

function go(to) {
  at = Math.min(Math.max(to, 0), comparisons.length - 1);
  draw();
}

function answer(choice) {
  if (!comparisons.length) return;
  answers[comparisons[at].query] = choice;
  const next = open(at + 1);
  tell(next === undefined ? "All are answered. Save the answers, and hand the file back." : "");
  keep();
  go(next ?? at);
}

function save() {
  const file = new Blob([JSON.stringify({ page, answers }, null, 1) + "\n"], { type: "application/json" });
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(file) });
  link.download = `answers_${page}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}

async function load(file) {
  try {
    const content = JSON.parse(await file.text());
    if (content.page !== page) throw new Error("its answers are those of another page");
    answers = own({ ...answers, ...content.answers });
    keep();
    tell(`${Object.keys(content.answers).length} answers loaded.`);
    go(open(0) ?? 0);
  } catch (error) {
    tell(`${file.name} cannot be loaded: ${error.message}.`);
  }
}

for (const button of buttons) button.addEventListener("click", () => answer(button.dataset.answer));
find("previous").addEventListener("click", () => go(at - 1));
find("next").addEventListener("click", () => go(at + 1));
find("open").addEventListener("click", () => go(open(at + 1) ?? at));
find("save").addEventListener("click", save);
find("load").addEventListener("click", () => find("file").click());
find("file").addEventListener("change", ({ target }) => {
  if (target.files.length) load(target.files[0]);
  target.value = ""; // the same file can be loaded again
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.key in KEYS) answer(KEYS[event.key]);
  else if (event.key.toLowerCase() === "p") go(at - 1);
  else if (event.key.toLowerCase() === "n") go(at + 1);
  else return;
  event.preventDefault();
});

restore();
at = comparisons.length ? (open(0) ?? 0) : 0;
draw();
