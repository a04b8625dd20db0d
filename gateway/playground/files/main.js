// Connects the parts of the page.

import * as chat from "/playground/chat.js";
import { byId, make } from "/playground/dom.js";
import * as examples from "/playground/examples.js";
import * as pictures from "/playground/pictures.js";
import * as pools from "/playground/pools.js";
import { models } from "/playground/server.js";
import * as settings from "/playground/settings.js";

const MODEL = "opticnerve-model";
const narrow = matchMedia("(max-width: 900px)");
let wasLost = false;

// ---- the model

async function readModels() {
  const select = byId("model");
  try {
    const names = await models();
    const kept = sessionStorage.getItem(MODEL);
    select.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
    if (names.includes(kept)) select.value = kept;
    select.disabled = false;
  } catch (failure) {
    const text = failure.status === 401 ? "needs an API key" : "no connection";
    select.replaceChildren(make("option", { value: "" }, text));
    select.disabled = true;
    if (failure.status === 401) showKey();
  }
}

byId("model").onchange = () => sessionStorage.setItem(MODEL, byId("model").value);

// ---- the panel, which on narrow screens covers the page

function setPanel(open) {
  document.body.classList.toggle("panel-open", open);
  byId("panel-switch").setAttribute("aria-expanded", open);
  byId("panel").inert = !open;
}

function showKey() {
  byId("key-section").open = true;
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
document.addEventListener("key-needed", () => {
  showKey();
  if (narrow.matches) return;
  byId("key").focus();
});

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

chat.begin(readSettings, showState, ({ text, pictures: shown }) => {
  question.value = text;
  pictures.restore(shown);
  fit();
  question.focus();
});
pictures.begin(note);
examples.begin(async (text, files) => {
  if (chat.isRunning()) return;
  await pictures.add(files);
  question.value = text;
  await send();
});
const pollNow = pools.begin((state) => {
  if (state?.config) pictures.setLimits(state.config);
  if (state && wasLost) readModels();
  wasLost = state === null;
});
settings.begin(() => {
  readModels();
  pollNow();
});
readModels();
showState();
if (!narrow.matches) question.focus();
