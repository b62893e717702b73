"""Flower mods for apps that use `LowRankSession`."""

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from fedloru_flwr.clients.memory import explained
from fedloru_flwr.clients.session import SessionAnswer


def session_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Send a session's answers as ordinary replies, and say what to do where memory does not suffice.

    Without it the answers leave as exceptions, which works as well but puts a traceback into the log each time. It goes
    first: ``@app.train(mods=[session_mod, ...])``.
    """
    try:
        with explained():
            return call_next(message, context)
    except SessionAnswer as answer:
        return answer.message
