// What the page knows and what was decided. All text goes into the page as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const [CHANGE, ABSTAIN, KEPT] = [0, 1, 2]; // what a row is about
const REMOVE = -2; // in place of a label: the image shows none of the classes
const UNKNOWN = -1; // in place of a proposed label
const count = data.row.length;
const toDecide = data.kind.filter((kind) => kind !== KEPT).length;
const storage = `synth-refine ${data.key}`;
const chosen = new Map(); // index of an image -> label, or REMOVE
let steps = []; // for undo: lists of [index, label before or undefined]
let kept = true; // whether the browser keeps the decisions
let exported = true;

const number = (value) => value.toLocaleString("en");
const plural = (value, one, many) => `${number(value)} ${value === 1 ? one : many}`;

// The state of an image; "reject" keeps the given label.
function stateOf(index, label = chosen.get(index)) {
  if (label === undefined) return "open";
  if (label === REMOVE) return "remove";
  if (label === data.given[index]) return "reject";
  return label === data.proposed[index] ? "accept" : "correct";
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
const className = (label) => make("bdi", {}, data.classes[label]);

function say(text) {
  $("live").textContent = `${text} ${number(decided())} of ${number(toDecide)} decided.`;
}

// Of the images that wait for a decision; kept labels do not.
function decided() {
  let found = 0;
  for (const index of chosen.keys()) found += data.kind[index] !== KEPT;
  return found;
}

// ---- what the browser keeps ----

function write(key, value) {
  try {
    localStorage.setItem(key, value);
  } catch {
    forgetful();
  }
}

function read(key) {
  try {
    const text = localStorage.getItem(key);
    localStorage.setItem(key, text ?? "[]"); // a full or read-only storage shows here, not after an hour's work
    return JSON.parse(text ?? "[]");
  } catch (error) {
    if (!(error instanceof SyntaxError)) forgetful();
    return [];
  }
}

function forgetful() {
  kept = false;
  $("problem").hidden = false;
  $("problem").textContent =
    "This browser does not keep your decisions: export them before you leave the page, and load them when you come back.";
}

function load() {
  chosen.clear();
  const found = read(storage);
  for (const [index, label] of Array.isArray(found) ? found.filter(Array.isArray) : []) {
    if (index in data.row && (label in data.classes || label === REMOVE)) chosen.set(index, label);
  }
}

// ---- decisions ----

// changes: [index, label or undefined], one step for undo.
function decide(changes, text) {
  const step = [];
  for (const [index, label] of changes) {
    if (chosen.get(index) === label) continue;
    step.push([index, chosen.get(index)]);
    label === undefined ? chosen.delete(index) : chosen.set(index, label);
  }
  if (!step.length) return say("Nothing to change.");
  steps.push(step);
  settle(text);
}

function undo() {
  const step = steps.pop();
  if (!step) return say("Nothing to undo.");
  for (const [index, label] of step) label === undefined ? chosen.delete(index) : chosen.set(index, label);
  settle(step.length === 1 ? `Undone: ${data.id[step[0][0]]}.` : `Undone: ${number(step.length)} decisions.`);
}

function settle(text) {
  exported = false;
  write(storage, JSON.stringify([...chosen]));
  refresh();
  say(text);
}

// What an action makes of an image: a label, or undefined where it has nothing to say.
function outcome(index, action) {
  if (action === "reject") return data.given[index];
  if (action === "remove") return REMOVE;
  return data.proposed[index] === UNKNOWN ? undefined : data.proposed[index];
}

const DONE = { accept: "Accepted", reject: "Kept as given", remove: "Removed", clear: "Open again" };

// Do to images what a button or key says; false where nothing was done yet.
function act(indices, action) {
  if (action === "correct") {
    correct(indices);
    return false;
  }
  const changes = action === "clear" ? indices.map((index) => [index, undefined]) : indices.map((index) => [index, outcome(index, action)]);
  const able = action === "clear" ? changes : changes.filter(([, label]) => label !== undefined);
  if (!able.length) {
    say("No other class is known as probable: choose one with C.");
    return false;
  }
  decide(able, `${DONE[action]}: ${able.length === 1 ? data.id[able[0][0]] : plural(able.length, "image", "images")}.`);
  return true;
}

let correcting = [];
function correct(indices) {
  correcting = indices;
  $("correct-name").replaceChildren(indices.length === 1 ? make("bdi", {}, data.id[indices[0]]) : plural(indices.length, "image", "images"));
  const label = chosen.get(indices[0]) ?? data.proposed[indices[0]];
  $("class").value = String(label < 0 ? data.given[indices[0]] : label);
  $("correct").showModal();
  $("class").focus();
  $("class").selectedOptions[0]?.scrollIntoView({ block: "nearest" });
}

function takeCorrection() {
  const label = Number($("class").value);
  $("correct").close();
  const what = correcting.length === 1 ? `${data.id[correcting[0]]} is` : `${number(correcting.length)} images are`;
  decide(correcting.map((index) => [index, label]), `${what} ${data.classes[label]}.`);
  unpick();
  if (!$("full").open) focus(position);
}
