"""The web application: OpenAI's interface for text over an engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from recyc_jax.serve.asked import Asked, Reader, RefusedError
from recyc_jax.serve.engine import Engine, FullError, StoppingError
from recyc_jax.serve.jobs import Delta, Event, Failed, Job, Token
from recyc_jax.serve.metrics import Metrics

GONE = 499
"""The status that is noted for a client that left before its answer."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the application grants a client."""

    api_key: str | None = None
    most_bytes: int = 8 * 2**20  # of a request's body
    most_jobs: int = 64  # prompts of a request
    seconds: float = 600.0  # for a request, waiting included
    hosts: tuple[str, ...] | None = None  # the names that requests may call the server by; None: any


class App:
    """The routes of one server."""

    def __init__(self, engine: Engine, reader: Reader, tokenizer: Any, metrics: Metrics, rules: Rules) -> None:
        self._engine, self._reader, self._tokenizer = engine, reader, tokenizer
        self._metrics, self._rules, self._began = metrics, rules, int(time.time())
        self._understanding = asyncio.Semaphore(2)
        metrics.follow(engine)

    def routes(self) -> Starlette:
        """The application."""
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._guarded(self._figures)),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/models/{name:path}", self._guarded(self._models)),
                Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
                Route("/v1/chat/completions", self._guarded(self._completions), methods=["POST"]),
            ],
            exception_handlers={HTTPException: self._http_error, Exception: self._failure},
        )

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": self._engine.waiting, "running": self._engine.running})

    async def _figures(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        model = {"id": self._reader.name, "object": "model", "created": self._began, "owned_by": "recyc_jax"}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name != self._reader.name:
            raise RefusedError(f"the model {name!r} is not here", "model", 404, "model_not_found")
        return JSONResponse(model)

    # --- requests

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The handler behind the API key, with refusals as OpenAI's errors; requests are counted."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_host(request)
                self._check_key(request)
                response = await handler(request)
            except RefusedError as error:
                response = _error(error.status, str(error), error.param, error.code)
            except FullError as error:
                response = _error(429, f"{error}: try again later", code="queue_full", retry_after=5)
            except StoppingError as error:
                response = _error(503, str(error), code="stopping", retry_after=30)
            except ClientDisconnect:
                response = Response(status_code=GONE)
            path = getattr(request.scope.get("route"), "path", "")
            self._metrics.requests.labels(path, str(response.status_code)).inc()
            return response

        return guarded

    def _check_host(self, request: Request) -> None:
        """A web page can have its own name lead to this machine, and would then ask as if it were at home here."""
        try:
            name = urlsplit(f"//{request.headers.get('host', '')}").hostname
        except ValueError:
            name = None
        if self._rules.hosts is not None and name not in self._rules.hosts:
            raise RefusedError(f"ask for http://{self._rules.hosts[0]}, not for {name!r}", status=403)

    def _check_key(self, request: Request) -> None:
        if self._rules.api_key is None:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._rules.api_key.encode()):
            message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            raise RefusedError(message, status=401, code="invalid_api_key")

    async def _http_error(self, request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        known = "there is /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics"
        hint = {404: f"{request.url.path} is not here; {known}", 405: f"{request.method} is not for this path; {known}"}
        return _error(status, hint.get(status, getattr(error, "detail", "")))

    async def _failure(self, request: Request, error: Exception) -> Response:
        return _error(500, f"the server failed: {type(error).__name__}")

    async def _body(self, request: Request) -> bytes:
        """The body of a request. A browser sends JSON to another site only if that site agrees, which this one never does:
        hence no other type is taken."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedError("send JSON, with the header Content-Type: application/json", status=415)
        body, most = bytearray(), self._rules.most_bytes
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise RefusedError(f"the body is larger than {most} bytes", status=413)
        return bytes(body)

    async def _completions(self, request: Request) -> Response:
        """/v1/completions and /v1/chat/completions."""
        began = time.monotonic()
        is_chat = request.url.path.endswith("/chat/completions")
        understand = self._reader.chat if is_chat else self._reader.completion
        try:
            async with asyncio.timeout(self._rules.seconds):
                body = await self._body(request)
        except TimeoutError:
            raise RefusedError("the request's body did not come in time", status=408) from None
        if self._engine.is_full:  # before the work of reading the prompt
            raise FullError("as many requests wait as may")
        async with self._understanding:  # few at a time: long texts take memory before their tokens are counted
            asked = await run_in_threadpool(understand, body)
        del body
        if len(asked.jobs) > self._rules.most_jobs:
            raise RefusedError(f"a request may have {self._rules.most_jobs} prompts here", "prompt")
        answers = _Answers(asked, is_chat, self._reader.name, self._tokenizer)
        inbox = _Inbox(asked.jobs, began + self._rules.seconds, self._metrics)
        self._engine.submit(asked.jobs)
        if asked.is_streamed:
            events = self._streamed(inbox, answers)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        return await self._whole(request, inbox, answers)

    async def _whole(self, request: Request, inbox: _Inbox, answers: _Answers) -> Response:
        """The response once all is there; the jobs are cancelled if the client leaves before."""

        async def collected() -> Response:
            async for number, event in inbox:
                if isinstance(event, Failed):
                    return _error(event.status, event.message)
                answers.add(number, event)
            return JSONResponse(answers.whole())

        async def left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(collected()), asyncio.create_task(left())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return tasks[0].result() if tasks[0].done() else Response(status_code=GONE)
        finally:
            inbox.cancel()
            for task in tasks:
                task.cancel()

    async def _streamed(self, inbox: _Inbox, answers: _Answers) -> AsyncIterator[str]:
        """Server-sent events."""
        try:
            for chunk in answers.opening():
                yield _event(chunk)
            async for number, event in inbox:
                if isinstance(event, Failed):
                    yield _event({"error": {"message": event.message, "type": "server_error", "code": event.status}})
                    return
                for chunk in answers.add(number, event):
                    yield _event(chunk)
            if answers.asked.with_usage:
                yield _event(answers.closing())
            yield "data: [DONE]\n\n"
        finally:
            inbox.cancel()


class _Inbox:
    """The events of several jobs as they come, with the number of the job, until all have ended. An event that does not
    come in time is a failure."""

    def __init__(self, jobs: list[Job], deadline: float, metrics: Metrics) -> None:
        self._jobs, self._deadline, self._metrics = jobs, deadline, metrics
        self._began, self._is_first = time.monotonic(), True
        self._left, self._queue = len(jobs), asyncio.Queue[tuple[int, Event]]()
        loop = asyncio.get_running_loop()
        for number, job in enumerate(jobs):
            job.emit = self._sender(loop, number)

    def _sender(self, loop: asyncio.AbstractEventLoop, number: int) -> Callable[[Event], None]:
        def send(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(self._queue.put_nowait, (number, event))

        return send

    def __aiter__(self) -> _Inbox:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        if not self._left:
            self._metrics.whole.observe(time.monotonic() - self._began)
            raise StopAsyncIteration
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                number, event = await self._queue.get()
        except TimeoutError:
            self.cancel()
            self._left = 0
            return 0, Failed("the answer was not ready in time: ask for fewer tokens, or try again later", 504)
        if self._is_first:
            self._metrics.first.observe(time.monotonic() - self._began)
            self._is_first = False
        self._left -= not isinstance(event, Delta)
        return number, event

    def cancel(self) -> None:
        """Nobody waits any more."""
        for job in self._jobs:
            job.cancel()


class _Answers:
    """The answers to one request in OpenAI's form, as chunks of a stream and as a whole."""

    def __init__(self, asked: Asked, is_chat: bool, model: str, tokenizer: Any) -> None:
        self.asked, self._is_chat, self._tokenizer = asked, is_chat, tokenizer
        kind = "chat.completion" if is_chat else "text_completion"
        self._id, self._kind, self._model = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}", kind, model
        self._created = int(time.time())
        self._anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])[-1:]
        self._texts, self._reasons = [""] * len(asked.jobs), [""] * len(asked.jobs)
        self._tokens: list[list[Token]] = [[] for _ in asked.jobs]
        self._offsets = [0] * len(asked.jobs)  # where the next token's text begins in that of all tokens

    def add(self, number: int, event: Event) -> list[dict[str, Any]]:
        """Take an event of a job; the chunks that it makes."""
        if isinstance(event, Delta):
            offset = self._offsets[number]
            if self._scored(number):
                self._offsets[number] += sum(len(self._spelled(token.id)) for token in event.tokens)
            self._texts[number] += event.text
            self._tokens[number] += event.tokens
            is_said = bool(event.text) or self._scored(number)
            return [self._chunk([self._choice(number, event.text, event.tokens, offset, None)])] if is_said else []
        assert not isinstance(event, Failed)
        self._reasons[number] = event.reason
        return [self._chunk([self._choice(number, "", [], 0, event.reason)])]

    def _scored(self, number: int) -> bool:
        return self.asked.jobs[number].top is not None

    def opening(self) -> list[dict[str, Any]]:
        """The first chunks of a stream."""
        if not self._is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])]

    def closing(self) -> dict[str, Any]:
        """The chunk that tells the usage."""
        return self._chunk([]) | {"usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        """The response with all answers."""
        choices = []
        for number, text in enumerate(self._texts):
            choice = self._choice(number, text, self._tokens[number], 0, self._reasons[number])
            if self._is_chat:
                del choice["delta"]
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            choices.append(choice)
        return self._head(self._kind) | {"choices": choices, "usage": self._usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._is_chat else self._kind
        return self._head(kind) | {"choices": choices}

    def _choice(self, number: int, text: str, tokens: list[Token], offset: int, reason: str | None) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": {"content": text} if text else {}} if self._is_chat else {"text": text}
        top = self.asked.jobs[number].top
        scores = None
        if top is not None and tokens:
            scores = self._chat_scores(tokens) if self._is_chat else self._text_scores(tokens, offset, top)
        return {"index": number, **said, "logprobs": scores, "finish_reason": reason}

    def _spelled(self, token: int) -> str:
        """The text of a token behind another one: at a text's beginning some tokenizers drop its space."""
        before = self._tokenizer.decode(self._anchor)
        text = self._tokenizer.decode([*self._anchor, token])
        return text[len(before) :] if text.startswith(before) else self._tokenizer.decode([token])

    def _chat_scores(self, tokens: list[Token]) -> dict[str, Any]:
        def one(token: int, log_probability: float) -> dict[str, Any]:
            text = self._spelled(token)
            whole = None if "\ufffd" in text else list(text.encode())  # a part of a character has no text
            return {"token": text, "logprob": log_probability, "bytes": whole}

        listed = []
        for token in tokens:
            assert token.log_probability is not None
            top = [one(*best) for best in token.top]
            listed.append(one(token.id, token.log_probability) | {"top_logprobs": top})
        return {"content": listed, "refusal": None}

    def _text_scores(self, tokens: list[Token], offset: int, top: int) -> dict[str, Any]:
        texts, offsets = [self._spelled(token.id) for token in tokens], []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        best = None
        if top:
            best = []
            for token in tokens:
                its: dict[str, float | None] = {}
                for id, score in (
                    *token.top,
                    (token.id, token.log_probability),
                ):  # the likeliest of those spelled alike
                    its.setdefault(self._spelled(id), score)
                best.append(its)
        return {
            "tokens": texts,
            "token_logprobs": [token.log_probability for token in tokens],
            "top_logprobs": best,
            "text_offset": offsets,
        }

    def _usage(self) -> dict[str, Any]:
        jobs = self.asked.jobs
        read, made = sum(len(job.ids) for job in jobs), sum(job.made for job in jobs)
        cached = {"cached_tokens": sum(job.cached for job in jobs)}
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": cached,
        }


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def _error(
    status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None
) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)
