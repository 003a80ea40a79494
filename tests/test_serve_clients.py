"""Programs that people have: OpenAI's client, LangChain, LiteLLM, curl, and nginx in front."""

from __future__ import annotations

import importlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import KEY, Client, make_service, running

from mmrec.checkpoints.loading import LoadedModel
from mmrec.serve.authentication import Access
from mmrec.serve.limits import Limits

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::pydantic.warnings.PydanticDeprecatedSince20", "ignore::ResourceWarning"
)
MESSAGES = [{"role": "user", "content": "to be or not"}]


def optional(name: str) -> Any:
    """Return the module ``name``; the test is skipped where it is not installed."""
    pytest.importorskip(name)
    return importlib.import_module(name)


@pytest.fixture
def server(small_model: LoadedModel, memories: Path) -> Iterator[Client]:
    """A server with a key and the limits of the command."""
    with running(make_service(small_model, memories, Limits()), Access(KEY)) as client:
        yield client


@pytest.fixture
def url(server: Client) -> str:
    return f"http://127.0.0.1:{server.port}/v1"


def complete(server: Client, **asked: Any) -> str:
    answer = server.good("POST", "/v1/completions", asked, authorization=f"Bearer {KEY}")
    return str(answer["choices"][0]["text"])


def chat(server: Client, **asked: Any) -> str:
    answer = server.good(
        "POST", "/v1/chat/completions", {"messages": MESSAGES, **asked}, authorization=f"Bearer {KEY}"
    )
    return str(answer["choices"][0]["message"]["content"])


def test_openai_s_client(server: Client, url: str) -> None:
    openai = optional("openai")
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["a"]
        assert client.models.retrieve("a").id == "a"
        seed = next(seed for seed in range(50) if len(chat(server, max_tokens=20, seed=seed)) > 3)
        asked = {"model": "a", "max_tokens": 20, "seed": seed}
        expected = complete(server, prompt="to be", max_tokens=20, seed=seed)
        assert client.completions.create(prompt="to be", **asked).choices[0].text == expected
        stream = client.completions.create(prompt="to be", stream=True, **asked)
        assert "".join(chunk.choices[0].text for chunk in stream) == expected
        scored = client.completions.create(model="a", prompt="to be", echo=True, logprobs=1, max_tokens=0)
        assert scored.choices[0].logprobs.tokens == list("to be")
        said = chat(server, max_tokens=20, seed=seed)
        answer = client.chat.completions.create(messages=MESSAGES, **asked)
        assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", said)
        options = {"include_usage": True}
        chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, stream_options=options, **asked))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == said
        assert chunks[-1].usage == answer.usage
        logprobs = {"logprobs": True, "top_logprobs": 2}
        rows = client.chat.completions.create(messages=MESSAGES, **logprobs, **asked).choices[0].logprobs.content
        assert b"".join(bytes(row.bytes) for row in rows).decode() == said
        assert {len(row.top_logprobs) for row in rows} == {2}
        parts = list(client.chat.completions.create(messages=MESSAGES, stream=True, **logprobs, **asked))
        streamed = [part.choices[0].logprobs for part in parts]
        assert [row for part in streamed if part for row in part.content] == rows
        extra = {"save_memory": "me"}
        client.completions.create(prompt="to be", extra_body=extra, **asked)
        client.completions.create(prompt=" or", extra_body={"memory": "me"}, **asked)
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError, match="at most"):
            client.completions.create(model="a", prompt="to be", max_tokens=10**6)
    wrong = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
    with wrong as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_langchain(server: Client, url: str) -> None:
    langchain_openai = optional("langchain_openai")
    options = {"model": "a", "base_url": url, "api_key": KEY, "max_retries": 0}
    llm = langchain_openai.OpenAI(**options, temperature=0, max_tokens=10)
    expected = complete(server, prompt="to be", max_tokens=10, temperature=0)
    assert llm.invoke("to be") == expected
    assert llm.batch(["to be"] * 20) == [expected] * 20  # one request, of twenty prompts
    assert "".join(llm.stream("to be")) == expected
    model = langchain_openai.ChatOpenAI(**options, temperature=0, max_tokens=10)
    said = chat(server, max_tokens=10, temperature=0)
    assert model.invoke([("user", "to be or not")]).content == said
    assert "".join(str(part.content) for part in model.stream([("user", "to be or not")])) == said


