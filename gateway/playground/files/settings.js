// The settings beside the chat, and the fields of a request that they make. Kept for this tab.

import { byId } from "/playground/dom.js";
import { key } from "/playground/server.js";

const NAME = "opticnerve-settings";
const EXAMPLE = {
  type: "object",
  properties: { shape: { type: "string" }, color: { type: "string" } },
  required: ["shape", "color"],
  additionalProperties: false,
};

const ASCII = /^[\x21-\x7e]*$/;

const sampling = () => [...byId("sampling").querySelectorAll("input, textarea")];

/** Restores what was set; `changed` is called when the key is. */
export function begin(changed) {
  const kept = JSON.parse(sessionStorage.getItem(NAME) || "{}");
  for (const field of keptFields()) field.value = kept[field.name || field.id] ?? field.value;
  if (!byId("schema").value) byId("schema").value = JSON.stringify(EXAMPLE, null, 2);
  byId("key").value = key.get();
  for (const field of sampling()) if (field.type === "number") field.placeholder = "default";
  showSchema();
  byId("panel").addEventListener("input", () => {
    keep();
    showSchema();
  });
  byId("key").addEventListener("change", () => {
    const written = byId("key").value.trim();
    byId("key").setCustomValidity(ASCII.test(written) ? "" : "A key is of ASCII characters.");
    if (!byId("key").reportValidity()) return;
    key.set(written);
    changed();
  });
  byId("reset").onclick = () => {
    for (const field of sampling()) field.value = "";
    keep();
  };
}

function keptFields() {
  return [...sampling(), byId("system"), byId("format"), byId("schema")];
}

function keep() {
  const entries = keptFields().map((field) => [field.name || field.id, field.value]);
  sessionStorage.setItem(NAME, JSON.stringify(Object.fromEntries(entries)));
}

function showSchema() {
  byId("schema-box").hidden = byId("format").value !== "json_schema";
  byId("schema-error").textContent = "";
}

/** The field that is wrong, shown to the visitor; null if all are right. */
export function firstFault() {
  const wrong = sampling().find((field) => !field.checkValidity());
  if (wrong) return wrong;
  if (byId("format").value !== "json_schema") return null;
  try {
    JSON.parse(byId("schema").value);
    return null;
  } catch (error) {
    byId("schema-error").textContent = `This is no JSON: ${error.message}`;
    return byId("schema");
  }
}

/** The fields of a request, without messages. */
export function fields() {
  const asked = {};
  for (const field of sampling()) {
    if (field.value.trim() === "") continue;
    if (field.name === "stop") asked.stop = field.value.split("\n").filter((line) => line);
    else asked[field.name] = Number(field.value);
  }
  const format = byId("format").value;
  if (format === "json_object") asked.response_format = { type: format };
  if (format === "json_schema") {
    const schema = JSON.parse(byId("schema").value);
    asked.response_format = { type: format, json_schema: { name: "answer", schema } };
  }
  return asked;
}

export const systemPrompt = () => byId("system").value.trim();
