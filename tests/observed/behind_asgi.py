"""The ASGI application of the news example, within a wrapper that the library does not know."""

from news_api.asgi import application as inner


async def application(scope, receive, send):
    async def passed_on(message):
        await send(message)

    await inner(scope, receive, passed_on)
