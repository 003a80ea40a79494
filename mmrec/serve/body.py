"""Bodies of requests: of one media type, bounded in size and time, gzip or not."""

from __future__ import annotations

import asyncio
import zlib

from starlette.requests import Request

from mmrec.serve.protocol import ApiError

BODY_SECONDS = 30.0
"""A request that takes longer to arrive is given up."""
GZIP = 16 + zlib.MAX_WBITS


async def read_body(request: Request, kind: str, most: int) -> bytes:
    """Return the body of a request, at most ``most`` bytes of the media type ``kind``, decompressed.

    A form of another site can send neither JSON nor binary data without the browser asking us first.

    Raises:
        ApiError: it is of another type or encoding, too long, damaged, or does not arrive.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != kind:
        raise ApiError(415, f"the content type is {given[:80]!a}; it must be {kind}")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise ApiError(415, f"the content encoding is {encoding[:80]!a}; it must be gzip or none")
    unpack = zlib.decompressobj(GZIP) if encoding != "identity" else None
    too_long = ApiError(413, f"the request has more than {most:,} bytes")
    if int(request.headers.get("content-length", "0")) > most:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += unpack.decompress(part, most + 1 - len(body)) if unpack else part
                if len(body) > most:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {BODY_SECONDS:.0f} seconds") from None
    except zlib.error:
        raise ApiError(400, "the body is not gzip, as its content encoding says") from None
    if unpack and (not unpack.eof or unpack.unused_data):
        raise ApiError(400, "the body is not one whole gzip stream, as its content encoding says")
    return bytes(body)
