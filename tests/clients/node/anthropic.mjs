import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { chat, colors, fails, key, model, run, see, seen, spell, spelt, star, url } from "./cases.mjs";

const client = new Anthropic({ baseURL: url, apiKey: key, maxRetries: 0 });
const body = (messages, more = {}) => ({ model, max_tokens: 64, temperature: 0, messages, ...more });
const ask = (messages, more) => client.messages.create(body(messages, more));
const source = { type: "base64", media_type: "image/png", data: star };
const starMessages = chat([{ type: "image", source }, { type: "text", text: see }]);
const paint = {
  name: "paint",
  description: "Paints a wall.",
  input_schema: {
    type: "object",
    properties: { color: { type: "string", enum: colors } },
    required: ["color"],
    additionalProperties: false,
  },
};

await run({
  async text() {
    const answer = await ask(chat(spell));
    assert.equal(answer.content[0].text, spelt);
    assert.equal(answer.stop_reason, "end_turn");
  },
  async picture() {
    assert.equal((await ask(starMessages)).content[0].text, seen);
  },
  async stream() {
    const stream = client.messages.stream(body(starMessages));
    let text = "";
    stream.on("text", (delta) => (text += delta));
    assert.equal(await stream.finalText(), seen);
    assert.equal(text, seen);
  },
  async tool_call() {
    const tool_choice = { type: "tool", name: "paint" };
    const asked = { tools: [paint], tool_choice };
    const [call] = (await ask(chat("Paint it red."), asked)).content;
    assert.equal(call.type, "tool_use");
    assert.ok(colors.includes(call.input.color));
    const stream = client.messages.stream(body(chat("Paint it red."), asked));
    assert.deepEqual((await stream.finalMessage()).content[0].input, call.input);
  },
  async errors() {
    const wrong = client.withOptions({ apiKey: "sk-wrong" });
    const create = (more) => client.messages.create(body(chat(spell), more));
    await fails(() => wrong.messages.create(body(chat(spell))), Anthropic.AuthenticationError, 401);
    await fails(() => create({ model: "other" }), Anthropic.NotFoundError, 404);
    await fails(() => create({ temperature: 9 }), Anthropic.BadRequestError, 400);
  },
  async rate_limit() {
    await fails(() => ask(chat(spell)), Anthropic.RateLimitError, 429);
  },
});
