"use strict";
// The browser of rollouts. Texts of models are only ever put in as text. Formulas in them are built from `data.formulas`, which has
// elements of MathML and no others (mathematics.py).
const data = JSON.parse(document.getElementById("data").textContent);
const TRANSITIONS = ["i→c", "c→i", "i→i", "c→c", "?"];
const PAGE = matchMedia("(max-width: 700px)").matches ? 8 : 25, MOST_WORDS = 1500;
const get = id => document.getElementById(id);
const make = (tag, text, name) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (name) e.className = name; return e; };
const option = (value, text) => { const e = make("option", text); e.value = value; return e; };
const rowOf = data.evaluations.map(each => {  // by problem, then by id
  const rows = new Map();
  for (const row of each.rows) { if (!rows.has(row.problem)) rows.set(row.problem, new Map()); rows.get(row.problem).set(row.id, row); }
  return rows;
});
let page = 0, shown = [];

// --- texts ---

// A formula is one word: `$..$` as pandoc reads it, `$$..$$`, `\(..\)`, `\[..\]`. Code in fences has none.
const { fence: FENCE, formula: FORMULA } = data.patterns;  // of mathematics.py
const WORDS = /\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/.source;
const rendered = () => get("mathematics").checked;
const words = text => text.match(new RegExp(rendered() ? `${FORMULA}|${WORDS}` : WORDS, "gu")) || [];

const MATHML = "http://www.w3.org/1998/Math/MathML";

function built([tag, attributes, ...children]) {
  const element = document.createElementNS(MATHML, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  for (const child of children) element.append(typeof child === "string" ? child : built(child));
  return element;
}

function formula(text) {
  if (!Object.hasOwn(data.formulas, text)) return null;  // no formula, or one that could not be converted: shown as it is
  const display = text.startsWith("$$") || text.startsWith("\\[");
  const box = make("span", undefined, display ? "formula display" : "formula");
  box.append(built(data.formulas[text]));
  return box;
}

function put(box, text) {
  if (!rendered()) { box.append(text); return; }
  let after = false;  // a display is a block of its own, so the line breaks around it are not needed
  for (const part of text.split(new RegExp(`(${FENCE}|${FORMULA})`, "u"))) {
    const made = part && formula(part), display = Boolean(made) && made.classList.contains("display");
    if (display && box.lastChild?.nodeType === Node.TEXT_NODE) box.lastChild.data = box.lastChild.data.replace(/\n\s*$/, "");
    if (part) box.append(made ?? (after ? part.replace(/^\s*\n/, "") : part));
    if (part) after = display;
  }
}

// Words that stay, by the longest common subsequence; texts that are too long are shown as they are.
function differences(before, after) {
  const a = words(before), b = words(after);
  if (a.length > MOST_WORDS || b.length > MOST_WORDS) return null;
  const numbers = new Map(), number = word => numbers.get(word) ?? (numbers.set(word, numbers.size), numbers.size - 1);
  const x = Int32Array.from(a, number), y = Int32Array.from(b, number);  // compared faster than words
  const width = b.length + 1, best = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
    best[i * width + j] = x[i] === y[j] ? best[(i + 1) * width + j + 1] + 1 : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
  const left = [], right = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && x[i] === y[j]) { left.push(["", a[i++]]); right.push(["", b[j++]]); }
    else if (j >= b.length || (i < a.length && best[(i + 1) * width + j] >= best[i * width + j + 1])) left.push(["del", a[i++]]);
    else right.push(["ins", b[j++]]);
  }
  return [left, right];
}

function write(pre, parts) {
  let tag = "", text = "";
  const flush = () => {
    if (!text) return;
    const into = tag ? pre.appendChild(make(tag)) : pre;
    put(into, text);
    text = "";
  };
  for (const [kind, part] of parts) { if (kind !== tag) { flush(); tag = kind; } text += part; }
  flush();
}

// --- cards ---

function attempts(row) {
  const box = make("div", undefined, "attempts");
  const marked = row.attempts.map(text => [["", text]]);
  for (let k = 1; k < row.attempts.length; k++) {
    const found = differences(row.attempts[k - 1], row.attempts[k]);
    if (found) { if (k === 1) marked[0] = found[0]; marked[k] = found[1]; }
  }
  row.attempts.forEach((text, k) => {
    const part = make("div", undefined, "attempt"), right = row.correct[k];
    const head = make("h3", `attempt ${k + 1}: `);
    head.append(make("span", right === null ? "not graded" : right ? "right" : "wrong", right ? "right" : right === null ? "soft" : "wrong"));
    const pre = make("pre");
    write(pre, marked[k]);
    part.append(head, pre);
    box.append(part);
    if (row.instruction && k < row.attempts.length - 1) {
      const asked = make("div", undefined, "attempt");
      asked.append(make("h3", "correction instruction"), make("pre", row.instruction));
      box.append(asked);
    }
    if (k < row.feedback.length) {
      const feedback = make("div", undefined, "attempt"), said = make("pre");
      put(said, row.feedback[k]);
      feedback.append(make("h3", `feedback on attempt ${k + 1}`), said);
      box.append(feedback);
    }
  });
  return box;
}

// The row of another evaluation at the same problem, of the same sample if it has that.
const counterpart = (row, other) => { const rows = rowOf[other].get(row.problem); return rows && (rows.get(row.id) ?? rows.values().next().value); };

function compared() {
  const value = get("compare").value;
  if (value === "") return [];
  const here = Number(get("evaluation").value);
  return value === "all" ? data.evaluations.map((_, i) => i).filter(i => i !== here) : [Number(value)];
}

