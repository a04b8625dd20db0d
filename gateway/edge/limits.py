"""Limits on clients: every bound that a request can run into, in one place.

A bound is either fixed here, or an operator's flag, whose default is in ``opticnerve.config``. At a
bound a client gets an error with its code; bounds on pace mostly delay the client or close its
connection instead. Modules import the bounds that they enforce. The table in docs/security.md is
written from this module (``tests/policy_table.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from opticnerve.config import GatewayConfig
from opticnerve.errors import (
    AnswerTooLarge,
    BodyTimeout,
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidMedia,
    InvalidRequest,
    MediaFetchFailed,
    OpticNerveError,
    Overloaded,
    PayloadTooLarge,
    PoisonousItem,
    Unavailable,
)
from opticnerve.generation.values import MAX_CHOICES
from opticnerve.media.formats.byte_reader import MAX_PIECES
from opticnerve.media.plan import LIGHT_MEMORY, LIGHT_PASSES

Number = TypeVar("Number", int, float)
Answer = type[OpticNerveError] | str

CLOSED = "its connection is closed"
WAITS = "it waits"


@dataclass(frozen=True, slots=True)
class Limit:
    """One bound. ``what`` begins with the unit. ``value``: the fixed value, or the flag's default.
    ``flag``: the field of GatewayConfig; empty where the value is fixed. ``answer``: what a client
    gets at the bound: an error's code, or what happens instead."""

    what: str
    value: float
    answer: str
    flag: str


POLICY: dict[str, list[Limit]] = {}
"""Limits by the heading that they stand under."""

_DEFAULTS: dict[str, Any] = {item.name: item.default for item in fields(GatewayConfig)}


def _heading(title: str) -> None:
    POLICY[title] = []


def _fixed(value: Number, what: str, answer: Answer, code: str = "", flag: str = "") -> Number:
    """Adds a limit under the last heading; returns ``value``. ``code`` replaces the error's own."""
    if not isinstance(answer, str):
        answer = f"{answer.http_status} `{code or answer.default_code or answer.type}`"
    next(reversed(POLICY.values())).append(Limit(what, value, answer, flag))
    return value


def _flag(name: str, what: str, answer: Answer, code: str = "") -> None:
    _fixed(_DEFAULTS[name], what, answer, code, name)


_heading("Connections")
_flag("max_connections", "connections of all clients", "the client with most loses an idle one")
_flag("max_connections_per_address", "connections of one address; 0: any number", CLOSED)
IPV6_NETWORK_BITS = _fixed(64, "bits of an IPv6 address that name one client", "-")
MAX_HEAD_BYTES = _fixed(2**14, "bytes of a request's headers", InvalidRequest, "not_http")
HANDSHAKE_TIMEOUT_S = _fixed(10.0, "seconds of a TLS handshake, before any headers", CLOSED)
FIRST_HEAD_TIMEOUT_S = _fixed(30.0, "seconds from connecting to the end of headers", CLOSED)
IDLE_TIMEOUT_S = _fixed(75.0, "seconds from an answer to the end of the next headers", CLOSED)
PROGRESS_BYTES = _fixed(8 * 2**10, "bytes that count as progress of a body or answer", "-")
_flag("stall_timeout_s", "seconds of a body for each such progress", BodyTimeout)
_flag("stall_timeout_s", "seconds of an answer for each such progress", CLOSED)
NO_PROGRESS_S = _fixed(3.0, "seconds without progress, if a new connection needs room", CLOSED)
FREE_BODY_CHUNKS = _fixed(256, "chunks in one read of a body before they are paced", WAITS)
BODY_CHUNKS_PER_S = _fixed(10_000, "chunks a second of one client's paced bodies", WAITS)
FRAME_CHUNKS = _fixed(5, "chunks that one frame of a WebSocket counts for", "-")

_heading("Requests in flight")
_flag("max_concurrent_requests", "requests of all clients", Overloaded)
_flag("max_requests_per_key", "requests of one key or address; 0: any number", Overloaded)
_flag("max_bytes_in_flight", "bytes that all requests hold", Overloaded)
RESERVED_FRACTION = _fixed(0.25, "part of these kept for clients below an equal share", Overloaded)
PICTURES_FRACTION = _fixed(0.75, "part of all requests that may wait for an encoder", Overloaded)
_flag("max_encode_wait_s", "expected seconds until an encoder; 0: the deadline", Overloaded)
_flag("request_timeout_s", "seconds of one request, end to end", DeadlineExceeded)
ERROR_DELIVERY_S = _fixed(5.0, "seconds after the deadline to read its error", CLOSED)
RETRY_AFTER_S = _fixed(1.0, "seconds in the Retry-After of these refusals", "-")

