// The conversation: what was asked, what was answered, and the requests that it becomes.

import { announce, button, byId, make, plural } from "/playground/dom.js";
import { dataUrl, release } from "/playground/pictures.js";
import { Failure, streamChat } from "/playground/server.js";
import { render } from "/playground/text.js";
import * as timings from "/playground/timings.js";

const NEAR_END = 80; // Pixels from the end within which the view follows an answer.

let exchanges = []; // Each with a question {text, pictures}, and an answer.
let running = null; // The AbortController of the answer that is being written.
let settings; // () => {model, system, fields}
let changed = () => {};
let edit = () => {};
let askForKey = () => {};

/** `readSettings`: those of the next request. `onChange`: called when an answer begins or ends.
    `onEdit`: called with a question that is to be written anew. `onKey`: called when a key is to
    be entered. */
export function begin(readSettings, onChange, onEdit, onKey) {
  settings = readSettings;
  changed = onChange;
  edit = onEdit;
  askForKey = onKey;
  byId("to-end").onclick = toEnd;
  byId("scroll").addEventListener("scroll", showWay, { passive: true });
}

export const isEmpty = () => exchanges.length === 0;
export const isRunning = () => running !== null;
export const stop = () => running?.abort();

/** Forgets everything. */
export function clear() {
  stop();
  cut(0);
  announce("A new chat");
}

/** Asks a question; returns when its answer has ended. */
export async function ask(text, pictures) {
  const exchange = { question: { text, pictures } };
  exchanges.push(exchange);
  exchange.element = make("li", { class: "exchange" }, showQuestion(exchange));
  byId("turns").append(exchange.element);
  await answer(exchange);
}

async function retry(exchange) {
  stop();
  cut(exchanges.indexOf(exchange) + 1);
  exchange.answer.element.remove();
  await answer(exchange);
}

/** Forgets the exchanges from an index on, but for the pictures of a question that is `kept`. */
function cut(from, kept = null) {
  for (const { element, question } of exchanges.splice(from)) {
    element.remove();
    if (question !== kept) release(question.pictures);
  }
  changed();
}

// ---- one answer

async function answer(exchange) {
  const own = new AbortController();
  running = own;
  const view = new Answer(exchange);
  exchange.answer = view;
  exchange.element.append(view.element);
  changed();
  toEnd();
  announce("Answering");
  try {
    for await (const chunk of streamChat(await request(exchange), own.signal)) view.take(chunk);
    view.end();
  } catch (error) {
    if (error.name === "AbortError") view.end("Stopped");
    else view.fail(error instanceof Failure ? error : new Failure(String(error), { status: 500 }));
  } finally {
    if (running === own) running = null;
    changed();
  }
}

/** The body of a request: the conversation up to an exchange. Questions without an answer, other
    than the last, are left out. */
async function request(exchange) {
  const { model, system, fields } = settings();
  const messages = system ? [{ role: "system", content: system }] : [];
  const before = exchanges.slice(0, exchanges.indexOf(exchange));
  for (const { question, answer } of before.filter((each) => each.answer.text)) {
    messages.push(await userMessage(question), { role: "assistant", content: answer.text });
  }
  messages.push(await userMessage(exchange.question));
  const stream_options = { include_usage: true };
  return { model, messages, ...fields, stream: true, stream_options, timings: true };
}

async function userMessage({ text, pictures }) {
  const urls = await Promise.all(pictures.map(dataUrl));
  const parts = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  if (text) parts.push({ type: "text", text });
  return { role: "user", content: parts };
}

/** The pictures of a request, in its order. */
function picturesUpTo(exchange) {
  const asked = exchanges.slice(0, exchanges.indexOf(exchange)).filter((each) => each.answer.text);
  return [...asked, exchange].flatMap(({ question }) => question.pictures);
}

/** An answer as it is written. */
class Answer {
  constructor(exchange) {
    this.exchange = exchange;
    this.text = "";
    this.reasoning = "";
    this.last = {}; // The chunk with usage and timings.
    this.finish = "";
    this.pictures = picturesUpTo(exchange);
    this.body = make("div", { class: "text" }, make("p", { class: "waiting" }, waitingDots()));
    this.thoughts = make("div", { class: "text" });
    this.thinking = make(
      "details",
      { class: "thoughts", hidden: true },
      make("summary", {}, "Reasoning"),
      this.thoughts,
    );
    this.foot = make("div", { class: "foot" });
    const parts = [this.thinking, this.body, this.foot];
    this.element = make("article", { class: "answer", "aria-label": "Answer", "aria-busy": "true" }, ...parts);
  }

