// decisions.csv: one row per decision, and one per answer of the audit.
const AUDITS = { [NO_CLASS]: "audit-none", [UNCLEAR]: "audit-unclear" };

const guard = (text) => (/^[=+\-@\t\r']/.test(text) ? `'${text}` : text); // a spreadsheet would run it
const unguard = (text) => (/^'[=+\-@\t\r']/.test(text) ? text.slice(1) : text);
const cell = (text) => `"${guard(text).replaceAll('"', '""')}"`;

function toCsv() {
  const rows = [...chosen].sort(([a], [b]) => data.row[a] - data.row[b]).map(([index, label]) => {
    const [state, given] = [stateOf(index, label), data.classes[data.given[index]]];
    // The artifact proposes nothing for a kept label: another class is a correction there.
    const decision = state === "accept" && data.kind[index] === KEPT ? "correct" : state;
    return [data.id[index], given, decision, data.classes[label] ?? given];
  });
  for (const [place, answer] of [...answers].sort(([a], [b]) => a - b)) {
    const one = data.audit[place];
    rows.push([one.id, data.classes[one.given], AUDITS[answer] ?? "audit", data.classes[answer] ?? ""]);
  }
  return ['"id","given","decision","label"', ...rows.map((row) => row.map(cell).join(",")), ""].join("\n");
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
  let text;
  try {
    const [header, ...rows] = parseCsv((await file.text()).replace(/^\uFEFF/, ""));
    const columns = ["id", "given", "decision", "label"].map((name) => header.indexOf(name));
    if (columns.includes(-1)) throw new Error("no columns id, given, decision and label");
    const indexOf = new Map(data.id.map((id, index) => [id, index]));
    const placeOf = new Map(data.audit.map((one, place) => [one.id, place]));
    const labelOf = new Map(data.classes.map((name, label) => [name, label]));
    const changes = [];
    let taken = 0;
    for (const row of rows) {
      const [id, old, decision, name] = columns.map((column) => row[column]);
      const given = labelOf.get(old);
      if (decision.startsWith("audit")) {
        const answer = { "audit-none": NO_CLASS, "audit-unclear": UNCLEAR }[decision] ?? labelOf.get(name);
        const place = placeOf.get(id);
        if (place === undefined || answer === undefined || data.audit[place].given !== given) continue;
        answers.set(place, answer);
        taken++;
        continue;
      }
      const [index, label] = [indexOf.get(id), decision === "remove" ? REMOVE : labelOf.get(name)];
      if (index !== undefined && label !== undefined && data.given[index] === given) changes.push([index, label]);
    }
    write(auditStorage, JSON.stringify([...answers]));
    taken += changes.length;
    text = `Loaded ${number(taken)} of ${number(rows.length)} decisions${taken < rows.length ? "; the others are about other images or labels" : ""}.`;
    decide(changes, text);
    refresh();
  } catch (error) {
    text = `${file.name} is no file of decisions: ${error.message}.`;
    say(text);
  }
  $("found").textContent = text;
}
