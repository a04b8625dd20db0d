"""``{"name": ..., "parameters": {...}}``, as Llama 3 writes calls: the answer is calls and nothing
else, separated by semicolons or white space."""

from __future__ import annotations

from typing import ClassVar

from gateway.job import Tool
from gateway.output.calls.form import CallForm, CallReader, Mark, json_rules
from gateway.output.reader import Malformed, Reader, Steps

TAG = "<|python_tag|>"


class LlamaJson(CallForm):
    name: ClassVar[str] = "llama3_json"
    markers: ClassVar[tuple[str, ...]] = (TAG,)

    def reader(self, names: frozenset[str]) -> Reader:
        return LlamaJsonReader(names)

    def rules(self, tools: list[Tool], mark: Mark, *, several: bool) -> list[str]:
        more = ' ("; " call)*' if several else ""
        return [f"calls: call{more}", *json_rules(tools, "parameters")]


class LlamaJsonReader(CallReader):
    def read(self) -> Steps[None]:
        yield from self.attempt(self._call())
        while self._ended:
            yield from self.attempt(self._next())
        yield from self.text()

    def _call(self) -> Steps[None]:
        yield from self.spaces()
        if self.char == TAG[0]:
            yield from self.literal(TAG)
            yield from self.spaces()
        yield from self.json_call()

    def _next(self) -> Steps[None]:
        yield from self.spaces()
        if self.char == ";":
            yield
        yield from self._call()

    def other_key(self, key: str) -> None:
        """An object with other keys is an answer in JSON."""
        if key not in ("type", "id"):
            raise Malformed
