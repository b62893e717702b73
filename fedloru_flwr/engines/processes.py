"""The in-process engine on several processes: workers that train their share of a round's clients as this one does.

A worker is a Python process of its own with the same client app and the same store; orders and replies go through a
socket as packets. Shares of clients are handed to whoever is free. They are the same for any number of processes, and
so is the result, bit for bit. What a worker leaves behind that dies is trained here.
"""

import contextlib
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import Message

from fedloru_flwr.engines.in_process import InProcessGrid, Request, answers, client_context, handle, shares
from fedloru_flwr.engines.workers import Worker, Workers, dumps
from fedloru_flwr.packets import Packet, pack_orders, pack_replies, unpack_orders, unpack_replies

_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class _Start:
    """What a worker has to know before its first share."""

    num_supernodes: int
    run_config: Mapping[str, Any]
    environment: Mapping[str, str]


class ProcessGrid(InProcessGrid):
    """An `InProcessGrid` whose clients are trained by this process and by workers.

    Args:
        workers: see `Workers`; they run this package's client app.
        num_supernodes: number of clients.
        run_config: for every context.
        at_once: how many clients are trained as one batch at most.
        environment: variables for the workers.
    """

    def __init__(
        self,
        workers: Workers,
        num_supernodes: int,
        run_config: Mapping[str, bool | int | float | str],
        at_once: int,
        environment: Mapping[str, str],
    ) -> None:
        from fedloru_flwr.client_app import app, train_or_evaluate_together

        super().__init__(app, num_supernodes, run_config, together=train_or_evaluate_together, at_once=at_once)
        self._workers = list(workers.members)
        for worker in self._workers:
            worker.send(_Start(num_supernodes, dict(run_config), dict(environment)))

    def _answers(self, requests: Sequence[Request]) -> Iterator[Message]:
        parts = [requests[part] for part in shares(len(requests), self.at_once)]
        if len(parts) < 2 or not self._workers:
            return super()._answers(requests)
        return _Round(parts, self).replies()


class _Round:
    """The shares of one phase of a round, and who trains them."""

    def __init__(self, parts: list[Sequence[Request]], grid: ProcessGrid) -> None:
        self._grid = grid
        self._parts = parts
        self._waiting = deque(range(len(parts)))
        self._done: dict[int, list[Message] | Exception] = {}
        self._change = threading.Condition()

    def replies(self) -> Iterator[Message]:
        """The replies to all shares, in order, each share's as soon as it is done: others train while they are read."""
        first = self._waiting.popleft()  # by whom the replies are wanted, so that they are there early
        threads = [
            threading.Thread(target=self._hand_out, args=(worker,), daemon=True)
            for worker in list(self._grid._workers)  # a dead one is removed meanwhile
        ]
        for thread in threads:
            thread.start()
        try:
            self._train(first)
            for index in range(len(self._parts)):
                self._work_until(index)
                result = self._done.pop(index)
                if isinstance(result, Exception):
                    raise result
                yield from result
        finally:
            with self._change:
                self._waiting.clear()
            for thread in threads:  # a share that is under way is not mistaken for one of the next round
                thread.join()

    def _work_until(self, index: int) -> None:
        """Train what nobody else has taken, until this share is done."""
        while True:
            with self._change:
                while not self._waiting and index not in self._done:
                    self._change.wait()
                if index in self._done:
                    return
                taken = self._waiting.popleft()
            self._train(taken)

    def _train(self, index: int) -> None:
        """Train a share in this process."""
        self._note(index, list(self._grid._answer_share(self._parts[index])))

    def _hand_out(self, worker: Worker) -> None:
        """Let a worker train shares until there are no more."""
        while True:
            with self._change:
                if not self._waiting:
                    return
                index = self._waiting.popleft()
            messages = [message for message, _ in self._parts[index]]
            try:
                worker.send(pack_orders(messages))
                packet = worker.receive()
            except EOFError:
                if not worker.is_stopped:
                    self._bury(worker, index)
                return
            except Exception as error:  # goes to the thread that waits for this share
                self._note(index, error)
                continue
            try:
                self._note(index, packet if isinstance(packet, Exception) else unpack_replies(packet, messages))
            except Exception as error:
                self._note(index, error)

    def _bury(self, worker: Worker, index: int) -> None:
        """Go on without a worker that has died."""
        worker.stop()
        status = worker.process.returncode
        why = ", most likely for want of memory" if status == -signal.SIGKILL else ""
        _log.warning(
            "a worker process has ended with status %s%s: its clients are trained in this process", status, why
        )
        with self._change:
            self._grid._workers.remove(worker)
            self._waiting.appendleft(index)
            self._change.notify_all()

    def _note(self, index: int, replies: list[Message] | Exception) -> None:
        with self._change:
            self._done[index] = replies
            self._change.notify_all()


def _serve(connection: Connection) -> None:
    """A worker's life: train one share after the other until the other side is gone."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    import fedloru_flwr.client_app  # noqa: F401  # while the other side prepares the run

    start: _Start = pickle.loads(connection.recv_bytes())
    os.environ.update(start.environment)
    while True:
        orders = pickle.loads(connection.recv_bytes())
        try:
            answer: object = _answer(orders, start)
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        connection.send_bytes(dumps(answer))


def _answer(orders: Packet, start: _Start) -> Packet:
    from fedloru_flwr.client_app import app, train_or_evaluate_together

    (messages,) = unpack_orders(orders)
    requests = [
        (message, client_context(message.metadata.dst_node_id, start.num_supernodes, start.run_config))
        for message in messages
    ]
    return pack_replies(list(answers(partial(handle, app), requests, train_or_evaluate_together)))


def _end_with_parent(parent: int) -> None:
    """Whoever is left behind in the middle of a share must not write clients' state any more."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


if __name__ == "__main__":
    with contextlib.suppress(EOFError):
        _serve(Connection(int(sys.argv[1])))
