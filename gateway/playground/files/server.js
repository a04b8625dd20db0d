// The gateway's API, as this page uses it. Every failure is a Failure, which says what to do.

const KEY = "opticnerve-key";
const HEALTH_MS = 5000; // Until a gateway that does not say how it is counts as lost.

export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** Why there is no answer, or no whole one. */
export class Failure extends Error {
  /** `status`: HTTP's, or 0 without one. `retryAfter`: seconds, or 0. */
  constructor(message, { status = 0, code = "", requestId = "", retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { status, code, requestId, retryAfter });
  }

  get title() {
    const titles = {
      0: "No connection",
      200: "The answer broke off",
      401: "This server needs an API key",
      403: "Not allowed",
      404: "Not found",
      413: "Too large",
      429: "The server is busy",
      503: "Nothing can answer now",
      504: "It took too long",
    };
    return titles[this.status] || (this.status >= 500 ? "The server failed" : "Not accepted");
  }

  /** What to do, where the server's own message does not say it. */
  get advice() {
    if (this.status === 0) return "Check that the server runs and that this device reaches it.";
    if (this.status === 401 && key.get()) return "It does not know the key under Settings, API key.";
    if (this.status === 401) return "Enter one under Settings, API key, and try again.";
    if (this.status === 413) return "Shrink or remove pictures, or begin a new chat.";
    if (this.retryAfter) return `It asks to be tried again in ${this.retryAfter} s.`;
    if (this.status === 429 || this.status === 503) return "Try again in a moment.";
    return "";
  }
}

/** A request with the visitor's key. Raises Failure if nothing answers. */
export async function send(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  try {
    return await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not answer.");
  }
}

async function failureOf(answer) {
  const told = {
    status: answer.status,
    requestId: answer.headers.get("x-request-id") || "",
    retryAfter: Number(answer.headers.get("retry-after")) || 0,
  };
  try {
    const { error } = await answer.json();
    return new Failure(error.message, { ...told, code: error.code || error.type || "" });
  } catch {
    return new Failure(`The server answered with status ${answer.status}.`, told);
  }
}

/** The names of the model. Raises Failure. */
export async function models() {
  const answer = await send("/v1/models");
  if (!answer.ok) throw await failureOf(answer);
  return (await answer.json()).data.map((card) => card.id);
}

/** What /health says; without a key of a server that asks for one, its status alone. */
export async function health() {
  const answer = await send("/health", { signal: AbortSignal.timeout(HEALTH_MS) });
  const state = await answer.json().catch(() => null);
  if (typeof state?.status === "string") return state;
  throw new Failure("What answers /health is no gateway.", { status: answer.status });
}

/** The chunks of a streamed chat completion. Raises Failure, and AbortError once `signal` fires. */
export async function* streamChat(body, signal) {
  const answer = await send("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!answer.ok) throw await failureOf(answer);
  const requestId = answer.headers.get("x-request-id") || "";
  for await (const data of events(answer.body, requestId)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) {
      const { message, code, type } = chunk.error;
      throw new Failure(message, { status: 200, code: code || type || "", requestId });
    }
    yield chunk;
  }
  throw new Failure("The connection was lost before the answer's end.", { status: 200, requestId });
}

/** The data of server-sent events. */
async function* events(stream, requestId) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (waiting + value).split("\n\n");
      waiting = blocks.pop();
      for (const block of blocks) {
        if (block.startsWith("data: ")) yield block.slice("data: ".length);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const message = "The connection was lost before the answer's end.";
    throw new Failure(message, { status: 200, requestId });
  } finally {
    reader.cancel().catch(() => {});
  }
}
