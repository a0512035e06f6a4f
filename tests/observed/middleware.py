"""Who answered: each response names its process."""

import os
from collections.abc import Awaitable, Callable

from asgiref.sync import iscoroutinefunction
from django.http import HttpRequest, HttpResponseBase
from django.utils.decorators import sync_and_async_middleware

GetResponse = Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]


# Of both kinds, so that it costs no thread under ASGI.
@sync_and_async_middleware
def worker(get_response: GetResponse) -> GetResponse:
    """Put the process id into X-Worker."""

    def name(response: HttpResponseBase) -> HttpResponseBase:
        response["X-Worker"] = str(os.getpid())
        return response

    if iscoroutinefunction(get_response):

        async def respond(request: HttpRequest) -> HttpResponseBase:
            return name(await get_response(request))

        return respond
    return lambda request: name(get_response(request))
