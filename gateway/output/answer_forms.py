"""How a checkpoint writes its answers: its form of tool calls, and the markers around its thinking.
They determine how an answer is split into sections, and the grammar of an answer that must call
tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gateway.api.schemas.messages import Message
from gateway.job import AnyPrompt, CallMode, ChatPrompt, GenerationOptions, Tool, ToolUse
from gateway.output.calls.detect import find_form
from gateway.output.calls.form import CallForm, quoted
from gateway.output.calls.llama_json import LlamaJson
from gateway.output.choices import Choices
from gateway.output.detokenizer import Vocabulary
from gateway.output.sections import Sections
from gateway.output.thinking import MARKS, Thinking, ThinkingMarks, ThinkingReader
from gateway.prompt.template import Renderable
from gateway.prompt.tokenizer import Tokenizer
from opticnerve.errors import InvalidRequest

TAIL = 100  # A marker is searched for in so many characters at a prompt's end.
CONSTRAINED = "ask for tool_choice required, or for one function, whose calls are constrained"


@dataclass(frozen=True)
class AnswerForms:
    """The forms of one checkpoint. ``calls`` None: its form of calls is not known. ``marks`` None:
    the model does not think. ``shows_tools``: whether the chat template has a variable for
    tools."""

    tokenizer: Tokenizer
    calls: CallForm | None = None
    marks: ThinkingMarks | None = None
    shows_tools: bool = False

    @classmethod
    def find(
        cls, tokenizer: Tokenizer, template: Renderable, tool_parser: str, reasoning_parser: str
    ) -> AnswerForms:
        """The forms that ``--tool-parser`` and ``--reasoning-parser`` name, or that the template
        shows."""
        marks = MARKS.get(reasoning_parser)
        if reasoning_parser == "auto":
            marks = next((each for each in MARKS.values() if _has(each, template, tokenizer)), None)
        shows_tools = "tools" in template.variables
        return cls(tokenizer, find_form(tool_parser, template.source), marks, shows_tools)

    # ---- a request

    def check(self, use: ToolUse | None, prompt: AnyPrompt) -> None:
        """Raises InvalidRequest if the model would not see the tools, or its calls would not be
        recognized."""
        if use is None or use.mode is not CallMode.AUTO:
            return
        own_template = isinstance(prompt, ChatPrompt) and prompt.chat_template is not None
        if not self.shows_tools and not own_template:
            why = "this model's chat template does not show them to the model"
            remedy = f"start the server with a --chat-template that does, or {CONSTRAINED}"
        elif self.calls is None:
            why = "how this model writes calls is not known"
            remedy = f"start the server with --tool-parser, or {CONSTRAINED}"
        else:
            return
        raise InvalidRequest(f"tools: {why}; {remedy}", param="tools")

    def not_enforced(self, options: GenerationOptions) -> Iterator[str]:
        """The parts of the format and the tools that are not enforced: the format of an answer that
        is calls only, and strict tools whose calls begin without a marker within text."""
        use, format = options.tools, options.format
        if use is None:
            return
        if use.calls_only and format is not None:
            yield f"{format.param} (tool_choice demands calls alone)"
        if use.mode is not CallMode.AUTO or self.form_of(use).trigger:
            return
        if any(tool.strict for tool in use.tools):
            yield "strict (of tools that the model may choose to call)"

    def grammar(self, options: GenerationOptions, answer: str) -> str:
        """The grammar of an answer with the request's tools. ``answer``: the grammar of its output
        format; empty: any text. Raises InvalidRequest."""
        use = options.tools
        if use is None or use.mode is CallMode.NONE:
            return answer
        form = self.form_of(use)
        strict = any(tool.strict for tool in use.tools)
        if use.calls_only:
            return form.grammar(use, self._mark)
        if not answer:
            return form.grammar(use, self._mark) if strict and form.trigger else ""
        if not form.trigger:
            param = options.format.param if options.format else "tools"
            raise InvalidRequest(
                f"{param}: this model's calls cannot be told from an answer in a given format; ask "
                "for tool_choice none or required",
                param=param,
            )
        tools = tuple(tool if tool.strict else Tool(tool.name) for tool in use.tools)
        calls = form.grammar(replace(use, tools=tools, mode=CallMode.REQUIRED), self._mark)
        return _joined("start: @text | @calls", text=answer, calls=calls)

    def form_of(self, use: ToolUse) -> CallForm:
        """The form of calls. A request whose calls a grammar constrains needs none that the model
        knows."""
        return self.calls or LlamaJson()

    def thinking(self, prompt: AnyPrompt, rendered: str) -> Thinking | None:
        """Whether the answer to a chat begins with thinking; None for other prompts."""
        if not isinstance(prompt, ChatPrompt):
            return None
        if self.marks is None:
            return Thinking.NONE
        if prompt.continue_final_message:
            inside = _ends_in_thought(prompt.messages[-1], rendered, self.marks)
            return Thinking.INSIDE if inside else Thinking.NONE
        end = rendered[-TAIL:].rstrip() if prompt.add_generation_prompt else ""
        if end.endswith(self.marks.opening):
            return Thinking.INSIDE
        return Thinking.NONE if end.endswith(self.marks.closing) else Thinking.POSSIBLE

    def after_thinking(self, grammar: str, thinking: Thinking | None) -> str:
        """The grammar of free thinking followed by an answer."""
        if not grammar or self.marks is None or thinking in (None, Thinking.NONE):
            return grammar
        opening, closing = map(self._mark, self.marks)
        lazy = "[lazy]" if closing == quoted(self.marks.closing) else ""
        begins = "thought" if thinking is Thinking.INSIDE else f"({opening} thought)?"
        rules = [
            f"start: {begins} @answer",
            "thought: thinking gap",
            f"thinking{lazy}: TEXT {closing}",
            "TEXT: /(?s:.*)/",
            "gap: /\\n{0,2}/",
        ]
        return _joined("\n".join(rules), answer=grammar)

    def choices(
        self, options: GenerationOptions, vocabulary: Vocabulary, thinking: Thinking | None
    ) -> Choices:
        """The choices of an answer. ``thinking`` None: the prompt is not a chat, so all is text."""
        if thinking is None:
            return Choices(options, vocabulary)
        return Choices(
            options,
            vocabulary,
            self._sections(options, thinking),
            self._shown_ids(options, thinking),
        )

    def _sections(
        self, options: GenerationOptions, thinking: Thinking
    ) -> Callable[[int], Sections] | None:
        """Makes the sections of a choice; None if all of it is text."""
        use = options.tools
        form = None if use is None or use.mode is CallMode.NONE else self.form_of(use)
        marks = None if thinking is Thinking.NONE else self.marks
        if form is None and marks is None:
            return None

        def make(choice: int) -> Sections:
            return Sections(
                choice,
                thinking=marks and ThinkingReader(marks, thinking),
                form=form,
                names=frozenset(tool.name for tool in use.tools) if use else frozenset(),
                several=use is None or use.parallel,
                calls_only=use is not None and use.calls_only,
                show_reasoning=options.reasoning,
            )

        return make

    def _shown_ids(self, options: GenerationOptions, thinking: Thinking) -> frozenset[int]:
        """Tokens that the sections look for, even if they are special."""
        use = options.tools
        markers = () if self.marks is None or thinking is Thinking.NONE else tuple(self.marks)
        if use is not None and use.mode is not CallMode.NONE:
            markers = (*markers, *self.form_of(use).markers)
        ids = map(self.tokenizer.id_of, markers)
        return frozenset(number for number in ids if number is not None)

    def _mark(self, marker: str) -> str:
        """A marker in a grammar: its token, if the vocabulary has one."""
        number = self.tokenizer.id_of(marker)
        return quoted(marker) if number is None else f"<[{number}]>"


def _has(marks: ThinkingMarks, template: Renderable, tokenizer: Tokenizer) -> bool:
    tokens = all(tokenizer.id_of(mark) is not None for mark in marks)
    return tokens or any(mark in template.source for mark in marks)


def _ends_in_thought(message: Message, rendered: str, marks: ThinkingMarks) -> bool:
    """Whether the prompt's last message, ``message``, ends within thinking: the marker is open in
    it, or the template wrote one before it. Markers in other messages mean nothing."""
    opening, closing = marks
    text = message.text.strip()
    if message.role != "assistant":
        return False
    if opening in text or closing in text:
        return text.rfind(opening) > text.rfind(closing)
    before = rendered[-len(text) - TAIL :].rstrip().removesuffix(text)
    return before.rstrip().endswith(opening)


def _joined(top: str, **grammars: str) -> str:
    """One grammar from ``top`` and the grammars that it refers to by name. A grammar that is itself
    joined is taken apart."""
    joined: list[dict[str, str]] = [{"lark_grammar": top}]
    for name, text in grammars.items():
        if text.startswith("{"):
            first, *others = json.loads(text)["grammars"]
        else:
            first, others = {"lark_grammar": text}, []
        joined += [{**first, "name": name}, *others]
    return json.dumps({"grammars": joined}, ensure_ascii=False)
