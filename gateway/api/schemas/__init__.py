"""The HTTP bodies that the gateway takes and gives, in OpenAI's shapes."""

from gateway.api.schemas.apply import ApplyTemplateRequest
from gateway.api.schemas.chat import ChatRequest, StreamOptions
from gateway.api.schemas.messages import ImageSource, Message
from gateway.api.schemas.parsing import parse

__all__ = [
    "ApplyTemplateRequest",
    "ChatRequest",
    "ImageSource",
    "Message",
    "StreamOptions",
    "parse",
]