_heading("Bodies")
_flag("max_request_bytes", "bytes of one body", PayloadTooLarge)
_flag("body_timeout_s", "seconds for a body to arrive", BodyTimeout)
_flag("max_request_values", "objects, lists and entries", PayloadTooLarge, "too_many_values")
VALUE_BYTES = _fixed(400, "bytes in flight charged for each of these values", Overloaded)
MAX_OUTLINE_BYTES = _fixed(2**22, "bytes of a long body without its long strings", PayloadTooLarge)
MAX_TEXT_CHARACTERS = _fixed(2**24, "characters of a string, unless all ASCII", PayloadTooLarge)
MAX_NAME_CHARACTERS = _fixed(2**16, "characters of a field's name", InvalidRequest)
MAX_DEPTH = _fixed(201, "levels of objects and lists", InvalidRequest, "invalid_json")
"""The JSON parser's own bound, which cannot be set; a test checks that the two agree."""
MAX_FIELDS = _fixed(256, "fields of one object", InvalidRequest)
MAX_ENTRIES = _fixed(2**12, "messages, or parts of one message", InvalidRequest)
MAX_ARGUMENT_VALUES = _fixed(2**16, "values of all earlier tool calls' arguments", InvalidRequest)
MAX_TEMPLATE_KWARGS = _fixed(
    2**14, "values and characters of `chat_template_kwargs`", InvalidRequest
)
MAX_PROMPT_CHARACTERS = _fixed(2**24, "characters of a prompt", ContextLengthExceeded)
MAX_TRUNCATED_CONTEXTS = _fixed(
    4, "context lengths of a prompt with `truncate_prompt_tokens`", ContextLengthExceeded
)
MAX_TOKENIZE_CHARACTERS = _fixed(2**20, "characters of a text for /tokenize", InvalidRequest)
TEMPLATE_TIMEOUT_S = _fixed(
    10.0,
    "seconds of rendering, checked whenever output is written; with `chat_template`, at any time",
    ContextLengthExceeded,
)
MAX_TEMPLATE_CHARACTERS = _fixed(2**16, "characters of `chat_template`", InvalidRequest)
MAX_TEMPLATES_WAITING = _fixed(8, "requests that render a `chat_template`, or wait to", Overloaded)
TEMPLATE_MEMORY_BYTES = _fixed(
    2**29, "bytes of memory for rendering a `chat_template`", InvalidRequest
)

MAX_TOOLS = _fixed(128, "tools, or `allowed_tools`", InvalidRequest)
MAX_TOOL_NAME = _fixed(128, "characters of a tool's name", InvalidRequest)
MAX_TOOLS_SIZE = _fixed(2**18, "values and characters of all tools", InvalidRequest)
_heading("Realtime sessions")
_flag("max_realtime_sessions", "sessions of all clients", Overloaded)
MAX_EVENT_BYTES = _fixed(2**25, "bytes of one event", "close code 1009")
EVENTS_PER_S = _fixed(100, "events a second of one session, after a burst of as many", WAITS)
_flag("max_request_bytes", "bytes of a conversation", PayloadTooLarge, "conversation_too_large")
MAX_ITEM_CHARACTERS = _fixed(2**20, "characters of one item without its pictures", InvalidRequest)
MAX_SESSION_RESPONSES = _fixed(4, "responses at once in one session", Overloaded)
SESSION_IDLE_S = _fixed(900.0, "seconds without an event or a response", "`session_idle`, closed")
MAX_SESSION_S = _fixed(3600.0, "seconds of one session", "`session_expired`, closed")
PING_S = _fixed(20.0, "seconds between pings, and for their answers", CLOSED)

