"""``logprobs`` and ``echo`` of the server: they say what the plain model says, and change nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, make_text
from harness import Harness, nats
from safetensors.torch import load_file
from serving import LIMITS, Client, events, make_service, running
from torch import Tensor

from mmrec.checkpoints.loading import LoadedModel
from mmrec.inference.reading import READ_CHUNK
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.serve.limits import Limits
from mmrec.serve.logprobs import CompletionLogprobs, token_logprobs, token_names
from mmrec.serve.protocol import CompletionRequest
from mmrec.serve.service import Started
from mmrec.tokenizers import TOKENIZERS, BPETokenizer, ByteTokenizer, make_tokenizer

TEXT = "Çay, üç şişe: öğle çorbas\u0131… 😀\nto be or not to be\n" * 60


@pytest.fixture(params=TOKENIZERS)
def model(request: pytest.FixtureRequest) -> LoadedModel:
    """A model of random weights, which likes some tokens much better than others."""
    tokenizer = make_tokenizer(request.param, TEXT, "", 264 if request.param == "bpe" else None)
    config = ModelConfig(dim=16, layers=2, layer_types=("short", "long"), heads=2, ffn_dim=24)
    net = RecurrentLM(config, tokenizer.vocab_size).eval()
    with torch.no_grad():
        net.head.weight.mul_(30)
    return LoadedModel(net, tokenizer, 0)


@torch.inference_mode()
def plain(trained: LoadedModel, tokens: list[int]) -> Tensor:
    """Return the log probabilities of each token but the first, in one pass of the plain model."""
    logits, _ = trained.net(torch.tensor([tokens]), trained.net.zero_state(1))
    found: Tensor = logits[0, :-1].log_softmax(-1)
    return found


def spelled(name: str) -> bytes:
    """Return the bytes of a token by its name, as clients of OpenAI's do."""
    if name.startswith("bytes:"):
        return name.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1")
    return name.encode()


def assert_plain(trained: LoadedModel, found: dict[str, Any], tokens: list[int], count: int) -> None:
    """Compare ``logprobs`` of the whole text ``tokens`` with those of the plain model."""
    expected = plain(trained, tokens)
    names = [trained.tokenizer.token_bytes(token) for token in range(trained.tokenizer.vocab_size)]
    assert [spelled(name) for name in found["tokens"]] == [names[token] for token in tokens]
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    own = expected.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert found["token_logprobs"][1:] == pytest.approx(own.tolist(), abs=1e-4)
    for place, (token, row) in enumerate(zip(tokens[1:], expected, strict=True), 1):
        top = {spelled(name): logprob for name, logprob in found["top_logprobs"][place].items()}
        best = row.topk(count)
        assert [*top.values()][:count] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert top == pytest.approx({name: float(row[names.index(name)]) for name in top}, abs=1e-4)
        assert top[names[token]] == found["token_logprobs"][place]
        assert len(top) == count + (token not in best.indices)


def assert_offsets(found: dict[str, Any], text: str) -> None:
    """Each token begins where ``text_offset`` says: at its first character, or within it."""
    before = b""
    for name, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert offset == len(before.decode(errors="ignore"))
        assert name.startswith("bytes:") or text[offset:].startswith(name)
        before += spelled(name)


def merged(events: list[Any], index: int = 0) -> tuple[str, dict[str, list[Any]]]:
    """Return the text and the log probabilities of a choice that was streamed."""
    choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
    names = choices[0]["logprobs"]
    return "".join(choice["text"] for choice in choices), {
        name: [value for choice in choices for value in choice["logprobs"][name]] for name in names
    }


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_prompt_is_scored_as_by_the_plain_model(model: LoadedModel, memories: Path, count: int) -> None:
    tokens = model.tokenizer.encode(TEXT).tolist()
    assert READ_CHUNK < len(tokens) < LIMITS.prompt_tokens  # it is read in several chunks
    with running(make_service(model, memories)) as client:
        answer = client.complete(prompt=TEXT, echo=True, logprobs=count, max_tokens=0)
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
        assert answer["usage"] == {
            "prompt_tokens": len(tokens),
            "completion_tokens": 0,
            "total_tokens": len(tokens),
        }
        assert_plain(model, choice["logprobs"], tokens, count)
        assert_offsets(choice["logprobs"], TEXT)
        asked = {"prompt": tokens, "echo": True, "logprobs": count, "max_tokens": 0}
        assert client.complete(**asked)["choices"] == [choice]
        events = client.stream(**asked)
        assert len(events) > 2  # it comes in parts
        assert merged(events) == (TEXT, choice["logprobs"])


