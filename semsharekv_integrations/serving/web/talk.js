// The turns: a new one is brought into view, once. The box to ask in stays at the window's end.
let known = element.querySelectorAll(".skv-turn").length;
watch("value", () => {
  const turns = element.querySelectorAll(".skv-turn");
  if (turns.length > known) turns[turns.length - 1].scrollIntoView({ block: "start" });
  known = turns.length;
});
element.dataset.ready = "true"; // so that a visitor who is a program knows
