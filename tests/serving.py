"""A server of the demo in this process, on a socket of its own."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from mlx_gemma4.serve.app import App
from mlx_gemma4.serve.command import Server, listening
from mlx_gemma4.serve.guard import Guard
from mlx_gemma4.serve.resident import Resident, Settings

OPEN = Guard()


class Running:
    def __init__(self, app: App, url: str):
        self.app, self.resident, self.url = app, app.resident, url


@contextmanager
def served(settings: Settings, guard: Guard = OPEN) -> Iterator[Running]:
    resident = Resident(settings)
    app = App(resident, guard)
    with listening("127.0.0.1", 0) as listener:
        server = Server(app)
        loop = asyncio.new_event_loop()

        def run() -> None:
            loop.run_until_complete(server.serve([listener]))
            loop.run_until_complete(asyncio.sleep(0.01))  # connections that were just closed are let go
            loop.close()

        thread = Thread(target=run)
        thread.start()
        try:
            yield Running(app, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            loop.call_soon_threadsafe(server.stop.set)
            thread.join()
            resident.close()
