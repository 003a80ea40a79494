"""Chat completions: a plain template makes one text of the messages, and the model goes on with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import made
from serving import Client, make_service, running

from mmrec.checkpoints.chat_template import ChatOptions, ChatTemplate
from mmrec.checkpoints.loading import LoadedModel
from mmrec.core.errors import UserError
from mmrec.tokenizers import ByteTokenizer

MESSAGES = [{"role": "system", "content": "to be"}, {"role": "user", "content": "that is the question"}]


def chat(client: Client, **asked: Any) -> Any:
    return client.good("POST", "/v1/chat/completions", {"messages": MESSAGES, **asked})


def test_a_chat_is_the_completion_of_its_text(client: Client) -> None:
    asked = {"max_tokens": 40, "seed": 3, "temperature": 0.7}
    answer = chat(client, model="a", **asked)
    plain = client.complete(prompt="to be\n\nthat is the question\n\n", stop="\n\n", **asked)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": plain["choices"][0]["text"], "refusal": None}
    assert choice["finish_reason"] == plain["choices"][0]["finish_reason"]
    assert (answer["object"], answer["usage"]) == ("chat.completion", plain["usage"])
    parts = [{"role": "user", "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    assert chat(client, messages=parts, **asked)["choices"] == answer["choices"]
    assert chat(client, max_completion_tokens=5, seed=3)["usage"]["completion_tokens"] == 5
    assert chat(client, seed=3)["usage"]["completion_tokens"] <= 256


def test_a_streamed_chat(client: Client) -> None:
    asked = {"max_tokens": 20, "seed": 3, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    whole = chat(client, max_tokens=20, seed=3, n=2)
    with client.open("POST", "/v1/chat/completions", {"messages": MESSAGES, **asked}) as response:
        assert response.getheader("x-accel-buffering") == "no"
        *events, done, end = response.read().decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    for index in range(2):
        choices = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text == whole["choices"][index]["message"]["content"]
        assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1]["finish_reason"] == whole["choices"][index]["finish_reason"]


def test_a_template_of_ones_own(small_model: LoadedModel, memories: Path) -> None:
    template = ChatOptions(message="{role}: {content}", separator="\\n", reply="be ").change(None)
    assert template is not None
    assert template.render([("user", "or"), ("tool", "{role}")]) == "user: or\ntool: {role}\nbe "
    with running(make_service(small_model, memories), template=ChatTemplate(separator="\n", reply="be ")) as client:
        answer = chat(client, max_tokens=30, seed=1, save_memory="said")
        asked = {"max_tokens": 30, "seed": 1, "stop": "\n"}
        content = answer["choices"][0]["message"]["content"]
        assert content == client.text(prompt="to be\nthat is the question\nbe ", **asked)
        # A memory holds what stood before, as in a completion.
        status = answer["choices"][0]["memory"]
        assert status["position"] == len("to be\nthat is the question\nbe " + content)


def test_bad_templates() -> None:
    with pytest.raises(UserError, match=r"must have \{content\} in it"):
        ChatTemplate(message="{role}")
    with pytest.raises(UserError, match="must be a text"):
        ChatTemplate(separator=5)  # type: ignore[arg-type]


def test_an_option_changes_its_part_of_the_model_s_template() -> None:
    template = ChatTemplate("{role}> {content}", "\n", "me> ")
    assert ChatOptions().change(None) is None
    assert ChatOptions().change(template) == template
    assert ChatOptions(separator="").change(template) == ChatTemplate("{role}> {content}", "", "me> ")
    assert ChatOptions(reply="a\\nb").change(None) == ChatTemplate(reply="a\nb")


def test_log_probabilities_are_those_of_the_completion(client: Client) -> None:
    asked = {"max_tokens": 12, "seed": 3, "n": 2}
    answer = chat(client, logprobs=True, top_logprobs=3, **asked)
    plain = client.complete(prompt="to be\n\nthat is the question\n\n", stop="\n\n", logprobs=3, **asked)
    for choice, expected in zip(answer["choices"], plain["choices"], strict=True):
        content, lists = choice["logprobs"]["content"], expected["logprobs"]
        assert [row["token"] for row in content] == lists["tokens"]
        assert [row["logprob"] for row in content] == lists["token_logprobs"]
        assert b"".join(bytes(row["bytes"]) for row in content).decode() == choice["message"]["content"]
        for row, top in zip(content, lists["top_logprobs"], strict=True):
            assert [(one["token"], one["logprob"]) for one in row["top_logprobs"]] == [*top.items()][:3]
            assert [bytes(one["bytes"]).decode() for one in row["top_logprobs"]] == [*top][:3]
    alone = chat(client, logprobs=True, **asked)["choices"][0]["logprobs"]["content"]
    assert [row["top_logprobs"] for row in alone] == [[]] * len(alone)
    assert [row["logprob"] for row in alone] == [
        row["logprob"] for row in answer["choices"][0]["logprobs"]["content"]
    ]
    assert len(chat(client, logprobs=True, top_logprobs=20, max_tokens=1)["choices"][0]["logprobs"]["content"]) == 1
    assert chat(client, **asked)["choices"][0]["logprobs"] is None


def test_log_probabilities_of_characters_in_bytes(memories: Path) -> None:
    with running(make_service(made(ByteTokenizer()), memories)) as client:
        asked = {"max_tokens": 40, "seed": 1, "logprobs": True, "top_logprobs": 2}
        (choice,) = chat(client, **asked)["choices"]
        content = choice["logprobs"]["content"]
        assert any(row["token"].startswith("bytes:") and len(row["bytes"]) == 1 for row in content)
        spelled = b"".join(bytes(row["bytes"]) for row in content)
        assert spelled.decode(errors="replace").startswith(choice["message"]["content"].rstrip("\ufffd"))
        with client.open("POST", "/v1/chat/completions", {"messages": MESSAGES, "stream": True, **asked}) as response:
            *events, _, _ = response.read().decode().split("\n\n")
        choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
        streamed = [row for one in choices if one["logprobs"] for row in one["logprobs"]["content"]]
        assert streamed == content


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "king", "content": "to be"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"stop": list("abcde")}, "at most 4"),
        ({"tools": [{"type": "function"}]}, "tools: "),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ({"logprobs": 2}, "logprobs: "),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
        ({"response_format": {"type": "json_object"}}, "response_format: "),
        ({"model": "gpt-4o"}, "there is no model 'gpt-4o', but 'a'"),
    ],
)
def test_bad_chats(client: Client, changes: dict[str, Any], says: str) -> None:
    status, answer = client.ask("POST", "/v1/chat/completions", {"messages": MESSAGES, **changes})
    assert status in (400, 404)
    assert says in answer["error"]["message"]


def test_fields_of_chat_clients_that_ask_for_nothing(client: Client) -> None:
    nothing: dict[str, Any] = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}
    nothing |= {"parallel_tool_calls": True, "logprobs": False, "modalities": ["text"], "service_tier": "auto"}
    assert chat(client, seed=1, max_tokens=9, **nothing)["choices"] == chat(client, seed=1, max_tokens=9)["choices"]


def test_other_paths_say_what_there_is(client: Client) -> None:
    status, answer = client.ask("POST", "/v1/responses", {"input": "to be"})
    assert (status, "chat/completions" in answer["error"]["message"]) == (404, True)
