"""ViP-LLaVA's layout, which is LLaVA's. Without torch: the gateway imports it."""

from opticnerve.models.llava.layout import LlavaLayout


class VipLlavaLayout(LlavaLayout):
    family = "vip_llava"
