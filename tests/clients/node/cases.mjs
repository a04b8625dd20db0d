// What a test in Python asks of a client: `node CLIENT.mjs CASE`. ASKED holds tests/clients/server.py.
import assert from "node:assert/strict";

export const asked = JSON.parse(process.env.ASKED);
export const { url, key, model, spell, spelt, see, seen, star, colors } = asked;

export const starChat = [
  {
    role: "user",
    content: [
      { type: "text", text: see },
      { type: "image_url", image_url: { url: `data:image/png;base64,${star}` } },
    ],
  },
];

export const chat = (content) => [{ role: "user", content }];

export async function fails(call, kind, status) {
  const error = await call().then(
    () => assert.fail("it was answered"),
    (error) => error,
  );
  assert.ok(error instanceof kind, `${error.constructor.name}: ${error.message}`);
  assert.equal(error.status ?? error.statusCode, status);
  return error;
}

export async function run(cases) {
  await cases[process.argv[2]]();
}