_heading("Generation")
MAX_PROMPTS = _fixed(1024, "prompts of one completion request, times `n`", InvalidRequest)
MAX_PROMPTS_AT_ONCE = _fixed(16, "of these at once, each counted as a request in flight", WAITS)
MAX_MARKER_CHARACTERS = _fixed(64, "characters of `image_marker`", InvalidRequest)
_fixed(MAX_CHOICES, "choices (`n`), whatever the flag says", InvalidRequest)
_flag("max_n", "choices (`n`)", InvalidRequest)
_flag("max_logprobs", "alternatives of a token (`top_logprobs` and its like)", InvalidRequest)
MAX_STOPS = _fixed(16, "stop strings", InvalidRequest)
MAX_STOP_TOKENS = _fixed(256, "token ids that stop (`stop_token_ids`)", InvalidRequest)
MAX_BAD_WORDS = _fixed(256, "words that may not be written (`bad_words`)", InvalidRequest)
MAX_WORD_CHARACTERS = _fixed(1024, "characters of a stop string or bad word", InvalidRequest)
MAX_BIASES = _fixed(1024, "tokens with a bias (`logit_bias`)", InvalidRequest)
MAX_ALLOWED_TOKENS = _fixed(2**16, "tokens allowed (`allowed_token_ids`)", InvalidRequest)
MAX_SCHEMA_CHARACTERS = _fixed(2**17, "characters of a JSON schema, or a grammar", InvalidRequest)
MAX_SCHEMA_WORK = _fixed(700_000, "microseconds of compiling it, by an estimate", InvalidRequest)
MAX_REGEX_CHARACTERS = _fixed(2**13, "characters of a regular expression", InvalidRequest)
MAX_LISTED_CHOICES = _fixed(2**12, "texts to choose from (`choice`)", InvalidRequest)
MAX_GRAMMAR_RULES = _fixed(500, "rules of a grammar", InvalidRequest)
MAX_GRAMMAR_EXPANSION = _fixed(2**14, "characters of a pattern written out", InvalidRequest)
MAX_SALT_CHARACTERS = _fixed(1024, "characters of `cache_salt`", InvalidRequest)
MAX_LABEL = _fixed(1024, "characters of a label that a response repeats", InvalidRequest)
MAX_METADATA = _fixed(16, "entries of a response's `metadata`", InvalidRequest)
MAX_METADATA_KEY = _fixed(64, "characters of such an entry's key", InvalidRequest)
MAX_METADATA_VALUE = _fixed(512, "characters of such an entry's value", InvalidRequest)
MAX_LLM_DEATHS = _fixed(2, "LLM workers lost while they had one generation", Unavailable)
_flag("max_answer_bytes", "bytes of an answer that is not streamed", AnswerTooLarge)

_heading("Pictures")
_flag("max_images", "pictures of one prompt", InvalidRequest, "too_many_images")
_flag("max_media_bytes", "bytes of one picture's file", PayloadTooLarge)
_flag("max_image_pixels", "pixels of one picture", InvalidMedia)
_flag("max_decode_passes", "pixels times passes of decoding one picture", InvalidMedia)
_fixed(MAX_PIECES, "chunks, segments or blocks of one file", InvalidMedia)
_fixed(LIGHT_PASSES, "pixels times passes of a light picture", "a heavy one waits longer")
_fixed(LIGHT_MEMORY, "bytes of memory for decoding a light picture", "a heavy one waits longer")
MAX_ENCODER_DEATHS = _fixed(2, "encoders lost while they had one picture", PoisonousItem)
MAX_DATA_URL_HEAD = _fixed(2**12, "characters of a `data:` URL before its comma", InvalidRequest)

_heading("Media from URLs")
MAX_URL_CHARACTERS = _fixed(2**14, "characters of an http or https URL", InvalidRequest)
_flag("media_timeout_s", "seconds of one fetch, waiting and redirects included", MediaFetchFailed)
_flag("media_redirects", "redirects of one fetch", MediaFetchFailed)
MAX_FETCHES = _fixed(192, "connections to all media servers", WAITS)
MAX_FETCHES_PER_ADDRESS = _fixed(64, "connections to one address", WAITS)
MAX_MEDIA_HEAD_BYTES = _fixed(2**15, "bytes of headers, 1xx answers included", MediaFetchFailed)
EXTRA_MEDIA_BYTES = _fixed(2**18, "bytes sent beyond twice the file's bound", MediaFetchFailed)
FREE_MEDIA_CHUNKS = _fixed(1024, "chunks of an answer of any size", MediaFetchFailed)
LEAST_CHUNK_BYTES = _fixed(512, "bytes, at least, of further chunks on average", MediaFetchFailed)
MAX_GZIP_MEMBERS = _fixed(1000, "members of a gzip body", MediaFetchFailed)
FREE_SMALL_READS = _fixed(32, "reads of less than 4 KiB before they are paced", WAITS)
SMALL_READ_DELAY_S = _fixed(0.005, "seconds of delay after each further one", WAITS)
NAME_TIMEOUT_S = _fixed(4.0, "seconds for resolving a name", MediaFetchFailed)
SILENT_NAME_S = _fixed(15.0, "seconds before such a name is tried again", MediaFetchFailed)
MAX_NEW_LOOKUPS = _fixed(96, "look-ups at once of names not resolved before", WAITS)
MAX_NEW_LOOKUPS_PER_SITE = _fixed(4, "of those, per registered domain", WAITS)
MAX_KNOWN_LOOKUPS = _fixed(32, "look-ups at once of names resolved before", WAITS)
MAX_KNOWN_LOOKUPS_PER_SITE = _fixed(2, "of those, per registered domain", WAITS)
