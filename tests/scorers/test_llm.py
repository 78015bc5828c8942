"""Asking a language model: against a server in this process that says what the test wants."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from luthier.core.errors import ConfigError, DataError, ModelError
from luthier.engines.hf import Engine
from luthier.engines.rounds import Mismatch, Round
from luthier.engines.sampling import GenerateConfig
from luthier.scorers import _endpoint, llm
from luthier.scorers._spot import Request, Spot, Tools
from tests.conftest import build_model
from tests.scorers.chains import token

DRAFTS = ("x", "bx", "bcx", "y", "by", "bcy")


class Server(ThreadingHTTPServer):
    """Remembers what it was asked; `replies(body)` says (status, headers, body)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked, self.headers, self.paths = [], [], []
        self.replies = lambda body: said("7")
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that no longer waits is what one test is about."""


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.headers.append(dict(self.headers))
        self.server.paths.append(self.path)
        status, headers, answer = self.server.replies(body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def log_message(self, *args):
        pass


def said(content):
    return 200, {}, {"choices": [{"message": {"role": "assistant", "content": content}}]}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(_endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def tools(tokenizer, tmp_path):
    engine = Engine(build_model(), tokenizer)
    return Tools(engine, GenerateConfig(), (token(tokenizer, "<|im_end|>"),), 42, tmp_path)


def scorer(server, tools, **keys):
    config = llm.Config(**{"collect_llm_url": server.url, "collect_llm_model": "judge-1"} | keys)
    return llm.Llm(config, tools)


def spots(tools, drafts=DRAFTS):
    """The target's answer is abc7; each draft comes after a."""
    ids = [token(tools.engine.tokenizer, one) for one in "abc7"] + [tools.stop_ids[0]]
    request = Request(0, "What comes after a?", [1, 2], ids, None)
    found = []
    for text in drafts:
        draft = [token(tools.engine.tokenizer, one) for one in text]
        index = next(i for i, (d, a) in enumerate(zip(draft, ids[1:])) if d != a)
        found.append(Spot(request, Round(1, draft, [*ids[1:], 0], []), Mismatch(index, 1.0, 0.1, 2)))
    return found


def test_each_mismatch_is_asked_once_and_never_again(server, tools):
    server.replies = lambda body: said("10" if "[[x]]" in body["messages"][1]["content"] else "Score: 3/10")
    assert scorer(server, tools).score(spots(tools)) == [1, 1, 1, 0.3, 0.3, 0.3]
    assert len(server.asked) == 6 and set(server.paths) == {"/v1/chat/completions"}
    assert {body["model"] for body in server.asked} == {"judge-1"}
    again = scorer(server, tools)
    assert again.score(spots(tools)) == [1, 1, 1, 0.3, 0.3, 0.3] and len(server.asked) == 6
    assert scorer(server, tools, collect_llm_model="judge-2").score(spots(tools)[:1]) == [1] and len(server.asked) == 7


def test_the_question_shows_what_both_would_say(server, tools):
    scorer(server, tools, collect_llm_workers=1).score(spots(tools, ["bxa"]))
    (body,) = server.asked
    question = body["messages"][1]["content"]
    for part in ("What comes after a?", "so far\nab\n", "large model goes on with\nc7\n", "[[x]]a"):
        assert part in question, question
    assert "0 to 10" in body["messages"][0]["content"]


def test_of_later_mismatches_only_the_targets_token_is_shown(server, tools):
    (first,) = spots(tools, ["xya"])
    verifier = [token(tools.engine.tokenizer, one) for one in "bef"]
    later = Spot(first.request, Round(1, first.round.draft, verifier, []), Mismatch(1, 1.0, 0.1, 2))
    scorer(server, tools).score([later])
    assert "large model goes on with\ne\n" in server.asked[0]["messages"][1]["content"]


def test_the_key_comes_from_the_environment(server, tools, monkeypatch):
    scorer(server, tools).score(spots(tools)[:1])
    assert "Authorization" not in server.headers[0]
    monkeypatch.setenv("MY_KEY", "secret-1")
    scorer(server, tools, collect_llm_key_env="MY_KEY").score(spots(tools)[1:2])
    assert server.headers[1]["Authorization"] == "Bearer secret-1"
    assert not any("secret-1" in file.read_text() for file in tools.folder.iterdir())


def test_half_a_line_of_a_killed_run_is_forgotten(server, tools):
    scorer(server, tools).score(spots(tools)[:2])
    file = tools.folder / llm.MEMORY
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + second[:30])
    assert scorer(server, tools).score(spots(tools)[:2]) == [0.7, 0.7] and len(server.asked) == 3
    assert sorted(file.read_bytes().splitlines(keepends=True)) == sorted([first, second])
    file.write_text("[]\n")
    with pytest.raises(DataError, match="line 1"):
        scorer(server, tools)


