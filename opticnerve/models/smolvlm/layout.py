"""SmolVLM's layout is Idefics3's."""

from __future__ import annotations

from opticnerve.models.idefics3.layout import Idefics3Layout


class SmolVLMLayout(Idefics3Layout):
    family = "smolvlm"
