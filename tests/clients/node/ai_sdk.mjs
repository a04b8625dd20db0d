import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, Output, streamText, tool } from "ai";
import { z } from "zod";
import { colors, fails, key, model, run, see, seen, spell, spelt, star, url } from "./cases.mjs";

// The default of @ai-sdk/openai is /v1/responses.
const models = (apiKey, name = model) => {
  const settings = { baseURL: `${url}/v1`, apiKey };
  const openai = createOpenAI(settings);
  const compatible = createOpenAICompatible({
    ...settings, name: "opticnerve", supportsStructuredOutputs: true,
  });
  return { responses: openai(name), chat: openai.chat(name), compatible: compatible(name) };
};
const which = process.argv[3];
const ask = (more, call = generateText, used = models(key)) =>
  call({ model: used[which], temperature: 0, maxRetries: 0, ...more });
const picture = { type: "image", image: Buffer.from(star, "base64"), mediaType: "image/png" };
const starMessages = [{ role: "user", content: [{ type: "text", text: see }, picture] }];
const Painted = z.object({ color: z.enum(colors) });

await run({
  async text() {
    const answer = await ask({ prompt: spell });
    assert.equal(answer.text, spelt);
    assert.ok(answer.usage.outputTokens > 0);
  },
  async picture() {
    assert.equal((await ask({ messages: starMessages })).text, seen);
  },
  async stream() {
    let text = "";
    for await (const piece of ask({ messages: starMessages }, streamText).textStream) text += piece;
    assert.equal(text, seen);
  },
  async structured_output() {
    const output = Output.object({ schema: Painted });
    assert.ok(colors.includes((await ask({ messages: starMessages, output })).output.color));
  },
  async tool_call() {
    const paint = tool({ description: "Paints a wall.", inputSchema: Painted });
    const toolChoice = { type: "tool", toolName: "paint" };
    const asked = { prompt: "Paint it red.", tools: { paint }, toolChoice };
    const [call] = (await ask(asked)).toolCalls;
    assert.ok(colors.includes(call.input.color));
    const [streamed] = await ask(asked, streamText).toolCalls;
    assert.deepEqual(streamed.input, call.input);
  },
  async errors() {
    const asking = (used) => () => ask({ prompt: spell }, generateText, used);
    const denied = await fails(asking(models("sk-wrong")), APICallError, 401);
    assert.equal(denied.isRetryable, false);
    await fails(asking(models(key, "other")), APICallError, 404);
    const told = await fails(() => ask({ prompt: spell, temperature: 9 }), APICallError, 400);
    assert.match(told.message, /temperature/);
  },
  async rate_limit() {
    const told = await fails(() => ask({ prompt: spell }), APICallError, 429);
    assert.ok(told.isRetryable);
  },
});