  take(chunk) {
    if (chunk.usage) this.last = chunk;
    for (const { delta, finish_reason } of chunk.choices) {
      this.text += delta.content || "";
      this.reasoning += delta.reasoning_content || "";
      this.finish = finish_reason || this.finish;
    }
    this.frame ??= requestAnimationFrame(() => this.show());
  }

  show() {
    this.frame = null;
    if (!this.text && !this.reasoning) return;
    const follows = isNearEnd();
    this.thinking.hidden = !this.reasoning;
    this.thoughts.replaceChildren(...render(this.reasoning));
    this.body.replaceChildren(...render(this.text));
    if (follows) toEnd();
    showWay();
  }

  end(note = "") {
    this.close(this.text || note || "The answer is empty");
    const cut = this.finish === "length" ? "Ended at the most tokens" : "";
    const said = note || cut || (this.text || this.reasoning ? "" : "The answer is empty");
    if (said) this.body.append(make("p", { class: "note" }, said));
    if (this.last.timings) {
      this.foot.append(timings.show(this.last.timings, this.last.usage, this.pictures));
    }
    this.foot.append(this.actions());
    if (this.follows) toEnd();
  }

  fail(failure) {
    this.close(`${failure.title}. ${failure.message}`);
    this.foot.append(showFailure(failure), this.actions());
    if (this.follows) toEnd();
  }

  /** Shows what has come; `told` is said to screen readers. */
  close(told) {
    cancelAnimationFrame(this.frame);
    this.follows = isNearEnd();
    this.body.replaceChildren();
    this.show();
    this.element.setAttribute("aria-busy", "false");
    announce(told);
  }

  actions() {
    return make(
      "div",
      { class: "actions" },
      this.text ? copyButton(() => this.text) : null,
      button("Try again", () => retry(this.exchange)),
    );
  }
}

function waitingDots() {
  return make("span", { class: "dots", "aria-label": "Waiting for the answer", role: "img" }, "");
}

function showFailure(failure) {
  const code = [failure.status > 200 ? failure.status : "", failure.code].filter(Boolean).join(" ");
  return make(
    "div",
    { class: "failure", role: "alert" },
    make("strong", {}, failure.title),
    failure.status === 401 ? null : make("p", {}, failure.message),
    failure.advice ? make("p", {}, failure.advice) : null,
    failure.status === 401 ? button("Enter a key", askForKey, { class: "small primary" }) : null,
    code || failure.requestId
      ? make("p", { class: "note" }, [code, failure.requestId].filter(Boolean).join(" · "))
      : null,
  );
}

// ---- one question

function showQuestion(exchange) {
  const { text, pictures } = exchange.question;
  const images = pictures.map((picture) => make("img", { src: picture.preview, alt: picture.name }));
  return make(
    "article",
    { class: "question", "aria-label": "Your message" },
    pictures.length ? make("div", { class: "shown", title: plural(pictures.length, "picture") }, ...images) : null,
    text ? make("p", {}, text) : null,
    make(
      "div",
      { class: "actions" },
      text ? copyButton(() => text) : null,
      button("Edit", () => {
        stop();
        cut(exchanges.indexOf(exchange), exchange.question);
        edit(exchange.question);
      }),
    ),
  );
}

function copyButton(read) {
  const made = button("Copy", async () => {
    await copy(read());
    made.textContent = "Copied";
    setTimeout(() => (made.textContent = "Copy"), 1500);
  });
  return made;
}

/** Copies a text, also on a page without HTTPS, where there is no clipboard API. */
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = make("textarea", { class: "hidden", value: text });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

// ---- the view

function isNearEnd() {
  const view = byId("scroll");
  return view.scrollHeight - view.scrollTop - view.clientHeight < NEAR_END;
}

function toEnd() {
  const view = byId("scroll");
  view.scrollTop = view.scrollHeight;
}

function showWay() {
  byId("to-end").hidden = isNearEnd() || isEmpty();
}
