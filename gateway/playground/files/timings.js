// Where an answer's time went: its figures, its pictures, and its stages on one time axis.

import { make, milliseconds, plural } from "/playground/dom.js";

const CLOSED = "opticnerve-timings-closed"; // Set while the visitor wants them closed.
const SHORTEST_MS = 0.05;
const POOLS = {
  gateway: ["fetch", "plan", "name", "render", "pair"],
  encoder: ["encoder_queue", "preprocess", "encode", "put"],
  llm: ["queue", "get", "prefill", "decode"],
};
const LABELS = { encoder_queue: "queue, encoder", queue: "queue, LLM" };
const OUTCOMES = {
  ref: ["hit", "cache hit", "The gateway knew where its embedding is: nothing was sent."],
  store: ["hit", "store hit", "The encoder found its embedding in the store."],
  no: ["miss", "encoded", "Not cached: its pixels were encoded for this answer."],
};

/** What the server told at an answer's end; those of earlier answers are closed. `pictures`: those of the whole request, in order. */
export function show(timings, usage, pictures) {
  for (const earlier of document.querySelectorAll(".timings")) earlier.open = false;
  const summary = make("summary", {}, figures(timings, usage));
  const details = make(
    "details",
    { class: "timings", open: !sessionStorage.getItem(CLOSED) },
    summary,
    timings.items?.length ? items(timings.items, pictures) : null,
    timings.stages?.length ? waterfall(timings) : null,
  );
  summary.onclick = () => {
    if (details.open) sessionStorage.setItem(CLOSED, "1");
    else sessionStorage.removeItem(CLOSED);
  };
  return details;
}

function figures(timings, usage) {
  const cached = usage.prompt_tokens_details?.cached_tokens || 0;
  const decode = timings.decode_ms / 1000;
  const rate = decode > 0 ? (usage.completion_tokens - 1) / decode : 0;
  const shown = [
    ["first token", milliseconds(timings.ttft_ms ?? timings.total_ms)],
    ["total", milliseconds(timings.total_ms)],
    rate > 0 ? ["speed", `${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`] : null,
    ["prompt", plural(usage.prompt_tokens, "token") + (cached ? `, ${cached} cached` : "")],
    ["answer", plural(usage.completion_tokens, "token")],
  ].filter(Boolean);
  return make(
    "span",
    { class: "figures" },
    ...shown.map(([name, value]) =>
      make("span", {}, make("span", { class: "name" }, `${name} `), value),
    ),
  );
}

function items(told, pictures) {
  return make(
    "ul",
    { class: "items" },
    ...told.map((item, index) => {
      const [kind, text, why] = OUTCOMES[item.cached] || OUTCOMES.no;
      const picture = pictures[index];
      return make(
        "li",
        { title: why },
        picture ? make("img", { src: picture.preview, alt: "" }) : null,
        make("span", {}, `Picture ${index + 1}`),
        item.tokens ? make("span", { class: "name" }, plural(item.tokens, "token")) : null,
        make("span", { class: `badge ${kind}` }, text),
      );
    }),
  );
}

function waterfall(timings) {
  const stages = timings.stages.filter(({ ms }) => ms >= SHORTEST_MS);
  const ends = stages.map(({ begin_ms, ms }) => begin_ms + ms);
  const end = Math.max(timings.total_ms, ...ends);
  const step = tickStep(end);
  const names = [...new Set(stages.map(({ stage }) => stage))];
  return make(
    "div",
    { class: "waterfall" },
    axis(end, step),
    make("ol", {}, ...names.map((name) => row(name, stages, end, step, timings.ttft_ms))),
    make(
      "p",
      { class: "legend" },
      ...Object.keys(POOLS).map((pool) =>
        make("span", { class: `key ${pool}` }, pool === "llm" ? "LLM" : pool),
      ),
      timings.ttft_ms ? make("span", { class: "key first" }, "first token") : null,
    ),
  );
}

/** A round step, in milliseconds, of which two to five fit on the axis. */
function tickStep(end) {
  const most = matchMedia("(max-width: 640px)").matches ? 2.5 : 5;
  const power = 10 ** Math.floor(Math.log10(end / most));
  return [1, 2, 5, 10].map((digit) => digit * power).find((step) => end / step <= most);
}

const percent = (part, whole) => `${((100 * part) / whole).toFixed(3)}%`;

function axis(end, step) {
  const labels = [];
  for (let at = 0; at <= end * 0.97; at += step) {
    const label = make("span", {}, at >= 1000 ? `${+(at / 1000).toFixed(2)} s` : `${+at.toFixed(2)}`);
    label.style.left = percent(at, end);
    labels.push(label);
  }
  return make("div", { class: "axis", "aria-hidden": "true" }, make("span", { class: "unit" }, "ms"), make("div", {}, ...labels));
}

function row(name, stages, end, step, ttft) {
  const mine = stages.filter(({ stage }) => stage === name);
  const pool = Object.keys(POOLS).find((each) => POOLS[each].includes(name)) || "gateway";
  const longest = Math.max(...mine.map(({ ms }) => ms));
  const track = make("span", { class: "track" }, ...mine.map((stage) => bar(stage, pool, end)));
  track.style.backgroundSize = percent(step, end) + " 100%";
  if (ttft) {
    const mark = make("span", { class: "first" });
    mark.style.left = percent(ttft, end);
    track.append(mark);
  }
  const from = milliseconds(Math.max(0, Math.min(...mine.map(({ begin_ms }) => begin_ms))));
  return make(
    "li",
    {},
    make("span", { class: "stage" }, LABELS[name] || name),
    track,
    make("span", { class: "ms" }, milliseconds(longest)),
    make("span", { class: "hidden" }, `, from ${from} on`),
  );
}

function bar({ begin_ms, ms, item }, pool, end) {
  const begin = Math.max(0, begin_ms);
  const made = make("span", { class: `bar ${pool}` });
  const of = item === undefined ? "" : `picture ${item + 1}: `;
  made.title = `${of}${milliseconds(ms)}, from ${milliseconds(begin)} on`;
  made.style.left = percent(begin, end);
  made.style.width = percent(Math.max(0, begin_ms + ms - begin), end);
  return made;
}
