"""The unix links that a worker has an end of."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

from stagemesh.stage.link_name import link_name
from stagemesh.stage.local_socket import Inbox, Part
from stagemesh.stage.unix_link import UnixReceiver, UnixSender
from stagemesh.wire.columns import U64, unpack


class LinkEnds:
    """Of one worker; all of one epoch.

    Args:
        inbox: Gets the receiving ends as further sources.
        timeout_s: A receiver that takes nothing for so long is given up.
        on_lost: Called with epoch, what happened and the peer's address when a link ends; from any thread.
    """

    def __init__(self, inbox: Inbox, timeout_s: float, on_lost: Callable[[int, str, str], None]) -> None:
        self._inbox = inbox
        self._timeout_s = timeout_s
        self._on_lost = on_lost
        self._epoch = 0
        self._senders: dict[int, UnixSender] = {}
        self._receiving: dict[int, UnixReceiver] = {}

    def take(self, end: socket.socket, parts: Sequence[Part]) -> None:
        """Use an end that the leader connected; a LINK message says of what."""
        epoch, kind, sender = unpack(parts[0].bytes, U64, "link", 3).tolist()
        peer = parts[1].bytes.decode()
        self._epoch = epoch
        if sender:

            def broken(how: str) -> None:
                self._on_lost(epoch, f"the {link_name(kind)} link to {peer} broke: {how}", peer)

            self._senders[kind] = UnixSender(end, epoch, kind, self._timeout_s, broken)
        else:
            receiver = UnixReceiver(end, epoch, kind)
            self._receiving[kind] = receiver
            self._inbox.add(receiver)

    def send(self, epoch: int, kind: int, step: int, data: memoryview) -> bool:
        """Send a tensor; False if that link is none of these."""
        sender = self._senders.get(kind)
        if sender is None or epoch != self._epoch:
            return False
        sender.send(step, data)
        return True

    def ended(self, epoch: int, kind: int) -> None:
        """The neighbour closed a link or is gone.

        It is no reason to end the lane here. Whoever closed it says why to the router, by its status or its end;
        if every stage that this reaches in turn blamed its neighbour, the router might hear the wrong one first.
        """
        if epoch == self._epoch and kind in self._receiving:
            receiver = self._receiving.pop(kind)
            self._inbox.remove(receiver)
            receiver.close()

    def close_senders(self, epoch: int) -> None:
        """The lane is over here. Receiving ends stay until a new epoch, lest the sender blames this stage."""
        if epoch == self._epoch:
            senders, self._senders = self._senders, {}
            for sender in senders.values():
                sender.close()

    def close(self) -> None:
        """Break off every link."""
        self.close_senders(self._epoch)
        receiving, self._receiving = self._receiving, {}
        for receiver in receiving.values():
            self._inbox.remove(receiver)
            receiver.close()
