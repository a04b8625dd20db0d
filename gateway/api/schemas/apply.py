"""``POST /v1/apply_template``: what a chat would become, without generating."""

from __future__ import annotations

from gateway.api.schemas.chat import TemplateFields


class ApplyTemplateRequest(TemplateFields):
    model: str | None = None
