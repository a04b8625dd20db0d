"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Hermes and Qwen models write
calls: within text, one after another."""

from __future__ import annotations

from typing import ClassVar

from gateway.job import Tool
from gateway.output.calls.form import CallForm, CallReader, Mark, json_rules
from gateway.output.reader import Reader, Steps

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(CallForm):
    name: ClassVar[str] = "hermes"
    markers: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)
    trigger: ClassVar[str] = OPEN

    def reader(self, names: frozenset[str]) -> Reader:
        return HermesReader()

    def rules(self, tools: list[Tool], mark: Mark, *, several: bool) -> list[str]:
        more = ' ("\\n" marked)*' if several else ""
        return [
            f"calls: marked{more}",
            f'marked: begin "\\n" call "\\n" {mark(CLOSE)}',
            *json_rules(tools, "arguments"),
        ]


class HermesReader(CallReader):
    def read(self) -> Steps[None]:
        while self.char:
            yield from self.text(OPEN[0])
            yield from self.attempt(self._call())

    def _call(self) -> Steps[None]:
        yield from self.literal(OPEN)
        yield from self.spaces()
        yield from self.json_call()
        yield from self.spaces()
        yield from self.literal(CLOSE)
