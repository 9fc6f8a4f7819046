// The conversations: each click names the one to show, or asks for a new one.
let key = null;
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-key]");
  if (!button) return;
  key = button.dataset.key;
  trigger("show_conversation", { key });
});
watch("value", () => {
  const shown = key !== null && element.querySelector("[aria-current=true]");
  key = null;
  if (shown) shown.focus();
});
element.dataset.ready = "true"; // so that a visitor who is a program knows
