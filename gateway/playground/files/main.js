// Connects the parts of the page.

import * as chat from "/playground/chat.js";
import { byId, make } from "/playground/dom.js";
import * as examples from "/playground/examples.js";
import * as pictures from "/playground/pictures.js";
import * as pools from "/playground/pools.js";
import { key, models } from "/playground/server.js";
import * as settings from "/playground/settings.js";

const MODEL = "opticnerve-model";
const narrow = matchMedia("(max-width: 900px)");
let isReached = false; // Whether the server answered when it was asked last.

// ---- the model

function showModels(names, otherwise) {
  const select = byId("model");
  select.disabled = names.length === 0;
  const shown = names.length ? names.map((name) => [name, name]) : [["", otherwise]];
  select.replaceChildren(...shown.map(([value, text]) => make("option", { value }, text)));
  const kept = sessionStorage.getItem(MODEL);
  if (names.includes(kept)) select.value = kept;
}

/** `open`: whether the server told all that it tells to holders of a key. */
async function readModels(open) {
  try {
    showModels(open || key.get() ? await models() : [], "needs an API key");
  } catch (failure) {
    showModels([], failure.status === 401 ? "needs an API key" : "no connection");
  }
  if (byId("model").disabled && !open) byId("key-section").open = true;
}

byId("model").onchange = () => sessionStorage.setItem(MODEL, byId("model").value);

// ---- the panel, which on narrow screens covers the page

function setPanel(open) {
  document.body.classList.toggle("panel-open", open);
  byId("panel-switch").setAttribute("aria-expanded", open);
  byId("panel").inert = !open;
}

byId("panel-switch").onclick = () => {
  const open = !document.body.classList.contains("panel-open");
  setPanel(open);
  if (open && narrow.matches) byId("panel-close").focus();
};
byId("panel-close").onclick = () => {
  setPanel(false);
  byId("panel-switch").focus();
};
byId("status").onclick = () => {
  setPanel(true);
  byId("pools-section").open = true;
  byId("pools-section").scrollIntoView({ block: "nearest" });
};
narrow.addEventListener("change", () => setPanel(!narrow.matches));
setPanel(!narrow.matches);

function askForKey() {
  setPanel(true);
  byId("key-section").open = true;
  byId("key").focus();
}

// ---- the message

const note = (text) => (byId("composer-note").textContent = text);
const question = byId("question");

function fit() {
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight, innerHeight / 3)}px`;
}

async function send() {
  const text = question.value.trim();
  if (chat.isRunning() || (!text && !pictures.count())) return;
  const wrong = settings.firstFault();
  const fault = wrong ? "A setting is wrong." : pictures.fault();
  note(fault);
  if (wrong) {
    setPanel(true);
    wrong.closest("details").open = true;
    wrong.reportValidity();
    wrong.focus();
  }
  if (fault) return;
  question.value = "";
  fit();
  await chat.ask(text, pictures.take());
}

byId("composer").onsubmit = (event) => {
  event.preventDefault();
  send();
};
question.addEventListener("input", fit);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || byId("camera-dialog").open) return;
  if (chat.isRunning()) chat.stop();
  else if (narrow.matches && document.body.classList.contains("panel-open")) byId("panel-close").click();
});
byId("stop").onclick = chat.stop;
byId("new-chat").onclick = () => {
  chat.clear();
  question.focus();
};

function showState() {
  const hadFocus = document.activeElement;
  byId("send").hidden = chat.isRunning();
  byId("stop").hidden = !chat.isRunning();
  if (hadFocus === byId("send") || hadFocus === byId("stop")) question.focus();
  byId("welcome").hidden = !chat.isEmpty();
  byId("new-chat").disabled = chat.isEmpty();
}

// ---- beginning

const readSettings = () => ({
  model: byId("model").value || "model",
  system: settings.systemPrompt(),
  fields: settings.fields(),
});

function writeAgain({ text, pictures: shown }) {
  question.value = text;
  pictures.restore(shown);
  fit();
  question.focus();
}

chat.begin(readSettings, showState, writeAgain, askForKey);
pictures.begin(note);
examples.begin(async (text, files) => {
  if (chat.isRunning()) return;
  await pictures.add(files);
  question.value = text;
  await send();
});
const pollNow = pools.begin((state) => {
  if (state?.config) pictures.setLimits(state.config);
  if (state && !isReached) readModels(Boolean(state.encoders));
  isReached = state !== null;
});
settings.begin(() => {
  isReached = false;
  pollNow();
});
showState();
if (!narrow.matches) question.focus();
