"""The forms of calls by name, and which of them a checkpoint's chat template teaches."""

from __future__ import annotations

import re

from gateway.output.calls.form import CallForm
from gateway.output.calls.hermes import OPEN as HERMES_CALL
from gateway.output.calls.hermes import Hermes
from gateway.output.calls.llama_json import TAG, LlamaJson
from gateway.output.calls.mistral import ARGS, CALLS, Mistral, MistralNamed
from gateway.output.calls.pythonic import Pythonic

FORMS: dict[str, type[CallForm]] = {
    form.name: form for form in (Hermes, LlamaJson, Mistral, Pythonic)
}
XML_CALL = re.compile(r"<function=|<arg_key>|<parameter=|<invoke")  # Forms that are not served.
PYTHON_CALL = re.compile(r"\[\s*[A-Za-z_][\w.]*\(\s*\w+\s*=")
LLAMA_CALL = re.compile(r'\{\\?"name\\?":[^{}]*\\?"parameters\\?":')


def find_form(setting: str, template: str) -> CallForm | None:
    """The form that ``--tool-parser`` names; for ``auto``, the one that ``template`` shows."""
    if setting != "auto":
        kind: type[CallForm] | None = FORMS.get(setting)
    elif XML_CALL.search(template):
        kind = None
    elif CALLS in template:
        kind = Mistral
    elif HERMES_CALL in template:
        kind = Hermes
    elif PYTHON_CALL.search(template):
        kind = Pythonic
    elif TAG in template or LLAMA_CALL.search(template):
        kind = LlamaJson
    else:
        kind = None
    if kind is Mistral and ARGS in template:
        kind = MistralNamed
    return kind() if kind is not None else None
