// The list of documents: switches, buttons and dragging by the grip, for a mouse, a finger and the keyboard; uploads.
// The server redraws the list after each event; focus goes to the same document's button, where that now stands.
const most = 1048576;
let wanted = null, dragged = null;
const items = () => [...element.querySelectorAll(".skv-doc")];
const tell = (what, item, more = {}) => {
  wanted = [item.dataset.key, what];
  trigger("change_document", { what, key: item.dataset.key, ...more });
};
watch("value", () => {
  if (!wanted) return;
  const [key, what] = wanted;
  wanted = null;
  const item = items().find((each) => each.dataset.key === key);
  const target = item ? item.querySelector(`[data-do="${what}"]`) : element.querySelector("input[type=file]");
  if (target && what !== "place") target.focus();
});
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-do]");
  if (button && button.getAttribute("aria-disabled") !== "true") tell(button.dataset.do, button.closest(".skv-doc"));
});

// Dragging: the place among the others that the pointer is over, counted without the dragged document.
const findPlace = (y) => {
  const others = items().filter((each) => each !== dragged);
  const before = others.findIndex((each) => {
    const box = each.getBoundingClientRect();
    return y < box.top + box.height / 2;
  });
  return [others, before < 0 ? others.length : before];
};
const clear = () => items().forEach((each) => each.classList.remove("skv-above", "skv-below", "skv-dragged"));
const move = (event) => {
  if (!dragged) return;
  const [others, place] = findPlace(event.clientY);
  const list = dragged.parentElement;
  const { top, bottom } = list.getBoundingClientRect();
  list.scrollTop += event.clientY < top + 24 ? -14 : event.clientY > bottom - 24 ? 14 : 0;
  clear();
  dragged.classList.add("skv-dragged");
  if (others.length) {
    if (place < others.length) others[place].classList.add("skv-above");
    else others[others.length - 1].classList.add("skv-below");
  }
};
const end = (event) => {
  const item = dragged;
  if (!item) return;
  const [, place] = findPlace(event.clientY);
  clear();
  dragged = null;
  if (event.type === "pointerup" && place !== items().indexOf(item)) tell("place", item, { place });
};
element.addEventListener("pointerdown", (event) => {
  const grip = event.target.closest(".skv-grip");
  if (!grip || event.button) return;
  event.preventDefault();
  dragged = grip.closest(".skv-doc");
  grip.setPointerCapture(event.pointerId);
});
element.addEventListener("pointermove", move);
element.addEventListener("pointerup", end);
element.addEventListener("pointercancel", end);

// Uploads: read here and sent as they are, so that no file of a visitor lies on the server's disk.
const send = async (files) => {
  for (const file of files) {
    const bytes = file.size <= most ? new Uint8Array(await file.arrayBuffer()) : null;
    let text = "";
    for (let at = 0; bytes && at < bytes.length; at += 32768) text += String.fromCharCode(...bytes.subarray(at, at + 32768));
    trigger("upload_file", { name: file.name, size: file.size, content: bytes ? btoa(text) : null });
  }
};
element.addEventListener("change", (event) => {
  if (event.target.type !== "file") return;
  send([...event.target.files]);
  event.target.value = "";
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  element.addEventListener(kind, (event) => {
    event.preventDefault();
    element.classList.toggle("skv-over", kind === "dragover");
    if (kind === "drop") send([...event.dataTransfer.files]);
  });
}
element.dataset.ready = "true"; // so that a visitor who is a program knows
