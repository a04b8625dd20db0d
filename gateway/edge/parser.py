"""HTTP/1 requests, read without leniency: where two readers could see different requests, nobody
may slip one past whatever stands in front of the gateway."""

from __future__ import annotations

import re

import h11

VERSIONS = (b"1.0", b"1.1")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_QUOTED = re.compile(r"[:,]? (?:bytearray\()?b['\"].*", re.DOTALL)  # h11 quotes what it refuses.


class StrictParser(h11.Connection):
    """h11's parser of requests, which by itself takes lines that end in LF alone, any version of
    one digit, and Content-Length beside Transfer-Encoding. ``fault``: why a request was refused; it
    holds nothing that the client sent, which may be a key. ``ahead``: more has come than the
    request that is being answered. ``left``: bytes to come of a body of known length. ``chunks``:
    pieces of chunked bodies that have come."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER)
        self.fault = ""
        self.ahead = False
        self.left = 0
        self.chunks = 0
        self._chunked = False

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Raises h11.RemoteProtocolError."""
        # Only heads, and of chunked bodies the trailers, are made of lines.
        reads_lines = self.their_state is h11.IDLE or self._chunked
        before = self.trailing_data[0] if reads_lines else b""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._check(event)
            if reads_lines and isinstance(event, h11.Request | h11.EndOfMessage):
                left = len(self.trailing_data[0])
                if _BARE_LF.search(before[: len(before) - left]):
                    raise h11.RemoteProtocolError("a line ends in LF without CR")
        except h11.RemoteProtocolError as error:
            self.fault = _QUOTED.sub("", str(error))
            raise
        self.ahead = event is h11.PAUSED
        if isinstance(event, h11.Data):
            self.left -= 0 if self._chunked else len(event.data)
            self.chunks += self._chunked
        return event

    def _check(self, request: h11.Request) -> None:
        if request.http_version not in VERSIONS:
            raise h11.RemoteProtocolError("the version is neither HTTP/1.0 nor HTTP/1.1")
        headers = dict(request.headers)
        self.left = int(headers.get(b"content-length", 0))  # h11 has read it.
        self._chunked = b"transfer-encoding" in headers
        if self._chunked and (b"content-length" in headers or request.http_version == b"1.0"):
            raise h11.RemoteProtocolError("Transfer-Encoding beside Content-Length or in HTTP/1.0")