def test_what_is_written_is_scored_before_temperature(model: LoadedModel, memories: Path) -> None:
    prompt = model.tokenizer.encode(TEXT[:70]).tolist()
    asked = {"prompt": prompt, "max_tokens": 60, "temperature": 1.7, "top_p": 0.9, "seed": 3, "logprobs": 2}
    with running(make_service(model, memories)) as client:
        (choice,) = client.complete(**asked)["choices"]
        (echoed,) = client.complete(**asked, echo=True)["choices"]
        assert choice["text"] == client.text(**asked | {"logprobs": None})
        assert merged(client.stream(**asked)) == (choice["text"], choice["logprobs"])
        assert merged(client.stream(**asked, echo=True)) == (echoed["text"], echoed["logprobs"])
        assert client.text(**asked | {"logprobs": None}, echo=True) == echoed["text"] == TEXT[:70] + choice["text"]
    names = {model.tokenizer.token_bytes(token): token for token in range(model.tokenizer.vocab_size)}
    found = echoed["logprobs"]
    assert_plain(model, found, prompt + [names[spelled(name)] for name in choice["logprobs"]["tokens"]], 2)
    for name, values in choice["logprobs"].items():
        assert len(values) == 60
        begin = 70 if name == "text_offset" else 0
        assert [value + begin if begin else value for value in values] == found[name][len(prompt) :]
    # A model of random weights writes bytes that are no characters, too; a U+FFFD stands for these.
    for name, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert name.startswith("bytes:") or echoed["text"][offset:].startswith(name)


def test_it_is_what_score_says_with_and_without_a_memory(
    client: Client, mmrec: Command, small_root: Path, tmp_path: Path
) -> None:
    text = make_text()[:3000]
    (tmp_path / "text.txt").write_text(text)
    assert mmrec("score", "text.txt", f"--root={small_root}", "--token_nll=costs.tsv") == 0
    costs = [float(row.split("\t")[2]) for row in (tmp_path / "costs.tsv").read_text().splitlines()[1:]]
    asked = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    (choice,) = client.complete(prompt=text, **asked)["choices"]
    *found, written = choice["logprobs"]["token_logprobs"]
    assert found[0] is None
    assert [-logprob for logprob in found[1:]] == pytest.approx(costs[1:], abs=1e-4)
    assert written == max(choice["logprobs"]["top_logprobs"][-1].values())
    assert choice["logprobs"]["tokens"] == [*choice["text"]]

    client.good("POST", "/v1/memories", {"name": "begin", "text": text[:2000]})
    (choice,) = client.complete(prompt=text[2000:], memory="begin", **asked)["choices"]
    found = choice["logprobs"]["token_logprobs"][:-1]
    assert [-logprob for logprob in found] == pytest.approx(costs[2000:], abs=1e-4)
    score = client.good("POST", "/v1/score", {"text": text[2000:], "memory": "begin"})
    assert [-logprob for logprob in found] == pytest.approx(score["pieces"]["nats"], abs=2e-5)
    assert choice["logprobs"]["text_offset"] == [*range(1001)]


