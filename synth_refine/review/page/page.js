"use strict";
// The gallery. All text goes into the page as text, never as markup; a decision is the label that was chosen.
(() => {
  const PAGE = 48;
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const count = data.row.length;
  const storage = `synth-refine ${data.key}`;
  const chosen = new Map(); // index of an image -> label
  let steps = []; // for undo: lists of [index, label before or undefined]
  let found = []; // indices that the filters let through, in order
  let page = 0;
  let current = 0; // position in `found` of the image that has, or last had, the focus
  let kept = true; // whether the browser keeps the decisions
  let exported = true;

  const number = (value) => value.toLocaleString("en");
  const stateOf = (index, label = chosen.get(index)) =>
    label === undefined ? "open" : label === data.proposed[index] ? "accept" : label === data.given[index] ? "reject" : "correct";

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }
  const className = (label) => make("bdi", {}, data.classes[label]);

  // ---- what is kept ----

  function save() {
    try {
      localStorage.setItem(storage, JSON.stringify([...chosen]));
    } catch {
      forgetful();
    }
  }

  function forgetful() {
    kept = false;
    $("problem").hidden = false;
    $("problem").textContent =
      "This browser does not keep your decisions: export them before you leave the page, and load them when you come back.";
  }

  function load() {
    let text;
    try {
      text = localStorage.getItem(storage);
      localStorage.setItem(storage, text ?? "[]"); // a full or read-only storage shows here, not after an hour's work
    } catch {
      return forgetful();
    }
    try {
      chosen.clear();
      for (const [index, label] of JSON.parse(text ?? "[]")) {
        if (index in data.row && label in data.classes) chosen.set(index, label);
      }
    } catch {
      chosen.clear(); // not ours
    }
  }

  // ---- decisions ----

  function decide(changes, text) {
    // changes: [index, label or undefined], one step for undo
    const step = [];
    for (const [index, label] of changes) {
      if (chosen.get(index) === label) continue;
      step.push([index, chosen.get(index)]);
      label === undefined ? chosen.delete(index) : chosen.set(index, label);
    }
    if (!step.length) return say("Nothing to change.");
    steps.push(step);
    exported = false;
    save();
    refresh();
    say(text);
  }

  function undo() {
    const step = steps.pop();
    if (!step) return say("Nothing to undo.");
    for (const [index, label] of step) label === undefined ? chosen.delete(index) : chosen.set(index, label);
    save();
    refresh();
    say(step.length === 1 ? `Undone: ${data.id[step[0][0]]}.` : `Undone: ${number(step.length)} decisions.`);
  }

  function say(text) {
    const done = `${number(chosen.size)} of ${number(count)} decided.`;
    $("live").textContent = `${text} ${done}`;
  }

  function act(index, action) {
    const name = data.id[index];
    if (action === "accept") decide([[index, data.proposed[index]]], `Accepted ${name} as ${data.classes[data.proposed[index]]}.`);
    else if (action === "reject") decide([[index, data.given[index]]], `Rejected: ${name} stays ${data.classes[data.given[index]]}.`);
    else if (action === "clear") decide([[index, undefined]], `Open again: ${name}.`);
    else correct(index);
  }

  function correct(index) {
    $("correct-name").replaceChildren(make("bdi", {}, data.id[index]));
    $("class").value = String(chosen.get(index) ?? data.proposed[index]);
    $("correct").dataset.index = index;
    $("correct").showModal();
    $("class").focus();
    $("class").selectedOptions[0]?.scrollIntoView({ block: "nearest" });
  }

  function takeCorrection() {
    const index = Number($("correct").dataset.index);
    const label = Number($("class").value);
    $("correct").close();
    decide([[index, label]], `${data.id[index]} is ${data.classes[label]}.`);
    focus(found.indexOf(index));
  }

  // ---- filter and sort ----

  const ORDERS = {
    sure: (a, b) => (data.confidence[b] ?? -Infinity) - (data.confidence[a] ?? -Infinity) || a - b,
    unsure: (a, b) => (data.confidence[a] ?? -Infinity) - (data.confidence[b] ?? -Infinity) || a - b,
    pair: (a, b) => data.given[a] - data.given[b] || data.proposed[a] - data.proposed[b] || a - b,
    row: (a, b) => data.row[a] - data.row[b],
  };

  function filter() {
    const value = (id) => $(id).value;
    const bound = (id, otherwise) => (value(id) === "" || Number.isNaN(Number(value(id))) ? otherwise : Number(value(id)));
    const low = bound("low", -Infinity);
    const high = bound("high", Infinity);
    const text = value("text").toLowerCase();
    const bounded = low !== -Infinity || high !== Infinity;
    found = [];
    for (let index = 0; index < count; index++) {
      if (value("kind") !== "" && data.change[index] !== Number(value("kind"))) continue;
      if (value("old") !== "" && data.given[index] !== Number(value("old"))) continue;
      if (value("new") !== "" && data.proposed[index] !== Number(value("new"))) continue;
      if (value("state") !== "" && stateOf(index) !== value("state")) continue;
      const sure = data.confidence[index];
      if (bounded && (sure === null || sure < low || sure > high)) continue;
      if (text && !data.id[index].toLowerCase().includes(text)) continue;
      found.push(index);
    }
    found.sort(ORDERS[value("sort")]);
    page = 0;
    current = 0;
    draw();
  }

  function choosePair(button) {
    $("kind").value = "1";
    $("old").value = button.dataset.old;
    $("new").value = button.dataset.new;
    filter();
    $("review").scrollIntoView();
    $("review").focus({ preventScroll: true });
  }

  // ---- drawing: never more than one page of images ----

  function picture(place, alternative, problem) {
    if (place < 0) return make("div", { class: "picture", role: "img", "aria-label": alternative }, problem ?? "no picture");
    return make("img", { class: "picture", src: data.thumbs[place], alt: alternative, loading: "lazy", decoding: "async" });
  }

  function card(index) {
    const [given, proposed] = [data.given[index], data.proposed[index]];
    const labels = data.change[index]
      ? [make("span", { class: "was" }, className(given)), " → ", make("span", { class: "now" }, className(proposed))]
      : [make("span", { class: "was kept" }, className(given))];
    const sure = data.confidence[index];
    const gauge = make("span", { class: "gauge", "aria-hidden": "true" }, make("span"));
    gauge.firstChild.style.width = `${100 * Math.min(Math.max(sure ?? 0, 0), 1)}%`;
    const near = data.near[index].map((one) => {
      const name = data.classes[data.synthetic_class[one]];
      const image = data.synthetic[one] < 0 ? "–" : make("img", { src: data.thumbs[data.synthetic[one]], alt: "", loading: "lazy" });
      return make("li", { title: `synthetic ${name}` }, image, make("bdi", {}, name));
    });
    const button = (action, text, key) =>
      make("button", { type: "button", class: action, "data-action": action, "aria-keyshortcuts": key, tabindex: "-1" }, text);
    return make(
      "article",
      { class: "card", tabindex: "-1", "data-index": index },
      picture(data.thumb[index], `image ${data.id[index]}`, data.problems[index]),
      make(
        "div",
        { class: "body" },
        make("p", { class: "labels" }, ...labels, make("span", { class: "verdict" })),
        make(
          "div",
          { class: "sure" },
          gauge,
          sure === null ? "confidence unknown" : `confidence ${sure.toFixed(2)}`,
        ),
        make("p", { class: "why" }, data.reasons[data.reason[index]]),
        make("p", { class: "name", title: data.id[index] }, make("bdi", {}, data.id[index])),
      ),
      make(
        "div",
        { class: "foot" },
        ...(near.length ? [make("p", { class: "caption", "aria-hidden": "true" }, "nearest synthetic images")] : []),
        make("ul", { class: "near", "aria-label": "nearest synthetic images" }, ...near),
        make(
          "div",
          { class: "buttons" },
          button("accept", data.change[index] ? "Accept" : "Keep", "a"),
          ...(data.change[index] ? [button("reject", "Reject", "r")] : []),
          button("correct", "Correct", "c"),
        ),
      ),
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

  function refresh() {
    for (const element of $("gallery").children) {
      const index = Number(element.dataset.index);
      const state = stateOf(index);
      const label = chosen.get(index);
      element.dataset.state = state;
      const verdict = state === "correct" ? ` → ${data.classes[label]}` : "";
      element.querySelector(".verdict").replaceChildren(...(verdict ? [" → ", make("strong", {}, className(label))] : []));
      for (const button of element.querySelectorAll("[data-action]")) {
        button.setAttribute("aria-pressed", String(button.dataset.action === state));
        button.tabIndex = found[current] === index ? 0 : -1;
      }
      element.tabIndex = found[current] === index ? 0 : -1;
      const words = { open: "still open", accept: "accepted", reject: "rejected", correct: `corrected to ${data.classes[label]}` };
      const [given, proposed] = [data.classes[data.given[index]], data.classes[data.proposed[index]]];
      const what = data.change[index] ? `${given}, proposed ${proposed}` : `${given}, left to you`;
      element.setAttribute("aria-label", `${data.id[index]}: ${what}, ${words[state]}`);
    }
    const states = { accept: 0, reject: 0, correct: 0 };
    for (const [index, label] of chosen) states[stateOf(index, label)]++;
    $("tally").textContent =
      `${number(chosen.size)} of ${number(count)} decided: ` +
      `${number(states.accept)} accepted, ${number(states.reject)} rejected, ${number(states.correct)} corrected`;
    $("progress").max = Math.max(count, 1);
    $("progress").value = chosen.size;
    const open = found.filter((index) => !chosen.has(index)).length;
    $("accept-all").textContent = `Accept all ${number(open)} shown`;
    $("accept-all").disabled = open === 0;
    $("undo").disabled = steps.length === 0;
    $("export").disabled = chosen.size === 0;
  }

  function focus(position) {
    if (!found.length) return;
    current = Math.min(Math.max(position, 0), found.length - 1);
    if (Math.floor(current / PAGE) !== page) {
      page = Math.floor(current / PAGE);
      draw();
    } else refresh();
    const element = $("gallery").children[current - page * PAGE];
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

  // ---- files ----

  const guard = (text) => (/^[=+\-@\t\r']/.test(text) ? `'${text}` : text); // a spreadsheet would run it
  const unguard = (text) => (/^'[=+\-@\t\r']/.test(text) ? text.slice(1) : text);
  const cell = (text) => `"${guard(text).replaceAll('"', '""')}"`;

  function toCsv() {
    const indices = [...chosen.keys()].sort((a, b) => data.row[a] - data.row[b]);
    const lines = indices.map((index) => {
      const label = chosen.get(index);
      return [data.id[index], data.classes[data.given[index]], stateOf(index), data.classes[label]].map(cell).join(",");
    });
    return ['"id","given","decision","label"', ...lines, ""].join("\n");
  }

  function parseCsv(text) {
    const rows = [[]];
    const pattern = /(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r\n|\n|\r|$)/gy;
    for (let match; pattern.lastIndex < text.length && (match = pattern.exec(text)); ) {
      rows.at(-1).push(unguard(match[1] !== undefined ? match[1].replaceAll('""', '"') : match[2]));
      if (match[3] !== ",") rows.push([]);
    }
    if (pattern.lastIndex < text.length) throw new Error("no table");
    rows.pop();
    return rows;
  }

  function exportFile() {
    const link = make("a", { download: "decisions.csv" });
    link.href = URL.createObjectURL(new Blob([toCsv()], { type: "text/csv" }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    exported = true;
    say("Exported decisions.csv.");
  }

  async function importFile(file) {
    try {
      const [header, ...rows] = parseCsv((await file.text()).replace(/^\uFEFF/, ""));
      const places = ["id", "given", "label"].map((name) => header.indexOf(name));
      if (places.includes(-1)) throw new Error("no columns id, given and label");
      const indexOf = new Map(data.id.map((id, index) => [id, index]));
      const labelOf = new Map(data.classes.map((name, label) => [name, label]));
      const changes = [];
      for (const row of rows) {
        const [index, given, label] = [indexOf.get(row[places[0]]), labelOf.get(row[places[1]]), labelOf.get(row[places[2]])];
        if (index !== undefined && label !== undefined && data.given[index] === given) changes.push([index, label]);
      }
      const text = `Loaded ${number(changes.length)} of ${number(rows.length)} decisions${changes.length < rows.length ? "; the others are about other images or labels" : ""}.`;
      decide(changes, text);
      $("found").textContent = text;
    } catch (error) {
      say(`${file.name} is no file of decisions: ${error.message}.`);
      $("found").textContent = `${file.name} is no file of decisions: ${error.message}.`;
    }
  }

  // ---- events ----

  function fill(id, labels, any) {
    const options = labels.map((label) => make("option", { value: label }, data.classes[label]));
    $(id).replaceChildren(...(any ? [make("option", { value: "" }, "any class")] : []), ...options);
  }

  const used = (column) => [...new Set(column)].sort((a, b) => a - b);
  fill("old", used(data.given), true);
  fill("new", used(data.proposed), true);
  fill("class", data.classes.map((_, label) => label), false);
  if (count && !data.change.includes(1)) $("kind").value = "0";

  for (const id of ["kind", "old", "new", "state", "low", "high", "text", "sort"]) $(id).addEventListener("input", filter);
  $("reset").addEventListener("click", () => {
    for (const id of ["old", "new", "state", "low", "high", "text"]) $(id).value = "";
    filter();
  });
  $("accept-all").addEventListener("click", () => {
    const open = found.filter((index) => !chosen.has(index));
    decide(open.map((index) => [index, data.proposed[index]]), `Accepted ${number(open.length)} images.`);
  });
  $("undo").addEventListener("click", undo);
  $("export").addEventListener("click", exportFile);
  $("import").addEventListener("change", async (event) => {
    await importFile(event.target.files[0]);
    event.target.value = "";
  });
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("help-button").addEventListener("click", () => $("help").showModal());
  $("help-close").addEventListener("click", () => $("help").close());
  $("correct-cancel").addEventListener("click", () => $("correct").close());
  $("correct-take").addEventListener("click", takeCorrection);
  $("class").addEventListener("dblclick", takeCorrection);
  $("class").addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault();
      takeCorrection();
    }
  });
  for (const element of document.querySelectorAll("[data-old]")) element.addEventListener("click", () => choosePair(element));

  $("gallery").addEventListener("click", (event) => {
    const element = event.target.closest(".card");
    if (!element) return;
    const index = Number(element.dataset.index);
    current = found.indexOf(index);
    const action = event.target.closest("[data-action]")?.dataset.action;
    if (!action) return focus(current);
    act(index, stateOf(index) === action && action !== "correct" ? "clear" : action);
    refresh();
  });
  $("gallery").addEventListener("focusin", (event) => {
    const element = event.target.closest(".card");
    const position = element ? found.indexOf(Number(element.dataset.index)) : current;
    if (position !== current) {
      current = position;
      refresh();
    }
  });

  const DECIDE = { a: "accept", r: "reject", c: "correct", x: "clear" };
  document.addEventListener("keydown", (event) => {
    if (event.altKey || document.querySelector("dialog[open]")) return;
    const typing = event.target.closest("input, select, textarea, summary, .scroll, .pairs");
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (event.ctrlKey || event.metaKey) {
      if (key === "z" && !event.shiftKey && !typing) {
        event.preventDefault();
        undo();
      }
      return;
    }
    if (typing) return;
    const inside = $("gallery").contains(event.target);
    const moves = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1, ArrowDown: perRow(), ArrowUp: -perRow() };
    if (key === "?") $("help").showModal();
    else if (inside && key in moves) focus(current + moves[key]);
    else if (!inside && (key === "ArrowRight" || key === "j") && found.length) focus(current); // up and down scroll
    else if (!inside) return;
    else if (key in DECIDE) {
      act(found[current], DECIDE[key]);
      if (key === "a" || key === "r") focus(current + 1);
    } else if (key === "u") undo();
    else if (key === "n" || key === "p") turn(key === "n" ? 1 : -1);
    else return;
    event.preventDefault();
  });

  window.addEventListener("storage", (event) => {
    if (event.key !== storage) return; // another tab with the same page
    steps = [];
    load();
    refresh();
  });
  window.addEventListener("beforeunload", (event) => {
    if (!kept && !exported) event.preventDefault();
  });

  const theme = $("theme");
  function setTheme(value) {
    document.documentElement.style.colorScheme = value || "light dark";
    theme.value = value;
  }
  try {
    const wanted = localStorage.getItem("synth-refine theme") ?? "";
    setTheme(["light", "dark"].includes(wanted) ? wanted : "");
  } catch {
    setTheme("");
  }
  theme.addEventListener("change", () => {
    setTheme(theme.value);
    try {
      localStorage.setItem("synth-refine theme", theme.value);
    } catch {
      // it holds for this visit
    }
  });

  const narrow = window.matchMedia("(max-width: 600px)");
  const fold = () => ($("filters").open = !narrow.matches);
  narrow.addEventListener("change", fold);
  fold();

  load();
  filter();
})();
