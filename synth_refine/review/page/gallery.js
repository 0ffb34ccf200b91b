// Filters, orders, and the cards of one page; never more than one page of images is drawn.
const PAGE = 48;
let found = []; // indices that the filters let through, in order
let page = 0;
let position = 0; // in `found`, of the image that has, or last had, the focus

const known = (value) => value ?? -Infinity;
// How near to undecided an image is: odds of 1 are, or else a low confidence is.
const doubt = (index) => (data.odds[index] === null ? known(data.confidence[index]) : Math.abs(Math.log(data.odds[index])));
const ORDERS = {
  sure: (a, b) => known(data.confidence[b]) - known(data.confidence[a]) || a - b,
  unsure: (a, b) => doubt(a) - doubt(b) || a - b,
  gain: (a, b) => known(data.odds[b]) - known(data.odds[a]) || a - b,
  pair: (a, b) => data.given[a] - data.given[b] || data.proposed[a] - data.proposed[b] || a - b,
  row: (a, b) => data.row[a] - data.row[b],
  copy: (a, b) => data.copy[a] - data.copy[b] || data.row[a] - data.row[b],
};
const FILTERS = ["kind", "old", "new", "reason", "state", "low", "high", "text", "sort"];

function filter() {
  const wanted = Object.fromEntries(FILTERS.map((id) => [id, $(id).value]));
  const bound = (text, otherwise) => (text === "" || Number.isNaN(Number(text)) ? otherwise : Number(text));
  const [low, high] = [bound(wanted.low, -Infinity), bound(wanted.high, Infinity)];
  const bounded = low !== -Infinity || high !== Infinity;
  const text = wanted.text.toLowerCase();
  const differs = (value, id) => wanted[id] !== "" && value !== Number(wanted[id]);
  found = [];
  for (let index = 0; index < count; index++) {
    if (wanted.kind === "copies" ? !data.copy[index] : wanted.kind === "" ? data.kind[index] === KEPT : differs(data.kind[index], "kind")) continue;
    if (differs(data.given[index], "old") || differs(data.proposed[index], "new") || differs(data.reason[index], "reason")) continue;
    if (wanted.state !== "" && stateOf(index) !== wanted.state) continue;
    const sure = data.confidence[index];
    if (bounded && (sure === null || sure < low || sure > high)) continue;
    if (text && !data.id[index].toLowerCase().includes(text)) continue;
    found.push(index);
  }
  found.sort(ORDERS[wanted.sort]);
  page = 0;
  position = 0;
  picked.clear();
  draw();
}

function show(wanted) {
  for (const [id, value] of Object.entries({ old: "", new: "", reason: "", state: "", low: "", high: "", text: "", ...wanted })) $(id).value = value;
  filter();
  enter();
}

// Go to the review with the keys at work.
function enter() {
  $("review").scrollIntoView();
  if (!found.length) return $("review").focus({ preventScroll: true });
  $("gallery").children[position - page * PAGE].focus({ preventScroll: true });
}

function picture(place, alternative, problem) {
  if (place < 0) return make("div", { class: "picture", role: "img", "aria-label": alternative }, problem ?? "no picture");
  return make("img", { class: "picture", src: data.thumbs[place], alt: alternative, loading: "lazy", decoding: "async", draggable: "false" });
}

const WORDS = { open: "", accept: "accepted", reject: "kept as given", remove: "removed" };
const KEYS = { accept: "a", reject: "r", correct: "c", remove: "d" };
const TITLES = {
  accept: ["Accept the new label (A)", "Accept the probable class (A)", "Accept the other class (A)"],
  reject: "Keep the label as given (R)",
  correct: "Choose another class (C)",
  remove: "None of the classes: remove the image (D)",
};

function choices(index) {
  const button = (action, text) =>
    make("button", { type: "button", class: action, "data-action": action, "aria-keyshortcuts": KEYS[action], tabindex: "-1", title: action === "accept" ? TITLES.accept[data.kind[index]] : TITLES[action] }, text);
  const accept = data.proposed[index] < 0 ? [] : [button("accept", data.kind[index] === KEPT ? "Change" : "Accept")]; // a proposed removal has its button
  return [...accept, button("reject", "Keep"), button("correct", "Other…"), button("remove", "Remove")];
}

// What is proposed, in words: a change, or a class that is probable without enough reason to change.
function labels(index) {
  const [given, proposed] = [className(data.given[index]), data.proposed[index]];
  if (data.kind[index] === CHANGE) return [make("span", { class: "was" }, given), " → ", make("span", { class: "now" }, className(proposed))];
  if (proposed === REMOVE) return [make("span", { class: "kept" }, given), make("span", { class: "maybe" }, " perhaps none of the classes")];
  const other = proposed === UNKNOWN ? [] : [make("span", { class: "maybe" }, data.kind[index] === KEPT ? " or " : " probably ", className(proposed), "?")];
  return [make("span", { class: "kept" }, given), ...other];
}

const odds = (value) => (value >= 1000 ? "over 1,000" : value >= 10 ? value.toFixed(0) : value.toPrecision(2));

// Why an image is shown.
function why(index) {
  const copy = data.copy[index] ? `copies, group ${number(data.copy[index])}` : "";
  if (data.kind[index] !== KEPT) return [data.reasons[data.reason[index]], copy].filter(Boolean).join("; ");
  return copy || "kept, but suspicious";
}

