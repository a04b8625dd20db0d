// Light or dark: as the system's until the visitor chooses; the choice is kept.

import { byId } from "/playground/dom.js";

const NAME = "opticnerve-theme";
const ORDER = ["system", "light", "dark"];
const LABELS = { system: "as the system's", light: "light", dark: "dark" };

function show(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const label = `Colours: ${LABELS[theme]}`;
  byId("theme").setAttribute("aria-label", label);
  byId("theme").title = label;
}

let theme = localStorage.getItem(NAME);
if (!ORDER.includes(theme)) theme = "system";
show(theme);
byId("theme").onclick = () => {
  theme = ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length];
  localStorage.setItem(NAME, theme);
  show(theme);
};
