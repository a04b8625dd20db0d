"""A session's conversation: its items in order, within bounds."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.api.realtime.items import Item, held_bytes, new_id
from gateway.edge.admission import Ticket
from gateway.edge.limits import MAX_ENTRIES
from opticnerve.errors import InvalidRequest, PayloadTooLarge

ROOT = "root"  # The place before all items, in ``previous_item_id``.


class Conversation:
    """The items of a conversation, in order. ``ticket`` holds their bytes while they are in it."""

    def __init__(self, ticket: Ticket, max_bytes: int) -> None:
        self.id = new_id("conv")
        self._ticket = ticket
        self._max_bytes = max_bytes
        self._items: list[Item] = []
        self._by_id: dict[str, Item] = {}
        self._bytes = 0

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def get(self, item_id: str, code: str) -> Item:
        """The item with this id. Raises InvalidRequest, with ``code``, if there is none."""
        if item_id not in self._by_id:
            raise InvalidRequest(
                "there is no such item in the conversation", param="item_id", code=code
            )
        return self._by_id[item_id]

    def add(self, item: Item, previous: str | None = None) -> str | None:
        """Adds an item after the item ``previous`` (ROOT: before all; None: at the end). Returns
        the id of the item before it. Raises InvalidRequest, PayloadTooLarge, Overloaded."""
        if item.id in self._by_id:
            raise InvalidRequest(
                "the conversation has an item with this id; leave the id out, or delete that item",
                param="item.id",
                code="item_create_duplicate_id",
            )
        if len(self._items) >= MAX_ENTRIES:
            raise _too_large(f"{MAX_ENTRIES} items")
        place = self._place_after(previous)
        self._hold(item.size)
        self._items.insert(place, item)
        self._by_id[item.id] = item
        return self._items[place - 1].id if place else None

    def remove(self, item_id: str) -> None:
        """Raises InvalidRequest."""
        item = self.get(item_id, "item_delete_invalid_item_id")
        del self._by_id[item_id]
        self._items.remove(item)
        self._bytes -= item.size
        self._ticket.free_bytes(item.size)

    def grow(self, item: Item, text: str) -> None:
        """Counts more text of an item that is being written. Raises PayloadTooLarge, Overloaded."""
        if self._by_id.get(item.id) is item:  # It may have been deleted meanwhile.
            size = held_bytes(text)
            self._hold(size)
            item.size += size

    def _place_after(self, previous: str | None) -> int:
        if previous is None:
            return len(self._items)
        if previous == ROOT:
            return 0
        if previous not in self._by_id:
            raise InvalidRequest(
                "previous_item_id: there is no such item in the conversation",
                param="previous_item_id",
                code="item_create_invalid_previous_item_id",
            )
        return self._items.index(self._by_id[previous]) + 1

    def _hold(self, num_bytes: int) -> None:
        if self._bytes + num_bytes > self._max_bytes:
            raise _too_large(f"{self._max_bytes} bytes, as one request")
        self._ticket.hold_bytes(num_bytes)
        self._bytes += num_bytes


def _too_large(most: str) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"a conversation holds at most {most}; delete items, or open a new session",
        code="conversation_too_large",
    )
