// The theme: that of the system until the button sets another, which this browser then remembers.
const name = "semsharekv-theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const button = element.querySelector("button");
const apply = () => {
  const set = localStorage.getItem(name);
  const dark = set ? set === "dark" : system.matches;
  document.body.classList.toggle("dark", dark);
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
  button.setAttribute("aria-pressed", String(dark));
};
button.addEventListener("click", () => {
  localStorage.setItem(name, document.body.classList.contains("dark") ? "light" : "dark");
  apply();
});
system.addEventListener("change", apply);
document.documentElement.lang = "en";
apply();
element.dataset.ready = "true"; // so that a visitor who is a program knows
