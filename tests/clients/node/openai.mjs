import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { chat, colors, fails, key, model, run, seen, spell, spelt, starChat, url } from "./cases.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const ask = (messages, more = {}) =>
  client.chat.completions.create({ model, messages, temperature: 0, ...more });
const Painted = z.object({ color: z.enum(colors) });
const paint = {
  type: "function",
  function: { name: "paint", description: "Paints a wall.", parameters: z.toJSONSchema(Painted) },
};
const named = { type: "function", function: { name: "paint" } };

await run({
  async text() {
    const answer = await ask(chat(spell));
    assert.equal(answer.choices[0].message.content, spelt);
    assert.ok(answer.usage.completion_tokens > 0);
  },
  async picture() {
    assert.equal((await ask(starChat)).choices[0].message.content, seen);
  },
  async stream() {
    let text = "";
    for await (const chunk of await ask(starChat, { stream: true })) {
      text += chunk.choices[0].delta.content;
    }
    assert.equal(text, seen);
  },
  async stream_helper() {
    const runner = client.chat.completions.stream({ model, messages: starChat, temperature: 0 });
    let text = "";
    runner.on("content", (delta) => (text += delta));
    assert.equal(await runner.finalContent(), seen);
    assert.equal(text, seen);
  },
  async structured_output() {
    const response_format = zodResponseFormat(Painted, "painted");
    const answer = await client.chat.completions.parse({
      model, messages: starChat, temperature: 0, response_format,
    });
    assert.ok(colors.includes(answer.choices[0].message.parsed.color));
  },
  async tool_call() {
    const answer = await ask(chat("Paint it red."), { tools: [paint], tool_choice: named });
    const [call] = answer.choices[0].message.tool_calls;
    assert.equal(call.function.name, "paint");
    assert.ok(colors.includes(JSON.parse(call.function.arguments).color));
  },
  async responses() {
    const input = [
      {
        role: "user",
        content: [
          { type: "input_text", text: starChat[0].content[0].text },
          { type: "input_image", image_url: starChat[0].content[1].image_url.url, detail: "auto" },
        ],
      },
    ];
    const body = { model, input, temperature: 0, store: false };
    assert.equal((await client.responses.create(body)).output_text, seen);
    const stream = client.responses.stream(body);
    assert.equal((await stream.finalResponse()).output_text, seen);
  },
  async errors() {
    const wrong = client.withOptions({ apiKey: "sk-wrong" });
    await fails(() => wrong.models.list(), OpenAI.AuthenticationError, 401);
    await fails(() => ask(chat(spell), { model: "other" }), OpenAI.NotFoundError, 404);
    const error = await fails(() => ask(chat(spell), { temperature: 9 }), OpenAI.BadRequestError, 400);
    assert.equal(error.param, "temperature");
  },
  async rate_limit() {
    await fails(() => ask(chat(spell)), OpenAI.RateLimitError, 429);
  },
});
