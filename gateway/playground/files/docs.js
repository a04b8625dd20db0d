// The OpenAPI document as a page: each route, its fields and answers, and a form to try it.

import { button, byId, make } from "/playground/dom.js";
import { key, send } from "/playground/server.js";

const HELLO = [{ role: "user", content: "Hello" }];
const BODIES = {
  "/v1/chat/completions": { model: "model", messages: HELLO },
  "/v1/completions": { model: "model", prompt: "Once" },
  "/v1/messages": { model: "model", max_tokens: 100, messages: HELLO },
  "/v1/messages/count_tokens": { model: "model", messages: HELLO },
  "/v1/responses": { model: "model", input: "Hello" },
  "/v1/apply_template": { messages: HELLO },
  "/tokenize": { prompt: "Hello" },
  "/v1/tokenize": { prompt: "Hello" },
  "/detokenize": { tokens: [1, 2, 3] },
  "/v1/detokenize": { tokens: [1, 2, 3] },
};
let schemas = {};

// ---- schemas

const nameOf = (schema) => schema.$ref?.split("/").pop();
const isNull = (schema) => schema.type === "null";
const options = (schema) => (schema.anyOf || schema.oneOf || [schema]).filter((each) => !isNull(each));

/** The schemas with fields of their own that a schema speaks of, by name. */
function named(schema) {
  if (nameOf(schema)) return [nameOf(schema)];
  if (schema.anyOf || schema.oneOf) return options(schema).flatMap(named);
  if (schema.items) return named(schema.items);
  return typeof schema.additionalProperties === "object" ? named(schema.additionalProperties) : [];
}

function typeOf(schema) {
  if (nameOf(schema)) return nameOf(schema);
  if (schema.anyOf || schema.oneOf) return [...new Set(options(schema).map(typeOf))].join(" or ");
  if (schema.enum || "const" in schema) {
    return (schema.enum || [schema.const]).map((value) => JSON.stringify(value)).join(" or ");
  }
  if (schema.type === "array") return `list of ${typeOf(schema.items || {})}${bounds(schema)}`;
  return (schema.type || "any") + bounds(schema);
}

function bounds(schema) {
  const [low, high, unit] = [
    [schema.minimum ?? schema.exclusiveMinimum, schema.maximum ?? schema.exclusiveMaximum, ""],
    [schema.minLength, schema.maxLength, " characters"],
    [schema.minItems, schema.maxItems, " entries"],
  ].find(([least, most]) => least !== undefined || most !== undefined) || [];
  if (high !== undefined) return ` (${low ?? 0} to ${high}${unit})`;
  return low === undefined ? "" : ` (from ${low}${unit})`;
}

/** The fields of an object, a row each; objects in them open on demand. */
function fieldTable(schema) {
  const required = new Set(schema.required || []);
  const rows = Object.entries(schema.properties || {}).map(([name, field]) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, make("code", {}, name)),
      make("td", {}, typeOf(field), ...named(field).map(objectOf)),
      make(
        "td",
        {},
        required.has(name) ? make("strong", {}, "required. ") : null,
        field.default === undefined || field.default === null ? "" : `Default: ${JSON.stringify(field.default)}. `,
        text(field.description || options(field)[0]?.description),
      ),
    ),
  );
  return rows.length
    ? make("div", { class: "table" }, make("table", {}, make("tbody", {}, ...rows)))
    : make("p", { class: "note" }, text(schema.description) || typeOf(schema));
}

function objectOf(name) {
  return lazy(name, () => [fieldTable(schemas[name])], "object");
}

/** A part that is made when it is opened first. */
function lazy(title, fill, kind) {
  const part = make("details", { class: kind }, make("summary", {}, title));
  part.addEventListener("toggle", () => part.append(...fill()), { once: true });
  return part;
}

const text = (description) => (description || "").replaceAll("`", "");

// ---- routes

function route(path, method, operation) {
  const title = make(
    "span",
    { class: "route" },
    make("span", { class: "method" }, method.toUpperCase()),
    make("code", {}, path),
    make("span", { class: "name" }, operation.summary),
  );
  const part = lazy(title, () => contents(path, method, operation), "operation");
  part.dataset.words = `${path} ${operation.summary}`.toLowerCase();
  return part;
}

