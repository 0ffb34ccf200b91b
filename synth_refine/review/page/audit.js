// A random sample, asked about without saying what was given and what is proposed, and what the answers estimate.
const auditStorage = `${storage} audit`;
const [NO_CLASS, UNCLEAR] = [-1, -2]; // answers beside the classes
const answers = new Map(); // place in data.audit -> class, NO_CLASS or UNCLEAR
const places = new Map(data.row.map((row, index) => [row, index]));
let asked = 0; // place in data.audit

function loadAnswers() {
  answers.clear();
  const found = read(auditStorage);
  for (const [place, answer] of Array.isArray(found) ? found.filter(Array.isArray) : []) {
    if (place in data.audit && (answer in data.classes || answer === NO_CLASS || answer === UNCLEAR)) answers.set(place, answer);
  }
}

function openAudit() {
  const open = data.audit.findIndex((_, place) => !answers.has(place));
  asked = open < 0 ? 0 : open;
  $("audit-class").selectedIndex = 0;
  $("audit").showModal();
  drawQuestion();
}

function drawQuestion() {
  const one = data.audit[asked];
  $("audit-count").textContent = `Image ${number(asked + 1)} of ${number(data.audit.length)}; ${number(answers.size)} answered.`;
  large($("audit-image"), one.id, one.thumb, $("audit-note"));
  const button = (answer, key, ...children) =>
    make("button", { type: "button", "data-answer": answer, "aria-keyshortcuts": key, "aria-pressed": String(answers.get(asked) === answer) }, make("kbd", {}, key), ...children);
  $("audit-choices").replaceChildren(
    ...one.offered.map((label, place) => button(label, String(place + 1), className(label))),
    button(NO_CLASS, "D", "None of the classes"),
    button(UNCLEAR, "X", "Nobody can tell"),
  );
  const other = answers.has(asked) && answers.get(asked) >= 0 && !one.offered.includes(answers.get(asked));
  $("audit-class").value = other ? String(answers.get(asked)) : "";
  $("audit-back").disabled = asked === 0;
  $("audit-next").disabled = asked + 1 >= data.audit.length;
}

function answer(value) {
  answers.set(asked, value);
  exported = false;
  write(auditStorage, JSON.stringify([...answers]));
  refresh();
  if (asked + 1 < data.audit.length) return ask(asked + 1);
  $("audit").close();
  $("audit-open").focus();
}

function ask(place) {
  asked = Math.min(Math.max(place, 0), data.audit.length - 1);
  drawQuestion();
}

function auditKey(event, key) {
  if (event.target.closest("select")) return;
  const offered = data.audit[asked].offered;
  if (/^[1-9]$/.test(key) && Number(key) <= offered.length) answer(offered[Number(key) - 1]);
  else if (key === "d") answer(NO_CLASS);
  else if (key === "x") answer(UNCLEAR);
  else if (key === "ArrowLeft") ask(asked - 1);
  else if (key === "ArrowRight") ask(asked + 1);
  else return;
  event.preventDefault();
}

// Wilson's interval of a share, at 95 %.
function wilson(wrong, seen) {
  const z = 1.959963984540054;
  const [share, z2] = [wrong / seen, (z * z) / seen];
  const middle = (share + z2 / 2) / (1 + z2);
  const reach = (z / (1 + z2)) * Math.sqrt((share * (1 - share)) / seen + z2 / (4 * seen));
  return [middle - reach, middle + reach];
}

// The share of wrong labels in all strata, as synth_refine.labels.audit has it: [estimate, low, high] or null.
function wrongShare(counts) {
  const used = counts.filter(([size]) => size > 0);
  if (!used.length || used.some(([, , seen]) => seen === 0)) return null;
  const total = used.reduce((sum, [size]) => sum + size, 0);
  let [value, below, above] = [0, 0, 0];
  for (const [size, wrong, seen] of used) {
    const [share, weight, left] = [wrong / seen, size / total, (size - seen) / Math.max(size - 1, 1)];
    const [low, high] = wilson(wrong, seen);
    value += weight * share;
    below += weight ** 2 * left * (share - low) ** 2;
    above += weight ** 2 * left * (high - share) ** 2;
  }
  return [value, Math.max(0, value - Math.sqrt(below)), Math.min(1, value + Math.sqrt(above))];
}

// The label that an image has after the decisions so far; what nobody decided on stays as given.
function labelNow(one) {
  const label = places.has(one.row) ? chosen.get(places.get(one.row)) : undefined;
  return label ?? one.given;
}

function drawEstimate() {
  const known = [...answers].filter(([, right]) => right !== UNCLEAR).map(([place, right]) => [data.audit[place], right]);
  const counts = (wrong) =>
    ["changed", "kept"].map((name) => {
      const own = known.filter(([one]) => (one.given === one.proposed) === (name === "kept"));
      return [data.strata[name], own.filter(([one, right]) => wrong(one, right)).length, own.length];
    });
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  const lines = {
    before: (one, right) => one.given !== right,
    proposed: (one, right) => one.proposed !== right,
    after: (one, right) => labelNow(one) !== right && labelNow(one) !== REMOVE,
  };
  for (const [name, wrong] of Object.entries(lines)) {
    const found = wrongShare(counts(wrong));
    $(`audit-${name}`).textContent = found ? `${percent(found[0])} (${percent(found[1])} to ${percent(found[2])})` : "not known yet";
  }
  const [changes, stays] = counts(lines.proposed);
  $("audit-parts").textContent = known.length
    ? `Wrong among the answered: ${number(changes[1])} of ${plural(changes[2], "change", "changes")}, ${number(stays[1])} of ${plural(stays[2], "kept label", "kept labels")}.`
    : "";
  $("audit-open").textContent = answers.size === 0 ? "Start the audit" : answers.size < data.audit.length ? `Resume (${number(answers.size)} of ${number(data.audit.length)})` : "Look at your answers";
}
