"""A thread that works for an event loop: orders one way, answers the other, and the end of both.

The loop puts orders into a queue and awaits a future for each; the thread hands all answers it has
over in one wake-up of the loop. A thread that ends, in whatever way, leaves no future unanswered.
Knows no jobs and no device.
"""

import asyncio
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

from petals.errors import PeerFailed, PetalsError, SessionClosed
from petals.logs import get_logger

logger = get_logger(__name__)
T = TypeVar("T")
Order = Callable[[], None]
Answer = tuple["asyncio.Future[Any]", Any, Exception | None]

JOIN_SECONDS = 9.0
"""Longest wait at the end for the batch or call that is running; then the thread is abandoned."""


class ComputeThread(ABC):
    """Works for the event loop that entered it (an async context manager).

    ``on_failure`` is called on the event loop if the thread ends by an error; every caller then
    gets PeerFailed, those that wait as well as those that come later. After a regular end they get
    SessionClosed.
    """

    def __init__(self, on_failure: Callable[[], None] = lambda: None) -> None:
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._answers: list[Answer] = []
        self._thread = threading.Thread(target=self._work, name="petals-compute", daemon=True)
        self._unanswered: set[asyncio.Future[Any]] = set()
        self._refusal: Callable[[], PetalsError] | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._refusal = self._refusal or _stopping
        self._inbox.put(None)
        try:
            await asyncio.to_thread(self._thread.join, JOIN_SECONDS)
        finally:
            self._refuse_all(_stopping)

    async def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the thread, between batches; return or raise what it does."""
        result: T = await self._ask(
            lambda future: self._answers.append((future, *attempt(function)))
        )
        return result

    def post(self, function: Callable[[], object]) -> None:
        """``call`` for callers that do not wait; an error is logged."""
        self._inbox.put(lambda: log_failure(attempt(function)[1]))

    async def _ask(self, order: "Callable[[asyncio.Future[Any]], None]") -> Any:
        """Let the thread do ``order``, which sees to it that the future is answered."""
        if self._refusal is not None:
            raise self._refusal()
        future = self._loop.create_future()
        self._unanswered.add(future)
        self._inbox.put(lambda: order(future))
        try:
            return await future
        finally:
            self._unanswered.discard(future)

    def _refuse_all(self, refusal: Callable[[], PetalsError]) -> None:
        """Answer everything that waits, and everything that comes later, with this error.

        Runs on the event loop, which alone makes futures and puts orders into the inbox: so an
        order that the thread had not seen when it ended cannot be overlooked.
        """
        self._refusal = refusal
        for future in self._unanswered:
            if not future.done():
                future.set_exception(refusal())

    def _failed(self) -> None:
        self._refuse_all(_thread_has_failed)
        self._on_failure()

    # On the thread from here on.

    @abstractmethod
    def _serve(self) -> None:
        """Do orders until ``None`` comes. An error of it ends the thread."""

    def _work(self) -> None:
        error, is_regular_end = None, False
        try:
            error = attempt(self._serve)[1]
            is_regular_end = error is None
        finally:
            # Also after SystemExit, which the code of a model may raise.
            if not is_regular_end:
                logger.critical("The compute thread has failed.", exc_info=error or True)
                if not self._loop.is_closed():
                    self._loop.call_soon_threadsafe(self._failed)

    def _deliver_answers(self) -> None:
        if self._answers:
            answers, self._answers = self._answers, []
            self._loop.call_soon_threadsafe(_deliver, answers)


def attempt(function: Callable[[], T]) -> tuple[Any, Exception | None]:
    """(result, None) or (None, error): an error belongs to its caller, the thread lives on."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def log_failure(error: Exception | None) -> None:
    """Log an error that no caller waits for."""
    if error is not None:
        logger.error("Housekeeping on the compute thread failed.", exc_info=error)


def _deliver(answers: Sequence[Answer]) -> None:
    for future, value, error in answers:
        if future.done():
            continue
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)


def _stopping() -> PetalsError:
    return SessionClosed("The server is stopping.", hint="Ask another server.")


def _thread_has_failed() -> PetalsError:
    return PeerFailed(
        "The server's compute thread has failed; it can compute no more.",
        hint="Use another server. Its operator finds the reason in the server's log.",
    )
