"""Small tokenizers of the kinds that checkpoints bring, trained on the spot, and chat templates
in the styles that they are written in. Deterministic, and fast enough for every test."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import opticnerve.demo
from opticnerve.media.plan import Modality

DEMO = Path(opticnerve.demo.__file__).parent / "checkpoint"
SPACE = "\u2581"

TEXT = [
    "the quick brown fox jumps over the lazy dog and the cat sleeps on the mat",
    "a red square is left of a blue circle; what is above the green triangle?",
    "int main(void) { return 0; } <html> </html> <|im_start|> [INST] the end",
    "Größe, café, naïve, 你好, привет, こんにちは, 123 4567",
] * 4

CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content | trim }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part -%}
                <|vision_start|><|image_pad|><|vision_end|>
            {%- elif 'text' in part %}{{ part.text }}{% endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

THINKING = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% set content = message.content -%}
{%- if message.role == 'assistant' and '</think>' in content -%}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if content.startswith('<|im_end|>') -%}(odd){%- endif -%}
{{ content }}<|im_end|>
{% for call in message.tool_calls or [] -%}
<tool_call>{{ call.function | tojson }}</tool_call>
{% endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think>

</think>

{% endif -%}
{%- endif -%}
"""

PIECES = """{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}\
{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] | trim }}\
{% else %}{{ '<|image_pad|>' }}{% endif %}{% endfor %}{{ '<|end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

LLAMA = """{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate: user, assistant, user, ...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}\
{% else %}{% generation %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endgeneration %}\
{% endif %}{% endfor %}"""

LLAVA = """{% for message in messages %}{% if message['role'] != 'system' %}\
{{ message['role'] | upper + ': ' }}{% endif %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}\
{% endfor %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ part['text'] + ' ' }}{% endfor %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

HERMES = """{%- macro shown(content) -%}
{%- if content is string %}{{ content }}{% else %}
{%- for part in content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}{% endfor %}{% endif -%}
{%- endmacro -%}
{%- if tools -%}
<|im_start|>system
You may call these functions:
{% for tool in tools %}{{ tool | tojson }}
{% endfor -%}
Call one by a JSON object within <tool_call></tool_call>.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}
{% if message.role == 'tool' %}<tool_response>
{{ shown(message.content) }}
</tool_response>{% else %}{{ shown(message.content or '') }}{% endif -%}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking %}<think>
{% endif %}{% endif -%}
"""

LLAMA_TOOLS = """{%- if tools is not none and tools %}
{{- '<|system|>\\nFunctions:\\n' }}
{%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor %}
{{- 'Respond with {"name": function name, "parameters": its arguments by name}<|end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' }}
{%- if message.tool_calls %}
{{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}
{{- message.tool_calls[0].function.arguments | tojson }}{{ '}' }}
{%- else %}{{ message.content }}{% endif %}
{{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

MISTRAL_TOOLS = """{{- bos_token }}
{%- if tools %}{{ '[AVAILABLE_TOOLS] [' }}
{%- for tool in tools %}{{ '{' }}
{%- for key, value in tool.function.items() %}
{{- '"' + key + '": ' }}{{ value | tojson }}{{ ', ' if not loop.last }}
{%- endfor %}{{ '}' }}{{ ', ' if not loop.last }}{% endfor %}{{ '][/AVAILABLE_TOOLS]' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + '[/INST]' }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + message.content + '}[/TOOL_RESULTS]' }}
{%- elif message.tool_calls %}{{ '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}{{ ']' + eos_token }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""

PYTHONIC_TOOLS = """{%- for message in messages %}
{%- if loop.first and tools %}{{ '<|system|>\\nFunctions in JSON: ' + tools | tojson + '\\n' }}
{{- 'Call them as [name1(key1=value1, key2=value2), name2()].<|end|>\\n' }}{% endif %}
{{- '<|' + message.role + '|>\\n' }}
{%- if message.tool_calls %}{{ '[' }}
{%- for call in message.tool_calls %}{{ call.function.name + '(' }}
{%- for key, value in call.function.arguments.items() %}
{{- key + '=' + value | tojson }}{{ ', ' if not loop.last }}{% endfor %}{{ ')' }}
{%- endfor %}{{ ']' }}{% else %}{{ message.content }}{% endif %}
{{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

TOOL_TEMPLATES = {
    "hermes": HERMES,
    "llama3_json": LLAMA_TOOLS,
    "mistral": MISTRAL_TOOLS,
    "pythonic": PYTHONIC_TOOLS,
}
"""Templates in the styles of four families, by the form of calls that they teach."""


def layout(image_token_id: int) -> Any:
    """The part of a family's layout that rendering looks at."""
    return SimpleNamespace(
        item_token_ids={Modality.IMAGE: image_token_id},
        placeholder_ids={"image_token": image_token_id},
        max_positions=8192,
        rewrite=None,
    )


DEMO_LAYOUT = layout(632)


def write(directory: Path, tokenizer: str, config: dict[str, Any], template: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    model = {"model_type": "llava" if "<image>" in tokenizer else "qwen2_vl"}
    (directory / "config.json").write_text(json.dumps(model), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


def byte_level(directory: Path, template: str = CHATML, **config: Any) -> Path:
    """Qwen's kind: byte-level BPE, NFC, special tokens outside the vocabulary, ``<think>`` and
    ``<tool_call>`` added but not special."""
    return write(
        directory,
        _byte_level(),
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            **config,
        },
        template,
    )


BYTE_LEVEL_SPECIALS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
]
BYTE_LEVEL_ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


@functools.cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens(BYTE_LEVEL_SPECIALS)
    tokenizer.add_tokens(BYTE_LEVEL_ADDED)
    return str(tokenizer.to_str())


def sentencepiece(directory: Path, template: str = LLAVA, **config: Any) -> Path:
    """LLaVA-1.5's kind: Llama's BPE over word marks with byte fallback, ``<s>`` in front, and
    special tokens inside the vocabulary."""
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "extra_special_tokens": {"image_token": "<image>"},
        **config,
    }
    return write(directory, _sentencepiece(), settings, template)


@functools.cache
def _sentencepiece() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    names = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=names + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT[:12], trainer)
    trained = json.loads(tokenizer.to_str())
    trained["added_tokens"] = [
        {"id": i, "content": name, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for i, name in enumerate(names)
    ]
    trained["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ],
    }
    trained["pre_tokenizer"] = None
    again = Tokenizer.from_str(json.dumps(trained))
    again.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    again.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 1)]
    )
    again.add_special_tokens(["<image>", "<pad>"])
    return str(again.to_str())