def test_several_prompts_and_choices(client: Client) -> None:
    asked = {"n": 2, "max_tokens": 20, "seed": 5, "logprobs": 3, "echo": True}
    prompts = ["to be", "that is the question"]
    choices = client.complete(prompt=prompts, **asked)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"][:5] for choice in choices] == ["to be", "to be", "that ", "that "]
    for i, choice in enumerate(choices):
        (alone,) = client.complete(prompt=prompts[i // 2], **asked | {"n": 1, "seed": 5 + i})["choices"]
        assert choice == alone | {"index": i}
    events = client.stream(prompt=prompts, **asked)
    assert [merged(events, i) for i in range(4)] == [(choice["text"], choice["logprobs"]) for choice in choices]


def test_stop_does_not_look_in_the_prompt(client: Client) -> None:
    whole = client.complete(prompt="to be", max_tokens=60, seed=1, logprobs=1)["choices"][0]
    stop = whole["text"][30:33]
    end = whole["text"].index(stop)
    prompt = f"{stop} to be"
    for text, echo in (("to be", False), ("to be", True)):
        asked = {"prompt": text, "max_tokens": 60, "seed": 1, "logprobs": 1, "stop": stop, "echo": echo}
        (choice,) = client.complete(**asked)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text * echo + whole["text"][:end], "stop")
        assert choice["logprobs"]["tokens"] == [*choice["text"]]
        assert merged(client.stream(**asked)) == (choice["text"], choice["logprobs"])
    assert client.text(prompt=prompt, echo=True, max_tokens=0, stop=stop) == prompt
    assert client.text(prompt=prompt, echo=True, max_tokens=9, seed=1, stop=stop).startswith(prompt)


def test_echo_does_not_change_what_is_remembered(client: Client, memories: Path) -> None:
    asked = {"prompt": "to be", "max_tokens": 30, "seed": 1}
    stop = client.text(**asked)[10:12]
    for more in ({}, {"stop": stop}, {"max_tokens": 0}):
        plainly = client.complete(**asked | more, save_memory="one")["choices"][0]
        echoed = client.complete(**asked | more, save_memory="two", echo=True, logprobs=5)["choices"][0]
        assert echoed["text"] == "to be" + plainly["text"]
        assert echoed["memory"]["position"] == plainly["memory"]["position"]
        one, two = (load_file(memories / f"{name}.mem") for name in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_nothing_to_give_back(client: Client) -> None:
    client.good("POST", "/v1/memories", {"name": "me", "text": "to be"})
    for asked in ({"prompt": "", "memory": "me", "echo": True}, {"memory": "me"}, {"prompt": "to be"}):
        (choice,) = client.complete(**asked, max_tokens=0, logprobs=5)["choices"]
        nothing: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        assert (choice["text"], choice["logprobs"]) == ("", nothing)
    (choice,) = client.complete(prompt="", memory="me", echo=True, max_tokens=3, logprobs=0)["choices"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    (choice,) = client.complete(prompt="t", echo=True, max_tokens=0, logprobs=0)["choices"]
    first = {"tokens": ["t"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}
    assert choice["logprobs"] == first
    assert client.complete(prompt="t", max_tokens=1)["choices"][0]["logprobs"] is None


def test_tokens_that_end_inside_a_character(memories: Path) -> None:
    net = RecurrentLM(ModelConfig(dim=16, layers=1, heads=2, ffn_dim=24), 256).eval()
    with running(make_service(LoadedModel(net, ByteTokenizer(), 0), memories)) as client:
        (choice,) = client.complete(prompt=[65, 0xF0, 0x9F], echo=True, logprobs=0, max_tokens=0)["choices"]
        assert choice["text"] == "A\ufffd"
        assert choice["logprobs"]["tokens"] == ["A", "bytes:\\xf0", "bytes:\\x9f"]
        assert choice["logprobs"]["text_offset"] == [0, 1, 1]


def test_of_two_tokens_with_one_name_the_likelier_counts() -> None:
    tokenizer = BPETokenizer.train("to be\n\nor not\n\n" * 20, 270, documents=True)
    names = token_names(tokenizer)
    written, separator = (token for token, name in enumerate(names) if name == "\n\n")
    assert separator == tokenizer.separator
    logits = torch.zeros(2, tokenizer.vocab_size)
    logits[:, written], logits[:, separator] = 5, 4
    rows = token_logprobs(logits, torch.tensor([separator, written]), 2)
    found = CompletionLogprobs.of(list(enumerate(rows)), names, tokenizer, 2)
    own, (first, second) = json.loads(f"[{found.token_logprobs}]"), json.loads(f"[{found.top_logprobs}]")
    assert first == second == {"\n\n": own[1]}
    assert own[0] == pytest.approx(own[1] - 1)


def test_bad_tokens(client: Client, small_model: LoadedModel) -> None:
    size = small_model.tokenizer.vocab_size
    layer_types = "must be a text, the numbers of its tokens, or a list of either"
    for prompt, says in (
        ([size], f"there is no token {size}; the model's are 0 to {size - 1}"),
        ([[0], [-1]], "there is no token -1"),
        ([10**30], "there is no token 1000"),
        ([[]], "must not be empty without a memory"),
        ([[0], "to be"], layer_types),
        ([True], layer_types),
        (5, layer_types),
    ):
        status, answer = client.ask("POST", "/v1/completions", {"prompt": prompt})
        assert (status, answer["error"]["param"]) == (400, "prompt")
        assert says in answer["error"]["message"]


def test_prompts_given_back_count_once_a_choice(client: Client) -> None:
    asked = {"prompt": ["t" * 1000, "o" * 1501], "n": 2, "max_tokens": 0}
    assert len(client.complete(**asked)["choices"]) == 4
    status, answer = client.ask("POST", "/v1/completions", asked | {"echo": True})
    assert (status, answer["error"]["param"]) == (400, "echo")
    assert "5,002 tokens of prompts to give back; at most 5,000 are, in all choices" in answer["error"]["message"]
    asked["prompt"] = ["t" * 1000, "o" * 1500]
    assert len(client.complete(**asked, echo=True)["choices"]) == 4


@pytest.mark.slow
def test_the_harness_gets_the_model_s_figures(
    small_model: LoadedModel, mmrec: Command, small_root: Path, tmp_path: Path
) -> None:
    for needed in ("lm_eval", "tenacity", "aiohttp"):
        pytest.importorskip(needed)
    assert mmrec("export", f"--root={small_root}", "--format=hf", "--output_dir=out/hf") == 0
    harness = Harness(small_model, make_text()[-3000:], tmp_path / "home")
    with running(make_service(small_model, tmp_path / "memories", Limits())) as client:
        results = harness.run("serve.md", "--log_samples", port=client.port)
    bits, right = harness.expected()
    assert results["bits"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert results["next"]["acc,none"] == pytest.approx(right)

    def answers(task: str) -> list[Any]:
        (found,) = Path().glob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
        return [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]

    for (found,), text in zip(answers("bits"), harness.texts, strict=True):
        assert float(found) == pytest.approx(-sum(nats(small_model, "\n" + text)), abs=1e-3)
    for both, question in zip(answers("next"), harness.questions, strict=True):
        for (logprob, greedy), choice in zip(both, question["choices"], strict=True):
            tokens = small_model.tokenizer.encode(question["before"] + choice).tolist()
            end = tokens[len(question["before"].rstrip()) :]  # the harness counts a space to what follows it
            rows = plain(small_model, tokens)[-len(end) :]
            assert float(logprob) == pytest.approx(float(rows.gather(1, torch.tensor(end)[:, None]).sum()), abs=1e-4)
            assert (greedy == "True") == (rows.argmax(1).tolist() == end)


@pytest.mark.slow
def test_a_long_prompt_is_scored_part_by_part(small_model: LoadedModel, memories: Path) -> None:
    limits = Limits()
    service = make_service(small_model, memories, limits)
    text = (make_text() * 11)[: limits.prompt_tokens]
    asked = CompletionRequest(prompt=text, echo=True, logprobs=5, max_tokens=0)
    begun, *found = events(service, asked)
    assert begun == Started(limits.prompt_tokens)
    parts = limits.prompt_tokens // READ_CHUNK
    assert found[:parts] == [None] * parts  # a client that goes away ends the work after any of them
    with running(make_service(small_model, memories, replace(limits, running=1))) as client:
        with client.open("POST", "/v1/completions", asked.model_dump(exclude_defaults=True)) as response:
            body = response.read()
        (choice,) = json.loads(body)["choices"]
        assert choice["text"] == text
        assert [len(values) for values in choice["logprobs"].values()] == [len(text)] * 4
        assert len(body) < 250 * len(text)
