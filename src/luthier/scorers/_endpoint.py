"""An OpenAI-compatible chat endpoint: one question, one answer, with patience and a memory on disk."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import Any

from luthier.core.errors import DataError, ModelError
from luthier.core.log import get_logger

log = get_logger("scorers")

FIRST_WAIT = 1.0
"""Seconds before a question is asked again; doubled each time."""
LONGEST_WAIT = 60.0
BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""HTTP codes of a server that may answer later."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """What is asked, and the key, go to the address that the user named and to no other."""

    def redirect_request(self, *args: Any, **keys: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Stay)


@dataclass(frozen=True)
class _Busy:
    """No answer this time."""

    why: str
    wait: float | None = None
    """Seconds after which the server wants to be asked again, if it said so."""


@dataclass(frozen=True)
class Endpoint:
    """Where questions go. Nothing is sent to anywhere else."""

    url: str
    """The base URL, such as http://localhost:8000/v1."""
    model: str
    key: str | None
    """Sent as bearer token if there is one."""
    timeout: float
    retries: int

    def ask(self, body: dict[str, Any]) -> str:
        """The text of the answer to a chat completion request. Raises ModelError when there is none to be had."""
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        if self.key:
            request.add_header("Authorization", f"Bearer {self.key}")
        for tries in range(self.retries + 1):
            answer = self._once(request)
            if isinstance(answer, bytes):
                return self._content(answer)
            if tries < self.retries:
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2**tries if answer.wait is None else answer.wait)
                log.warning("%s: %s; asked again in %.1f s.", request.full_url, answer.why, wait)
                time.sleep(wait)
        raise ModelError(
            f"collect_llm_url: {request.full_url} gave no answer in {self.retries + 1} tries ({answer.why}). See that "
            "the server runs; the same command then goes on where this one stopped."
        )

    def _once(self, request: urllib.request.Request) -> bytes | _Busy:
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            why = f"HTTP {error.code}: {_excerpt(error.read())}"
            if error.code in BUSY:
                return _Busy(why, _retry_after(error.headers))
            raise ModelError(
                f"collect_llm_url: {request.full_url} refused the request ({why}). Check the address, "
                f"collect_llm_model ({self.model}) and the API key."
            ) from None
        except urllib.error.URLError as error:
            return _Busy(str(error.reason))
        except (OSError, HTTPException) as error:  # the connection broke, or an answer took too long
            return _Busy(f"{type(error).__name__}: {error}")

    def _content(self, answer: bytes) -> str:
        try:
            content = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise ModelError(
                f"collect_llm_url: {self.url} does not speak as an OpenAI-compatible server does: {_excerpt(answer)}. "
                "Expected choices[0].message.content. The URL usually ends in /v1."
            ) from None
        return content or ""


class Memory:
    """Answers by the hash of what was asked, one JSON line each. Threads may share it."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        if path.exists():
            self._read()

    def get(self, key: str) -> str | None:
        """What was answered, if it is known."""
        return self._known.get(key)

    def put(self, key: str, reply: str) -> None:
        """Remember an answer; it is on disk when this returns."""
        with self._lock:
            self._known[key] = reply
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def _read(self) -> None:
        with self.path.open("rb+") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n"):  # a killed run left half a line
                    os.truncate(self.path, file.tell() - len(text))
                    return
                try:
                    line = json.loads(text)
                    self._known[line["key"]] = line["reply"]
                except (ValueError, LookupError, TypeError) as error:
                    what = f"{self.path}, line {number}: no remembered answer ({error!r}). Remove the file."
                    raise DataError(what) from None


def fingerprint(url: str, body: dict[str, Any]) -> str:
    """The hash of a request."""
    return hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()


def _retry_after(headers: Message) -> float | None:
    """Seconds that the server asks to wait, if it says so in seconds."""
    said = headers.get("Retry-After", "")
    return float(said) if said.isdigit() else None


def _excerpt(answer: bytes) -> str:
    text = " ".join(answer.decode("utf-8", errors="replace").split())
    return text if len(text) <= 200 else f"{text[:200]}..."
