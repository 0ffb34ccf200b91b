// What buttons, keys and the mouse do.
function fill(id, labels, any) {
  const options = labels.map((label) => make("option", { value: label }, data.classes[label]));
  $(id).replaceChildren(...(any === undefined ? [] : [make("option", { value: "" }, any)]), ...options);
}

const used = (column) => [...new Set(column)].filter((label) => label >= 0).sort((a, b) => a - b);
fill("old", used(data.given), "any class");
fill("new", used(data.proposed), "any class");
fill("class", data.classes.map((_, label) => label));
fill("audit-class", data.classes.map((_, label) => label), "another class…");
$("reason").append(...data.reasons.flatMap((text, place) => (text ? [make("option", { value: place }, text)] : [])));
if (!data.kind.includes(CHANGE) && toDecide) $("kind").value = String(ABSTAIN);

$("kind").addEventListener("input", () => {
  if ($("kind").value === String(KEPT)) $("sort").value = "gain";
});
for (const id of FILTERS) $(id).addEventListener("input", filter);
$("reset").addEventListener("click", () => {
  for (const id of ["old", "new", "reason", "state", "low", "high", "text"]) $(id).value = "";
  filter();
});
for (const action of ["accept", "reject", "correct", "remove"]) $(`bulk-${action}`).addEventListener("click", () => bulk(action));
$("unpick").addEventListener("click", unpick);
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
  if (event.key !== "Enter") return;
  event.preventDefault();
  takeCorrection();
});
for (const element of document.querySelectorAll("[data-old]")) {
  element.addEventListener("click", () => show({ kind: String(CHANGE), old: element.dataset.old, new: element.dataset.new }));
}
for (const element of document.querySelectorAll("[data-class]")) {
  element.addEventListener("click", () => show({ kind: element.dataset.kind, old: element.dataset.class, ...({ [KEPT]: { sort: "gain" }, copies: { sort: "copy" } })[element.dataset.kind] }));
}
for (const element of document.querySelectorAll('a[href="#review"]')) {
  element.addEventListener("click", (event) => {
    event.preventDefault();
    enter();
  });
}

// ---- full size and audit ----

$("full-close").addEventListener("click", closeFull);
$("full").addEventListener("cancel", (event) => {
  event.preventDefault();
  closeFull();
});
$("full-previous").addEventListener("click", () => focus(position - 1));
$("full-next").addEventListener("click", () => focus(position + 1));
$("full-buttons").addEventListener("click", (event) => {
  const action = event.target.closest("[data-action]")?.dataset.action;
  if (action) decideHere(action);
});
$("audit-open").addEventListener("click", openAudit);
$("audit-stop").addEventListener("click", () => $("audit").close());
$("audit-back").addEventListener("click", () => ask(asked - 1));
$("audit-next").addEventListener("click", () => ask(asked + 1));
$("audit-choices").addEventListener("click", (event) => {
  const wanted = event.target.closest("[data-answer]");
  if (wanted) answer(Number(wanted.dataset.answer));
});
$("audit-class").addEventListener("change", () => {
  if ($("audit-class").value !== "") answer(Number($("audit-class").value));
  $("audit-class").blur();
});

// Decide on the image that has the focus, or on the chosen ones, and go on.
function decideHere(action) {
  const index = found[position];
  const many = picked.has(index) && picked.size > 1 && !$("full").open;
  if (!act(many ? target() : [index], action)) return;
  if (many) unpick();
  else if (action !== "clear") focus(position + 1);
}

// ---- the gallery by mouse ----

let banded = false;
$("gallery").addEventListener("pointerdown", startBand);
document.addEventListener("pointermove", moveBand);
document.addEventListener("pointerup", () => {
  banded = endBand();
  if (banded) setTimeout(() => (banded = false)); // the click comes first
});
$("gallery").addEventListener("click", (event) => {
  const element = event.target.closest(".card");
  if (!element || banded) return;
  const index = Number(element.dataset.index);
  position = found.indexOf(index);
  const action = event.target.closest("[data-action]")?.dataset.action;
  if (action) {
    const many = picked.has(index) && picked.size > 1;
    const again = stateOf(index) === action && action !== "correct";
    if (act(many ? target() : [index], again ? "clear" : action) && many) unpick();
    return refresh();
  }
  if (event.target.closest(".pick")) {
    if (event.target.matches("input")) pick(position, event.target.checked);
    return;
  }
  if (event.shiftKey) pickTo(position);
  else if (event.ctrlKey || event.metaKey) pick(position);
  else {
    anchor = position;
    if (picked.size) unpick();
  }
  focus(position);
  if (event.target.closest("img.picture") && !event.shiftKey && !event.ctrlKey && !event.metaKey) openFull();
});
$("gallery").addEventListener("focusin", (event) => {
  const element = event.target.closest(".card");
  const wanted = element ? found.indexOf(Number(element.dataset.index)) : position;
  if (wanted === position) return;
  position = wanted;
  refresh();
});

// ---- keys ----

const DECIDE = { a: "accept", r: "reject", c: "correct", d: "remove", x: "clear" };
document.addEventListener("keydown", (event) => {
  const open = [...document.querySelectorAll("dialog[open]")].at(-1);
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.altKey || (open && open.id !== "full" && open.id !== "audit") || $("correct").open) return;
  const typing = event.target.closest("select, textarea, summary, .scroll, .pairs, input:not([type=checkbox])");
  if (event.ctrlKey || event.metaKey) {
    if (key !== "z" || event.shiftKey || typing || open?.id === "audit") return;
    event.preventDefault();
    return undo();
  }
  if (open?.id === "audit") return auditKey(event, key);
  if (typing) return;
  const inside = Boolean(open) || $("review").contains(event.target);
  const across = open ? 1 : perRow();
  const moves = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1, ArrowDown: across, ArrowUp: -across };
  const onCard = $("gallery").contains(event.target);
  if (key === "?" && !open) $("help").showModal();
  else if (!inside && (key === "ArrowRight" || key === "j") && found.length) focus(position); // up and down scroll
  else if (!inside || !found.length) return;
  else if (key in moves) {
    if (!open && !onCard && !(key in { j: 1, k: 1, ArrowRight: 1 })) return;
    if (!open && !onCard) focus(position);
    else {
      if (event.shiftKey && !picked.size) anchor = position;
      focus(position + moves[key]);
      if (event.shiftKey && !open) pickTo(position);
    }
  } else if (key in DECIDE) decideHere(DECIDE[key]);
  else if (key === "u") undo();
  else if (key === "f") open ? closeFull() : openFull();
  else if (key === "Enter" && event.target.matches(".card")) openFull();
  else if (key === " " && event.target.matches(".card")) pick(position);
  else if (key === "Escape" && !open && picked.size) unpick();
  else if ((key === "n" || key === "p") && !open) turn(key === "n" ? 1 : -1);
  else return;
  event.preventDefault();
});

window.addEventListener("storage", (event) => {
  if (event.key !== storage && event.key !== auditStorage) return; // another tab with the same page
  steps = [];
  load();
  loadAnswers();
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
loadAnswers();
filter();
