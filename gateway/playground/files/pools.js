// The state of the pools, asked for again and again while the page is seen.

import { byId, make, plural } from "/playground/dom.js";
import { health } from "/playground/server.js";

const EVERY_MS = 2000;
const STATES = {
  ok: "Serving",
  degraded: "Partly serving",
  unavailable: "Not serving",
  draining: "Stopping",
  lost: "No connection",
};

/** Polls /health; `told` gets each answer, and null when there is none. */
export function begin(told) {
  let timer = 0;
  const poll = async () => {
    clearTimeout(timer);
    if (document.hidden) return;
    try {
      const state = await health();
      show(state);
      told(state);
    } catch {
      showStatus("lost");
      told(null);
    }
    timer = setTimeout(poll, EVERY_MS);
  };
  document.addEventListener("visibilitychange", poll);
  poll();
  return poll;
}

function showStatus(status) {
  byId("status").dataset.state = status;
  byId("status-text").textContent = STATES[status] || status;
}

function show(state) {
  showStatus(state.status);
  const parts = state.encoders
    ? details(state)
    : [make("p", { class: "note" }, "The server shows its pools to holders of an API key.")];
  byId("pools").replaceChildren(...parts);
}

function details({ encoders, llms, store, gateway, missing }) {
  return [
    missing?.length ? make("p", { class: "note error-text" }, `Missing: ${missing.join("; ")}`) : null,
    pool("Encoders", encoders, "picture", encoderLoad),
    pool("LLM workers", llms, "request", llmLoad),
    make(
      "p",
      { class: "note" },
      `${plural(gateway?.requests_in_flight ?? 0, "request")} in flight. `,
      store?.kinds?.length ? `Store: ${store.kinds.join(", ")}. ` : "",
      store?.unreachable_from?.length
        ? `Not reached from ${store.unreachable_from.join(", ")}.`
        : "",
    ),
  ].filter(Boolean);
}

function encoderLoad({ pending }) {
  return pending ? `${plural(pending, "patch", "patches")} at work` : "idle";
}

function llmLoad({ load = {}, limits = {} }) {
  const { running = 0, waiting = 0, free_kv_blocks: free } = load;
  const used = limits.num_kv_blocks ? 1 - free / limits.num_kv_blocks : 0;
  const what = [
    running ? `${running} running` : "",
    waiting ? `${waiting} waiting` : "",
    used >= 0.01 ? `${Math.round(100 * used)}% of the KV cache` : "",
  ].filter(Boolean);
  return what.join(", ") || "idle";
}

/** `load` tells of one worker what it has to do. */
function pool(title, { workers = [], waiting = 0, sources = {} }, unit, load) {
  const troubles = Object.entries(sources).filter(([, trouble]) => trouble);
  return make(
    "section",
    { class: "pool" },
    make(
      "h3",
      {},
      title,
      make("span", { class: "name" }, waiting ? `${plural(waiting, unit)} waiting` : ""),
    ),
    workers.length
      ? make("ul", {}, ...workers.map((each) => worker(each, load(each))))
      : make("p", { class: "note" }, "none"),
    ...troubles.map(([name, trouble]) =>
      make("p", { class: "note error-text" }, `${name}: ${trouble}`),
    ),
  );
}

function worker({ address, state, fault, device, backend, attention, dtype }, load) {
  const what = [device, backend || attention, dtype].filter(Boolean).join(" · ");
  return make(
    "li",
    { "data-state": state },
    make("span", { class: "dot", "aria-hidden": "true" }),
    make("span", { class: "address" }, address),
    make("span", { class: "state" }, state === "serving" ? load : state),
    what ? make("span", { class: "what name" }, what) : null,
    fault ? make("span", { class: "what error-text" }, fault) : null,
  );
}