function contents(path, method, operation) {
  const body = operation.requestBody?.content["application/json"].schema;
  const parameters = operation.parameters || [];
  const listed = Object.fromEntries(
    parameters.map((each) => [each.name, { ...each.schema, description: each.description }]),
  );
  const required = parameters.filter((each) => each.required).map((each) => each.name);
  return [
    make("p", {}, text(operation.description)),
    operation.security ? make("p", { class: "note" }, "Needs an API key.") : null,
    parameters.length ? make("h4", {}, "Parameters") : null,
    parameters.length ? fieldTable({ properties: listed, required }) : null,
    body ? make("h4", {}, "Body") : null,
    body ? fieldTable(schemas[nameOf(body)] || body) : null,
    make("h4", {}, "Answers"),
    ...Object.entries(operation.responses).map(([status, answer]) => answerOf(status, answer)),
    make("h4", {}, "Try it"),
    trial(path, method, parameters, body),
  ].filter(Boolean);
}

function answerOf(status, { description, content = {} }) {
  const shapes = Object.entries(content).map(([type, { schema = {} }]) =>
    make("div", {}, make("span", { class: "note" }, type), ...named(schema).map(objectOf)),
  );
  return make("div", { class: "response" }, make("strong", {}, status), ` ${text(description)}`, ...shapes);
}

function trial(path, method, parameters, body) {
  const fields = parameters
    .filter((each) => each.in !== "header")
    .map((each) => make("input", { name: each.name, placeholder: each.name, "aria-label": each.name }));
  const written = make("textarea", {
    rows: 8,
    class: "code",
    spellcheck: false,
    "aria-label": "Body",
    value: JSON.stringify(BODIES[path] || {}, null, 2),
  });
  const shown = make("pre", { hidden: true, tabIndex: 0, "aria-live": "polite" });
  const run = async () => {
    shown.hidden = false;
    shown.textContent = "…";
    try {
      await show(await send(filled(path, parameters, fields), optionsOf(method, body && written.value)), shown);
    } catch (failure) {
      shown.textContent = failure.message;
    }
  };
  return make(
    "div",
    { class: "trial" },
    ...fields,
    body ? written : null,
    button("Send", run, { class: "primary" }),
    shown,
  );
}

function filled(path, parameters, fields) {
  const query = new URLSearchParams();
  for (const field of fields.filter((each) => each.value)) {
    const { in: place } = parameters.find((each) => each.name === field.name);
    if (place === "path") path = path.replace(`{${field.name}}`, encodeURIComponent(field.value));
    else query.set(field.name, field.value);
  }
  return query.size ? `${path}?${query}` : path;
}

function optionsOf(method, body) {
  if (!body) return { method };
  return { method, body, headers: { "content-type": "application/json" } };
}

/** An answer as it comes; JSON that came whole is indented. */
async function show(answer, element) {
  const status = `${answer.status} ${answer.statusText}\n\n`;
  let body = "";
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let { value, done } = await reader.read(); !done; { value, done } = await reader.read()) {
    body += value;
    element.textContent = status + body;
  }
  try {
    element.textContent = status + JSON.stringify(JSON.parse(body), null, 2);
  } catch {
    element.textContent = status + body;
  }
}

// ---- the page

function showAll(described) {
  schemas = described.components.schemas;
  byId("description").textContent = text(described.info.description);
  const operations = Object.entries(described.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => [path, method, operation]),
  );
  const groups = described.tags.map(({ name, description }) => {
    const mine = operations.filter(([, , { tags }]) => tags.includes(name));
    const head = [make("h2", {}, name), make("p", { class: "note" }, text(description))];
    return make("section", {}, ...head, ...mine.map((each) => route(...each)));
  });
  byId("routes").replaceChildren(...groups);
}

byId("key").value = key.get();
byId("key").onchange = () => key.set(byId("key").value.trim());
byId("filter").oninput = () => {
  const wanted = byId("filter").value.trim().toLowerCase();
  for (const part of document.querySelectorAll(".operation")) {
    part.hidden = !part.dataset.words.includes(wanted);
  }
  for (const group of document.querySelectorAll("#routes section")) {
    group.hidden = !group.querySelector(".operation:not([hidden])");
  }
};
try {
  showAll(await (await send("/openapi.json")).json());
} catch (failure) {
  byId("routes").replaceChildren(make("p", { class: "error-text" }, failure.message));
}