@pytest.mark.filterwarnings("ignore::UserWarning:pydantic")
def test_litellm(server: Client, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks GitHub for prices
    litellm = optional("litellm")
    options = {"api_base": url, "api_key": KEY, "max_tokens": 10, "temperature": 0}
    said = chat(server, max_tokens=10, temperature=0)
    answer = litellm.completion(model="openai/a", messages=MESSAGES, **options)
    assert answer.choices[0].message.content == said
    stream = litellm.completion(model="openai/a", messages=MESSAGES, stream=True, **options)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == said
    text = litellm.text_completion(model="text-completion-openai/a", prompt="to be", **options)
    assert text.choices[0].text == complete(server, prompt="to be", max_tokens=10, temperature=0)


def curl(*args: str) -> str:
    found = shutil.which("curl")
    if found is None:
        pytest.skip("no curl")
    done = subprocess.run(
        [found, "-sS", "--noproxy", "*", "--max-time", "60", *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl(server: Client, url: str, tmp_path: Path) -> None:
    key, kind = ("-H", f"Authorization: bearer {KEY}"), ("-H", "Content-Type: application/json")
    asked = {"prompt": "to be", "max_tokens": 10, "seed": 1}
    answer = json.loads(curl(f"{url}/completions", *key, *kind, "-d", json.dumps(asked)))
    assert answer["choices"][0]["text"] == complete(server, **asked)
    streamed = curl("-N", f"{url}/completions", *key, *kind, "-d", json.dumps(asked | {"stream": True}))
    assert streamed.endswith("data: [DONE]\n\n")
    assert curl("-I", f"{url}/models/a", *key).startswith("HTTP/1.1 200")
    # A body of more than 1 MB is announced first (Expect: 100-continue), and may be refused before it is sent.
    large = json.dumps({"name": "big", "text": "to be or not " * 50_000})
    (tmp_path / "body.json").write_text(large)
    done = curl(f"{url}/memories", *key, *kind, "-H", "Expect: 100-continue", "-d", f"@{tmp_path / 'body.json'}")
    assert json.loads(done)["position"] == 650_000


# nginx

CONFIG = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
    uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
    server {{
        listen 127.0.0.1:{port};
        location /lm/ {{ proxy_pass http://127.0.0.1:{behind}/; {headers} }}
    }}
}}
"""


@contextmanager
def nginx(folder: Path, behind: int, headers: str = "") -> Iterator[Client]:
    """Run nginx on loopback, before the server at ``behind``, under the path /lm/."""
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if found is None:
        pytest.skip("no nginx")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder.mkdir()
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(folder=folder, port=port, behind=behind, headers=headers))
    command = [found, "-p", str(folder), "-c", str(config), "-e", str(folder / "error.log")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(500):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.02)
            yield Client(port)
        finally:
            process.terminate()
            process.wait(20)


def test_nginx_passes_streams_on_as_they_come(small_model: LoadedModel, memories: Path, tmp_path: Path) -> None:
    """The stream of a long text: its first part is there long before its last."""
    limits = Limits(max_tokens=10**8)
    asked = {"prompt": "to be", "max_tokens": 10**7, "stream": True}
    with (
        running(make_service(small_model, memories, limits)) as server,
        nginx(tmp_path / "nginx", server.port) as client,
    ):
        with client.open("POST", "/lm/v1/completions", asked) as response:
            assert response.readline().startswith(b'data: {"id": "cmpl-')
            assert server.workers is not None
            assert server.workers.busy == 1  # there is more to come, for hours
            parts = [len(response.read1()) for _ in range(10)]
            # Not a page of nginx's buffer at a time; a few may be, where the client was slow.
            assert sorted(parts)[5] < 4096
        assert server.idle()  # nginx passes on that the client has gone


@pytest.mark.parametrize("passes_host", [True, False])
def test_nginx_with_a_prefix(small_model: LoadedModel, memories: Path, tmp_path: Path, passes_host: bool) -> None:
    """The page's addresses are relative, and the server's name is that of the proxy."""
    access = Access(hosts=("lm.example.org",))
    headers = "proxy_set_header Host $host;" if passes_host else ""
    asked = {"prompt": "to be", "max_tokens": 5, "seed": 1}
    browser = {"host": "lm.example.org", "origin": "https://lm.example.org"}
    with (
        running(make_service(small_model, memories), access) as server,
        nginx(tmp_path / "nginx", server.port, headers) as client,
    ):
        with client.open("GET", "/lm/", host="lm.example.org") as response:
            page = response.read().decode()
        assert '"/v1/' not in page
        assert '"v1/completions"' in page
        status, answer = client.ask("POST", "/lm/v1/completions", asked, **browser)
        assert (status, answer["choices"][0]["text"]) == (200, server.text(**asked))
        others = {"host": "lm.example.org", "origin": "https://evil.example"}
        assert client.ask("POST", "/lm/v1/completions", asked, **others)[0] == 403
