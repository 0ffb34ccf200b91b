// One image in full size, with the same keys and buttons.
let fullIndex = -1;

function openFull() {
  if (!found.length) return;
  fullIndex = -1;
  $("full").showModal();
  drawFull();
}

// A path with each part encoded; ids are paths below the folder of the images.
const address = (id) => data.folder + id.split("/").map(encodeURIComponent).join("/");
const SHOWN = /\.(jpe?g|png|webp|gif|bmp|avif)$/i; // what browsers decode

// Set an <img> to the image file where the page can reach it, to the thumbnail otherwise.
function large(image, id, thumb, note) {
  const small = (event) => {
    image.onerror = null;
    image.src = data.thumbs[thumb];
    note.textContent = event ? "The image file cannot be reached from here; this is its thumbnail." : "";
  };
  note.textContent = thumb < 0 ? "no picture" : "";
  image.hidden = thumb < 0;
  image.alt = `image ${id}`;
  if (thumb < 0) return;
  if (data.folder === null || !SHOWN.test(id)) {
    small();
    return;
  }
  image.onerror = small;
  image.src = address(id);
}

function drawFull() {
  const index = found[position];
  $("full-labels").replaceChildren(...labels(index), " ", make("span", { class: "verdict" }, ...verdict(index)));
  $("full").dataset.state = stateOf(index);
  for (const button of $("full-buttons").children) button.setAttribute("aria-pressed", String(button.dataset.action === stateOf(index)));
  if (fullIndex === index) return;
  fullIndex = index;
  large($("full-image"), data.id[index], data.thumb[index], $("full-note"));
  $("full-name").replaceChildren(make("bdi", {}, data.id[index]), ` (${number(position + 1)} of ${number(found.length)})`);
  const inside = $("full-buttons").contains(document.activeElement);
  $("full-buttons").replaceChildren(...choices(index));
  for (const button of $("full-buttons").children) {
    button.tabIndex = 0;
    button.setAttribute("aria-pressed", String(button.dataset.action === stateOf(index)));
  }
  if (inside) $("full-next").focus();
}

function closeFull() {
  $("full").close();
  focus(position);
}