function card(row) {
  const here = data.evaluations[get("evaluation").value], others = compared();
  const box = make("article", undefined, "rollout"), head = make("div", undefined, "head"), problem = make("div", undefined, "problem");
  const link = make("a", "link to this rollout");
  link.href = "#" + parameters({ r: row.id, t: "", u: "", q: "", p: "" });
  link.setAttribute("aria-label", `link to this rollout, problem ${row.id}`);
  head.append(make("span", `problem ${row.id}${row.level && `, level ${row.level}`}, ${row.transition}`), link);
  put(problem, data.problems[row.problem]);
  box.append(head, problem);
  if (others.length) box.append(make("p", `${here.name}: ${row.transition}`, "model"));
  box.append(attempts(row));
  for (const other of others) {
    const there = counterpart(row, other), name = data.evaluations[other].name;
    box.append(make("p", there ? `${name}: ${there.transition}` : `${name}: not at this problem`, "model"));
    if (there) box.append(attempts(there));
  }
  box.tabIndex = -1;
  box.dataset.id = row.id;
  box.setAttribute("aria-label", `problem ${row.id}`);
  return box;
}

function show() {
  const evaluation = data.evaluations[get("evaluation").value], pages = Math.max(1, Math.ceil(shown.length / PAGE));
  page = Math.min(Math.max(page, 0), pages - 1);
  const all = evaluation.all, here = evaluation.rows.length;
  get("where").textContent = `${shown.length} rollouts` + (all > here ? ` of the first ${here} of ${all}` : "") + `, page ${page + 1} of ${pages}`;
  get("before").disabled = page === 0;
  get("after").disabled = page === pages - 1;
  const said = make("details");
  said.append(make("summary", "Between the attempts"), make("p", evaluation.instruction, "said"));
  get("instruction").replaceChildren(...(evaluation.instruction ? [said] : []));
  get("list").replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map(card));
  for (const box of get("list").querySelectorAll("pre, .problem, .formula.display"))  // the keyboard scrolls what has the focus
    if (box.scrollHeight > box.clientHeight + 1 || box.scrollWidth > box.clientWidth + 1) { box.tabIndex = 0; box.setAttribute("role", "group"); box.setAttribute("aria-label", "text, to be scrolled"); }
}

function filter() {
  const transition = get("transition").value, text = get("search").value.toLowerCase(), others = compared();
  get("there").parentElement.hidden = others.length !== 1;
  const there = others.length === 1 ? get("there").value : "";
  shown = data.evaluations[get("evaluation").value].rows.filter(row => (!transition || row.transition === transition) &&
    (!there || counterpart(row, others[0])?.transition === there) &&
    (!text || data.problems[row.problem].toLowerCase().includes(text) || [...row.attempts, ...row.feedback].some(each => each.toLowerCase().includes(text))));
}

// --- the address: after "#" stands what is shown, so that it can be linked to ---

function parameters(changes = {}) {
  const compare = get("compare").value, name = i => data.evaluations[i].name;
  const all = {
    e: name(get("evaluation").value), t: get("transition").value, c: compare === "" || compare === "all" ? compare : name(compare),
    u: get("there").value, q: get("search").value, p: page ? String(page + 1) : "", ...changes,
  };
  return new URLSearchParams(Object.entries(all).filter(([, value]) => value)).toString();
}

function changed() { page = 0; filter(); show(); history.replaceState(null, "", "#" + parameters()); }
function turn(by) { page += by; show(); history.replaceState(null, "", "#" + parameters()); get("rollouts").scrollIntoView(); }

function follow() {
  const asked = new URLSearchParams(location.hash.slice(1)), named = name => data.evaluations.findIndex(each => each.name === name);
  if (!asked.has("e") && location.hash.length > 1) return;  // a section
  const evaluation = Math.max(named(asked.get("e")), 0), id = asked.get("r"), compare = asked.get("c") ?? "";
  get("evaluation").value = evaluation;
  get("compare").value = compare === "" || compare === "all" ? compare : named(compare) < 0 ? "" : named(compare);
  get("transition").value = TRANSITIONS.includes(asked.get("t")) ? asked.get("t") : "";
  get("there").value = TRANSITIONS.includes(asked.get("u")) ? asked.get("u") : "";
  get("search").value = asked.get("q") ?? "";
  page = (Number.parseInt(asked.get("p")) || 1) - 1;
  filter();
  const place = id === null ? -1 : shown.findIndex(row => row.id === id);
  if (place >= 0) page = Math.floor(place / PAGE);
  show();
  if (id !== null && place < 0) get("where").textContent = `There is no problem ${id} here. ${get("where").textContent}`;
  if (place >= 0) focus(get("list").children[place % PAGE]);
}

function focus(box) { if (box) { box.focus({ preventScroll: true }); box.scrollIntoView(); } }

for (const id of ["transition", "there"]) get(id).append(option("", "all"), ...TRANSITIONS.map(each => option(each, each)));
get("compare").append(option("", "nothing"), option("all", "all others"));
data.evaluations.forEach((each, i) => { get("evaluation").append(option(i, each.name)); get("compare").append(option(i, each.name)); });
get("evaluation").onchange = get("transition").onchange = get("compare").onchange = get("there").onchange = get("search").oninput = changed;
get("mathematics").onchange = show;
get("before").onclick = () => turn(-1);
get("after").onclick = () => turn(1);
get("list").onkeydown = event => {
  const box = event.target.closest(".rollout"), to = { j: box?.nextElementSibling, k: box?.previousElementSibling }[event.key];
  if (to && !event.ctrlKey && !event.metaKey && !event.altKey) { event.preventDefault(); focus(to); }
};
addEventListener("hashchange", follow);
follow();
if (!get("list").children.length) { filter(); show(); }  // the address names a section
