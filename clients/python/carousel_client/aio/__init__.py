"""The asyncio client: `carousel_client` with `async with` and `async for`."""

from carousel_client.aio.client import Client, Session, connect

__all__ = ["Client", "Session", "connect"]
