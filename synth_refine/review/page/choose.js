// Several images at once: chosen ones, or all that the filters show.
const picked = new Set(); // indices
let anchor = 0; // position in `found` where a range begins

// What the bulk buttons are about: the chosen images, or those shown that are open, or else all shown.
function target() {
  if (picked.size) return found.filter((index) => picked.has(index));
  const open = found.filter((index) => !chosen.has(index));
  return open.length ? open : found;
}

function unpick() {
  picked.clear();
  refresh();
}

function pick(position, on) {
  if (on ?? !picked.has(found[position])) picked.add(found[position]);
  else picked.delete(found[position]);
  anchor = position;
  refresh();
}

function pickTo(position) {
  const [first, last] = [Math.min(anchor, position), Math.max(anchor, position)];
  picked.clear();
  for (const index of found.slice(first, last + 1)) picked.add(index);
  refresh();
}

function refreshBulk() {
  const images = target();
  const open = images.length > 0 && !chosen.has(images[0]);
  $("bulk-what").textContent = picked.size
    ? `${plural(images.length, "chosen image", "chosen images")}:`
    : `All ${number(images.length)} shown${open ? " and open" : ""}:`;
  $("unpick").hidden = picked.size === 0;
  const kinds = new Set(images.map((index) => data.kind[index]));
  $("bulk-accept").textContent = kinds.size > 1 ? "Accept new or probable label" : kinds.has(CHANGE) ? "Accept new label" : kinds.has(KEPT) ? "Take the other class" : "Accept probable class";
  $("bulk-accept").disabled = !images.some((index) => data.proposed[index] !== UNKNOWN);
  for (const id of ["bulk-reject", "bulk-correct", "bulk-remove"]) $(id).disabled = images.length === 0;
}

function bulk(action) {
  if (act(target(), action)) unpick();
}

// ---- a rubber band, by mouse ----

let band = null; // {x, y, box, before}

function startBand(event) {
  if (event.button !== 0 || event.pointerType !== "mouse" || event.shiftKey || event.target.closest("button, input, label, .name")) return;
  band = { x: event.pageX, y: event.pageY, box: null, before: event.ctrlKey || event.metaKey ? [...picked] : [] };
}

function moveBand(event) {
  if (!band) return;
  const [left, top] = [Math.min(band.x, event.pageX), Math.min(band.y, event.pageY)];
  const [width, height] = [Math.abs(event.pageX - band.x), Math.abs(event.pageY - band.y)];
  if (!band.box) {
    if (width + height < 12) return;
    band.box = make("div", { class: "band" });
    document.body.append(band.box);
    document.body.classList.add("banding");
    getSelection().removeAllRanges();
  }
  Object.assign(band.box.style, { left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px` });
  picked.clear();
  for (const index of band.before) picked.add(index);
  for (const element of $("gallery").children) {
    const at = element.getBoundingClientRect();
    const [x, y] = [at.left + scrollX, at.top + scrollY];
    if (x < left + width && x + at.width > left && y < top + height && y + at.height > top) picked.add(Number(element.dataset.index));
  }
  refresh();
}

// Whether there was a band; the click that follows it is no click then.
function endBand() {
  const drawn = Boolean(band?.box);
  band?.box?.remove();
  document.body.classList.remove("banding");
  band = null;
  return drawn;
}