function card(index) {
  const sure = data.confidence[index];
  const facts = data.kind[index] === KEPT ? [] : [sure === null ? "confidence unknown" : `confidence ${sure.toFixed(2)}`];
  if (data.odds[index] !== null) facts.push(`odds ${odds(data.odds[index])}`);
  const gauge = make("span", { class: "gauge", "aria-hidden": "true" }, make("span"));
  gauge.firstChild.style.width = `${100 * Math.min(Math.max(sure ?? 0, 0), 1)}%`;
  const near = data.near[index].map((one) => {
    const name = data.classes[data.synthetic_class[one]];
    const image = data.synthetic[one] < 0 ? "–" : make("img", { src: data.thumbs[data.synthetic[one]], alt: "", loading: "lazy", draggable: "false" });
    return make("li", { title: `synthetic ${name}` }, image, make("bdi", {}, name));
  });
  return make(
    "article",
    { class: "card", tabindex: "-1", "data-index": index },
    picture(data.thumb[index], `image ${data.id[index]}`, data.problems[index]),
    make(
      "div",
      { class: "body" },
      make("p", { class: "labels" }, ...labels(index)),
      make("p", { class: "verdict" }),
      make("div", { class: "sure" }, ...(sure === null ? [] : [gauge]), facts.join(", ")),
      make("p", { class: "why" }, why(index)),
      make("p", { class: "name", title: data.id[index] }, make("bdi", {}, data.id[index])),
    ),
    ...(near.length ? [make("div", { class: "foot" }, make("p", { class: "caption", "aria-hidden": "true" }, "nearest synthetic images"), make("ul", { class: "near", "aria-label": "nearest synthetic images" }, ...near))] : []),
    make("div", { class: "buttons" }, make("label", { class: "pick", title: "Choose together with others (space)" }, make("input", { type: "checkbox", tabindex: "-1", "aria-label": `choose ${data.id[index]}` })), ...choices(index)),
  );
}

function draw() {
  const first = page * PAGE;
  const shown = found.slice(first, first + PAGE);
  $("gallery").replaceChildren(...shown.map(card));
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  $("page").textContent = `page ${number(page + 1)} of ${number(pages)}`;
  $("previous").disabled = page === 0;
  $("next").disabled = page + 1 >= pages;
  $("found").textContent = found.length
    ? `Images ${number(first + 1)} to ${number(first + shown.length)} of ${number(found.length)}.`
    : "No image fits these filters.";
  refresh();
}

function verdict(index) {
  const [state, label] = [stateOf(index), chosen.get(index)];
  return state === "correct" ? ["→ ", className(label)] : [WORDS[state]];
}

function refresh() {
  for (const element of $("gallery").children) {
    const index = Number(element.dataset.index);
    const state = stateOf(index);
    element.dataset.state = state;
    element.classList.toggle("picked", picked.has(index));
    element.querySelector(".pick input").checked = picked.has(index);
    element.querySelector(".verdict").replaceChildren(...verdict(index));
    const here = found[position] === index;
    for (const button of element.querySelectorAll("[data-action]")) button.setAttribute("aria-pressed", String(button.dataset.action === state));
    for (const one of element.querySelectorAll("button, input")) one.tabIndex = here ? 0 : -1;
    element.tabIndex = here ? 0 : -1;
    const [given, proposed] = [data.classes[data.given[index]], data.classes[data.proposed[index]] ?? (data.proposed[index] === REMOVE ? "none of the classes" : "nothing")];
    const what = [`${given}, proposed ${proposed}`, `${given}, left to you, probably ${proposed}`, `${given}, kept, or ${proposed}`][data.kind[index]];
    const words = state === "open" ? "still open" : state === "correct" ? `corrected to ${data.classes[chosen.get(index)]}` : WORDS[state];
    element.setAttribute("aria-label", `${data.id[index]}: ${what}, ${words}`);
  }
  const states = { accept: 0, reject: 0, correct: 0, remove: 0 };
  for (const [index, label] of chosen) states[stateOf(index, label)]++;
  const more = chosen.size - decided();
  $("tally").textContent =
    `${number(decided())} of ${number(toDecide)} decided: ${number(states.accept)} accepted, ` +
    `${number(states.reject)} kept as given, ${number(states.correct)} corrected, ${number(states.remove)} removed` +
    (more ? `; ${number(more)} of them kept labels` : "");
  $("progress").max = Math.max(toDecide, 1);
  $("progress").value = decided();
  $("undo").disabled = steps.length === 0;
  $("export").disabled = chosen.size === 0 && answers.size === 0;
  refreshBulk();
  if ($("full").open) drawFull();
  drawEstimate();
}

function focus(wanted) {
  if (!found.length) return;
  position = Math.min(Math.max(wanted, 0), found.length - 1);
  if (Math.floor(position / PAGE) !== page) {
    page = Math.floor(position / PAGE);
    draw();
  } else refresh();
  if ($("full").open) return;
  const element = $("gallery").children[position - page * PAGE];
  element.focus();
  element.scrollIntoView({ block: "nearest" });
}

function turn(by) {
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  const target = Math.min(Math.max(page + by, 0), pages - 1);
  if (target === page) return say(by > 0 ? "This is the last page." : "This is the first page.");
  focus(target * PAGE);
}

function perRow() {
  return getComputedStyle($("gallery")).gridTemplateColumns.split(" ").length;
}