def test_an_answer_that_is_no_score_is_asked_for_again_and_then_left_out(server, tools, caplog):
    replies = iter(["well", "it depends", "8", "no", "nope", "never", "2"])
    server.replies = lambda body: said(next(replies))
    first, second, third = scorer(server, tools, collect_llm_workers=1).score(spots(tools)[:3])
    assert first == 0.8 and math.isnan(second) and third == 0.2
    assert "'never'" in caplog.text
    server.replies = lambda body: said("4")  # what was no answer is not remembered
    assert scorer(server, tools).score(spots(tools)[:3]) == [0.8, 0.4, 0.2]


def test_a_model_that_never_gives_a_score_stops_the_run(server, tools):
    server.replies = lambda body: said("I cannot judge")
    with pytest.raises(ModelError, match="judge-1 gave no number.*5 mismatches in a row.*I cannot judge"):
        scorer(server, tools).score(spots(tools))


def test_a_busy_server_is_asked_again(server, tools, caplog):
    replies = iter([(429, {"Retry-After": "0"}, b"slow down"), (503, {}, b"loading"), said("6")])
    server.replies = lambda body: next(replies)
    assert scorer(server, tools).score(spots(tools)[:1]) == [0.6]
    assert "HTTP 429: slow down; asked again in 0.0 s" in caplog.text
    assert "HTTP 503: loading; asked again in 0.0 s" in caplog.text


def test_waits_double_and_the_servers_word_goes_first(server, tools, monkeypatch):
    waits = []
    monkeypatch.setattr(_endpoint, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(_endpoint, "time", SimpleNamespace(sleep=waits.append))
    replies = iter([(500, {}, b"")] * 3 + [(429, {"Retry-After": "7"}, b""), (429, {"Retry-After": "999"}, b"")])
    server.replies = lambda body: next(replies, said("6"))
    assert scorer(server, tools).score(spots(tools)[:1]) == [0.6]
    assert waits == [1.0, 2.0, 4.0, 7.0, 60.0]


def test_a_refusal_is_not_asked_again(server, tools):
    server.replies = lambda body: (401, {}, b'{"error": "bad key"}')
    with pytest.raises(ModelError, match="401.*bad key.*API key"):
        scorer(server, tools, collect_llm_workers=1).score(spots(tools)[:1])
    assert len(server.asked) == 1


def test_what_is_asked_goes_nowhere_else(server, tools):
    server.replies = lambda body: (302, {"Location": f"{server.url}/elsewhere"}, b"")
    with pytest.raises(ModelError, match="302"):
        scorer(server, tools, collect_llm_workers=1).score(spots(tools)[:1])
    assert server.paths == ["/v1/chat/completions"]


@pytest.mark.parametrize("answer", [b"<html>hello</html>", {"choices": []}, {"detail": "not found"}])
def test_another_kind_of_server_is_named(server, tools, answer):
    server.replies = lambda body: (200, {}, answer)
    with pytest.raises(ModelError, match=r"OpenAI-compatible.*choices\[0\]"):
        scorer(server, tools, collect_llm_workers=1).score(spots(tools)[:1])


def test_nobody_at_the_address(server, tools):
    gone = Server()
    gone.server_close()
    with pytest.raises(ModelError, match=f"{gone.url}/chat/completions gave no answer in 3 tries.*refused"):
        scorer(gone, tools, collect_llm_retries=2).score(spots(tools)[:1])
    with pytest.raises(ModelError, match="no answer in 1 tries"):
        scorer(gone, tools, collect_llm_retries=0).score(spots(tools))


def test_a_server_that_does_not_answer_in_time(server, tools):
    wait = threading.Event()
    server.replies = lambda body: wait.wait(5) and said("7")
    with pytest.raises(ModelError, match="no answer in 1 tries.*timed out"):
        scorer(server, tools, collect_llm_timeout=0.1, collect_llm_retries=0).score(spots(tools)[:1])
    wait.set()


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        *(("7", 0.7), (" 10\n", 1.0), ("0", 0.0), ("Score: 4.", 0.4), ("7/10", 0.7), ("10/10", 1.0)),
        *(("8 out of 10", 0.8), ("**9**", 0.9)),
        *((text, None) for text in ("", "11", "-3", "3.5", "between 3 and 5", "fine", "7/100")),
    ],
)
def test_the_number_in_a_reply(reply, score):
    found = llm.read_score(reply)
    assert math.isnan(found) if score is None else found == score


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"collect_llm_url": ""}, "collect_llm_url is not set"),
        ({"collect_llm_model": ""}, "collect_llm_model is not set"),
        ({"collect_llm_url": "localhost:8000"}, "collect_llm_url: 'localhost:8000' is no address"),
        ({"collect_llm_url": "file:///etc/hosts"}, "no address"),
        ({"collect_llm_workers": 0}, "collect_llm_workers: 0"),
        ({"collect_llm_timeout": 0.0}, "collect_llm_timeout: 0"),
        ({"collect_llm_retries": -1}, "collect_llm_retries: -1"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys, words):
    with pytest.raises(ConfigError, match=words):
        llm.Config(**{"collect_llm_url": "http://localhost:8000/v1", "collect_llm_model": "m"} | keys)
