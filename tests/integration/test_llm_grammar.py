"""Grammars behind the LLM service's wire, with the engine in a thread and in a process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import jsonschema
import pytest

from opticnerve.errors import InvalidRequest
from opticnerve.generation.grammars import load_vocabulary
from opticnerve.pb import llm_pb2 as pb
from tests.checkpoints import DEMO, EOS, VOCAB_SIZE
from tests.llms import Answer, Prompt, Worker, running

pytestmark = pytest.mark.slow
SCHEMA = {
    "x-guidance": {"whitespace_flexible": False},
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square"]},
        "sides": {"type": "integer", "minimum": 0, "maximum": 12},
    },
    "required": ["shape", "sides"],
    "additionalProperties": False,
}
PROMPT = Prompt([*range(5, 25)], [], [])
SAMPLING = {
    "grammar": f"start: %json {json.dumps(SCHEMA)}",
    "temperature": 1.5,
    "max_tokens": 60,
    "n": 3,
    "seed": 3,
}


def values(answer: Answer) -> list[object]:
    vocabulary = load_vocabulary(DEMO, (EOS,), VOCAB_SIZE)
    return [json.loads(vocabulary.decode_str(ids)) for _, ids in sorted(answer.tokens.items())]


@pytest.mark.parametrize("engine", ["thread", pytest.param("process", marks=pytest.mark.process)])
def test_answers_follow_their_grammar_and_bad_ones_fail_alone(engine: str, tmp_path: Path) -> None:
    async def body(worker: Worker) -> None:
        bad = PROMPT.start(sampling={"grammar": "start: nowhere"})
        whole, refused, plain = await asyncio.gather(
            worker.generate(PROMPT.start(sampling=SAMPLING)),
            worker.generate(bad),
            worker.generate(PROMPT.start()),
            return_exceptions=True,
        )
        assert isinstance(whole, Answer) and isinstance(plain, Answer)
        for value in values(whole):
            jsonschema.validate(value, SCHEMA)
        ends = [delta for delta in whole.deltas if delta.finish_reason]
        assert len(ends) == 3 and not any(delta.HasField("stop_token_id") for delta in ends)
        assert isinstance(refused, InvalidRequest)
        assert (refused.param, refused.code) == ("grammar", "invalid_grammar")
        assert "nowhere" in refused.message
        outputs = [pb.ChoiceOutput(choice=i, output_ids=whole.tokens[i][:4]) for i in range(3)]
        rest = await worker.generate(PROMPT.start(sampling=SAMPLING, outputs=outputs))
        assert [whole.tokens[i][:4] + rest.tokens.get(i, []) for i in range(3)] == [
            whole.tokens[i] for i in range(3)
        ]

    async def main() -> None:
        async with asyncio.timeout(250), running(tmp_path, engine=engine) as worker:
            await body(worker)

    asyncio.run(main())
