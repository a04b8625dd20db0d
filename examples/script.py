"""No server of your own: a stack for one script, which ends with it."""

from __future__ import annotations

import opticnerve
from examples.picture import STAR, WORD

if __name__ == "__main__":
    with opticnerve.serve() as server:  # Or serve("path or hub id").
        questions = [("What do you see?", STAR), ("What does the text say?", WORD)]
        for answer in server.chat(questions, temperature=0):
            print(answer)
