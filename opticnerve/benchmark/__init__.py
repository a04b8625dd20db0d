"""``opticnerve bench``: load on any server with OpenAI's API, and what came of it."""
