"""The HTTP bodies that the gateway takes and gives, in OpenAI's shapes."""

from gateway.schemas.apply import ApplyTemplateRequest
from gateway.schemas.chat import ChatRequest, StreamOptions
from gateway.schemas.messages import ImageSource, Message
from gateway.schemas.parsing import parse

__all__ = [
    "ApplyTemplateRequest",
    "ChatRequest",
    "ImageSource",
    "Message",
    "StreamOptions",
    "parse",
]
