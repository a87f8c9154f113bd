"""A connection of uvicorn's that does not wait for ever for what a request begins with."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 20  # seconds from a request's first byte, or a connection's beginning, to the end of its headers


class Connection(H11Protocol):
    """uvicorn closes one that is idle behind a reply, but not one that sends a request line a byte a minute."""

    late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.late = self.loop.call_later(PATIENCE, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self.in_time()
        elif self.late is None:  # a next request of this connection has begun
            self.late = self.loop.call_later(PATIENCE, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self.in_time()
        super().connection_lost(exc)

    def in_time(self) -> None:
        if self.late is not None:
            self.late.cancel()
            self.late = None
