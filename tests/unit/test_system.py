"""What tests ask of the system."""

import socket

from tests import system


class Choices:
    """Chooses the given ports, one after the other."""

    def __init__(self, *ports):
        self.ports = list(ports)

    def choice(self, ports):
        return self.ports.pop(0)


def test_a_free_port_is_returned_once_and_a_taken_one_never(monkeypatch):
    first, second = system.free_port(), system.free_port()
    monkeypatch.setattr(system, "_given", set())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        monkeypatch.setattr(system, "_random", Choices(first, second, second, second, first))
        assert system.free_port() == second
    assert system.free_port() == first
