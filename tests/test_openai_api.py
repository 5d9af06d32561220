"""OpenAI's API as its own clients see it: the real `openai` package, a real server, tiny-vl behind it."""

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

import deepstack_jax as dsj
from deepstack_jax.demo.samples import sample
from deepstack_jax.engine.options import EngineOptions
from deepstack_jax.serving import requests
from tests.api_server import api_server, client_of
from tests.nodes import serving
from tests.waiting import until

ENGINE = EngineOptions(slots=4, chunk=128)


@pytest.fixture(scope="module")
def model() -> dsj.Model:
    return dsj.load("tiny-vl", "float32")


@pytest.fixture(scope="module")
def split() -> Iterator[dict[str, str]]:
    """The URLs of an encode node and of a language node, two processes."""
    shape = ("--dtype", "float32", "--slots", "4", "--chunk", "128")
    with (
        serving(Path("tiny-vl"), "--role", "encode", "--dtype", "float32") as encode,
        serving(Path("tiny-vl"), "--role", "language", "--encoder", encode.control, *shape) as language,
    ):
        encode.ask_when_connected(text="Are you there?", image_data=uri(PICTURE.images[0]))
        yield {"encode": encode.url, "language": language.url}


@pytest.fixture(
    scope="module", params=["unified", *(pytest.param(role, marks=pytest.mark.slow) for role in ("encode", "language"))]
)
def url(request: pytest.FixtureRequest, model: dsj.Model) -> Iterator[str]:
    """A server: the whole model, or one side of the split, which any request may reach."""
    if request.param == "unified":
        with api_server(model, "tiny-vl", ENGINE) as url:
            yield url
    else:
        yield request.getfixturevalue("split")[request.param]


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return client_of(url)


PICTURE = sample(3, "picture")
QUESTION, ANSWER = PICTURE.exchanges[0].question, PICTURE.exchanges[0].answer


def uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


ASKED: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": uri(PICTURE.images[0]), "detail": "high"}},
            {"type": "text", "text": QUESTION},
        ],
    }
]
SAID: list[Any] = [{"role": "user", "content": "What do you see?"}]


def create(client: openai.OpenAI, messages: list[Any] = SAID, **options: Any) -> Any:
    return client.chat.completions.create(model="tiny-vl", messages=messages, **options)


def generated(model: dsj.Model, messages: list[Any], **options: Any) -> tuple[str, list[int]]:
    """The library's answer to the same request."""
    out = dsj.generate(model, **dsj.prepare(model, messages), **options)
    return dsj.decode(model, out)[0], out.tokens[0, : out.lengths[0]].tolist()


class TestChat:
    def test_a_picture_is_described(self, client: openai.OpenAI, model: dsj.Model):
        answer = create(client, ASKED)
        text, tokens = generated(model, ASKED)
        assert answer.choices[0].message.content == text == ANSWER
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == len(tokens)
        assert answer.usage.prompt_tokens == dsj.prepare(model, ASKED)["input_ids"].shape[1]
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert "slots=4,chunk=128" in answer.system_fingerprint
        assert answer.model == "tiny-vl"
        assert answer.id.startswith("chatcmpl-")

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "image_url": uri(PICTURE.images[0])},
            {"type": "input_image", "image_url": uri(PICTURE.images[0]), "cache_control": {"type": "ephemeral"}},
        ],
    )
    def test_other_forms_of_the_same_picture(self, client: openai.OpenAI, part: dict[str, Any]):
        content = [part, {"type": "input_text", "text": QUESTION}]
        assert create(client, [{"role": "user", "content": content}]).choices[0].message.content == ANSWER

    @pytest.mark.parametrize("messages", [ASKED, SAID])
    def test_a_stream_has_the_same_answer(self, client: openai.OpenAI, messages: list[Any]):
        whole = create(client, messages)
        events = list(create(client, messages, stream=True, stream_options={"include_usage": True}))
        assert events[0].choices[0].delta.role == "assistant"
        assert "".join(e.choices[0].delta.content or "" for e in events[:-1]) == whole.choices[0].message.content
        assert [e.choices[0].finish_reason for e in events[:-1] if e.choices[0].finish_reason] == ["stop"]
        assert all(event.usage is None for event in events[:-1])
        assert events[-1].choices == []
        assert events[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert len({event.id for event in events}) == 1

    def test_the_asynchronous_client_gets_several_answers_at_once(self, url: str, client: openai.OpenAI):
        async def ask() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as other:
                asked = [other.chat.completions.create(model="tiny-vl", messages=ASKED) for _ in range(6)]
                stream = await other.chat.completions.create(model="tiny-vl", messages=ASKED, stream=True)
                answers = [answer.choices[0].message.content or "" for answer in await asyncio.gather(*asked)]
                return [*answers, "".join([event.choices[0].delta.content or "" async for event in stream])]

        assert asyncio.run(ask()) == [ANSWER] * 7

    def test_n_choices_are_those_of_n_seeds(self, client: openai.OpenAI, model: dsj.Model):
        options: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12}
        several = create(client, ASKED, n=3, seed=7, **options)
        expected = [generated(model, ASKED, temperature=1.5, seed=7 + i, max_new_tokens=12) for i in range(3)]
        assert [choice.message.content for choice in several.choices] == [text for text, _ in expected]
        assert [choice.index for choice in several.choices] == [0, 1, 2]
        assert several.usage.completion_tokens == sum(len(tokens) for _, tokens in expected)
        streamed = [""] * 3
        for event in create(client, ASKED, n=3, seed=7, stream=True, **options):
            streamed[event.choices[0].index] += event.choices[0].delta.content or ""
        assert streamed == [text for text, _ in expected]

    def test_a_choice_that_a_stop_string_ends_gives_its_slot_back(self, url: str, client: openai.OpenAI):
        options: dict[str, Any] = {"n": 2, "seed": 4, "temperature": 3.0, "extra_body": {"ignore_eos": True}}
        options["stop"] = create(client, max_tokens=12, **options).choices[0].message.content
        most = create(client, max_tokens=1).usage.prompt_tokens
        with create(client, max_tokens=2000 - most, stream=True, **options) as events:
            (ended,) = next(event.choices for event in events if event.choices[0].finish_reason)
            assert (ended.index, ended.finish_reason) == (0, "stop")
            if "\ndeepstack_jax_slots " in httpx.get(f"{url}/metrics").text:  # not on the encode node
                until(lambda: "\ndeepstack_jax_requests_running 1.0" in httpx.get(f"{url}/metrics").text)
            assert next(events).choices[0].index == 1

    def test_answers_without_a_seed_differ(self, client: openai.OpenAI):
        texts = {create(client, temperature=5.0, max_tokens=8).choices[0].message.content for _ in range(4)}
        assert len(texts) > 1

    def test_the_checkpoint_says_how_to_sample_by_default(self, client: openai.OpenAI, model: dsj.Model):
        # its generation_config.json says do_sample: false
        assert create(client).choices[0].message.content == generated(model, SAID)[0]

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("at", range(1, 4))
    def test_stop_strings_cut_at_any_place(self, client: openai.OpenAI, stream: bool, at: int):
        stop = ANSWER[at : at + 3]
        answer = create(client, ASKED, stop=[stop], stream=stream)
        if stream:
            events = list(answer)
            text, reason = (
                "".join(e.choices[0].delta.content or "" for e in events),
                events[-1].choices[0].finish_reason,
            )
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert text == ANSWER[: ANSWER.index(stop)]
        assert reason == "stop"

    def test_max_tokens_cuts(self, client: openai.OpenAI, model: dsj.Model):
        for options in ({"max_tokens": 2}, {"max_completion_tokens": 2}, {"max_completion_tokens": 2, "max_tokens": 9}):
            answer = create(client, ASKED, **options)
            assert answer.choices[0].message.content == generated(model, ASKED, max_new_tokens=2)[0]
            assert answer.choices[0].finish_reason == "length"
            assert answer.usage.completion_tokens == 2

    def test_penalties_and_extensions_mean_what_the_library_means(self, client: openai.OpenAI, model: dsj.Model):
        options: dict[str, Any] = {"frequency_penalty": 0.7, "presence_penalty": 0.4, "temperature": 1.1, "seed": 3}
        more: dict[str, Any] = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2}
        answer = create(client, ASKED, max_tokens=12, top_p=0.95, extra_body=more, **options)
        text, _ = generated(model, ASKED, max_new_tokens=12, top_p=0.95, **options, **more)
        assert answer.choices[0].message.content == text

    def test_logprobs_are_those_of_the_models_logits(self, client: openai.OpenAI, model: dsj.Model):
        more = {"return_token_ids": True}
        answer = create(client, ASKED, logprobs=True, top_logprobs=3, extra_body=more)
        ids = answer.choices[0].token_ids
        inputs = dsj.prepare(model, ASKED)
        assert answer.prompt_token_ids == inputs["input_ids"][0].tolist()
        whole = inputs | {"input_ids": np.append(inputs["input_ids"], [ids], axis=1)}
        for name in ("attention_mask", "mm_token_type_ids"):
            fill = int(name == "attention_mask")
            whole[name] = np.pad(inputs[name], ((0, 0), (0, len(ids))), constant_values=fill)
        logits = np.asarray(dsj.forward(model, **whole), np.float64)[0, inputs["input_ids"].shape[1] - 1 : -1]
        reference = logits - logits.max(-1, keepdims=True)
        reference -= np.log(np.sum(np.exp(reference), -1, keepdims=True))
        content = answer.choices[0].logprobs.content
        assert len(content) == len(ids) - 1, "the end token is no part of the text"
        assert b"".join(bytes(entry.bytes) for entry in content).decode() == ANSWER
        assert "".join(entry.token for entry in content) == ANSWER
        for entry, token, row in zip(content, ids, reference, strict=False):
            assert entry.logprob == pytest.approx(row[token], abs=1e-4)
            best = np.sort(row)[::-1][:3]
            np.testing.assert_allclose([top.logprob for top in entry.top_logprobs], best, atol=1e-4)
        streamed = create(client, ASKED, logprobs=True, top_logprobs=3, stream=True)
        parts = [event.choices[0].logprobs for event in streamed if event.choices[0].logprobs]
        assert [entry.token for part in parts for entry in part.content] == [entry.token for entry in content]

    @pytest.mark.parametrize("url", ["unified"], indirect=True)  # in this process
    def test_log_probabilities_bound_answers_whose_length_is_left_open(
        self, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(requests, "MAX_LOGPROBS", 24)
        options: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "n": 2, "extra_body": {"ignore_eos": True}}
        answer = create(client, **options)
        assert [len(choice.logprobs.content) for choice in answer.choices] == [3, 3]
        assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
        options = {"prompt": ["a", "b"], "n": 2, "logprobs": 1, "max_tokens": 4}
        with pytest.raises(openai.BadRequestError, match="4 x 4 x 2 = 32"):
            client.completions.create(model="tiny-vl", **options)

    def test_logit_bias_and_token_limits(self, client: openai.OpenAI, model: dsj.Model):
        (token,) = model.processor.tokenizer(" cross", add_special_tokens=False)["input_ids"]
        forced = create(client, logit_bias={str(token): 100}, max_tokens=3)
        assert forced.choices[0].message.content == " cross" * 3
        longer = create(client, max_tokens=30, extra_body={"min_tokens": 30})
        assert longer.usage.completion_tokens == 30
        first = generated(model, SAID)[1][1]
        cut = create(client, extra_body={"stop_token_ids": [first]})
        assert cut.choices[0].stop_reason == first
        assert cut.usage.completion_tokens == 2

    def test_a_conversation_may_be_empty_and_contents_null(self, client: openai.OpenAI):
        for content in ("", None, []):
            assert create(client, [{"role": "user", "content": content}]).choices[0].finish_reason == "stop"
        turns = [*SAID, {"role": "assistant", "content": None, "refusal": None, "tool_calls": None}, *SAID]
        assert create(client, turns).choices[0].finish_reason == "stop"
        create(client, [{"role": "developer", "content": "Be short."}, *SAID], extra_body={"unknown": {"a": 1}})

    def test_an_answer_goes_on_from_the_last_message(self, client: openai.OpenAI, model: dsj.Model):
        begun = ANSWER[: len(ANSWER) // 2].rsplit(" ", 1)[0]
        more = {"continue_final_message": True, "add_generation_prompt": False}
        answer = create(client, [*ASKED, {"role": "assistant", "content": begun}], extra_body=more)
        assert begun + answer.choices[0].message.content == ANSWER

    def test_the_prefix_cache_is_kept_apart_by_salts(self, client: openai.OpenAI):
        # an encode node passes the words on, so another test may have sent them to the same language node
        words = " ".join([str(client.base_url), *(f"word{i}" for i in range(150))])

        def cached(**extra: Any) -> int:
            answer = create(client, [{"role": "user", "content": words}], max_tokens=1, extra_body=extra)
            return answer.usage.prompt_tokens_details.cached_tokens

        assert [cached(), cached(), cached(cache_salt="a"), cached(cache_salt="a"), cached()] == pytest.approx(
            [0, cached(), 0, cached(), cached()]
        )
        assert cached() > 0

    def test_fewer_pixels_by_detail_and_by_processor_options(self, client: openai.OpenAI):
        large = uri(Image.effect_mandelbrot((1024, 1024), (-2, -1, 1, 1), 20).convert("RGB"))

        def tokens(detail: str, **extra: Any) -> int:
            part = {"type": "image_url", "image_url": {"url": large, "detail": detail}}
            answer = create(client, [{"role": "user", "content": [part]}], max_tokens=1, extra_body=extra)
            return answer.usage.prompt_tokens

        most = tokens("auto", mm_processor_kwargs={"max_pixels": 26000})
        assert most < tokens("low") <= tokens("auto")  # the checkpoint's own bound is lower than that of low detail


class TestOtherEndpoints:
    def test_completions_are_of_the_text_as_it_is(self, client: openai.OpenAI, model: dsj.Model):
        prompt = "<|im_start|>user\nWhat do you see?<|im_end|>\n<|im_start|>assistant\n"
        answer = client.completions.create(model="tiny-vl", prompt=prompt, max_tokens=20)
        assert answer.choices[0].text == generated(model, SAID, max_new_tokens=20)[0]
        ids = model.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        several = client.completions.create(model="tiny-vl", prompt=[ids, ids], n=2, max_tokens=20, echo=True)
        assert [choice.text for choice in several.choices] == [prompt + answer.choices[0].text] * 4
        assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
        events = client.completions.create(model="tiny-vl", prompt=prompt, max_tokens=20, stream=True, logprobs=1)
        listed: list[Any] = list(events)
        assert "".join(event.choices[0].text for event in listed) == answer.choices[0].text
        tokens = [token for event in listed for token in event.choices[0].logprobs.tokens]
        offsets = [offset for event in listed for offset in event.choices[0].logprobs.text_offset]
        assert "".join(tokens) == answer.choices[0].text
        assert offsets == [sum(map(len, tokens[:i])) for i in range(len(tokens))]
        with pytest.raises(openai.BadRequestError, match="suffix"):
            client.completions.create(model="tiny-vl", prompt="a", suffix="b")

    def test_responses(self, client: openai.OpenAI, model: dsj.Model):
        content: list[Any] = [
            {"type": "input_image", "image_url": uri(PICTURE.images[0]), "detail": "auto"},
            {"type": "input_text", "text": QUESTION},
        ]
        answer = client.responses.create(model="tiny-vl", input=[{"role": "user", "content": content}])
        assert answer.output_text == ANSWER
        assert answer.status == "completed"
        assert answer.usage
        assert answer.usage.output_tokens == len(generated(model, ASKED)[1])
        with client.responses.stream(model="tiny-vl", input=[{"role": "user", "content": content}]) as stream:
            events = list(stream)
            assert stream.get_final_response().output_text == ANSWER
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[0].type == "response.created"
        assert events[-1].type == "response.completed"
        cut = client.responses.create(model="tiny-vl", input="What do you see?", max_output_tokens=1)
        assert (cut.status, cut.incomplete_details and cut.incomplete_details.reason) == (
            "incomplete",
            "max_output_tokens",
        )
        turns = client.responses.create(
            model="tiny-vl", instructions="Be short.", input=[*SAID, *answer.model_dump()["output"], *SAID]
        )
        assert turns.output_text
        with pytest.raises(openai.BadRequestError, match="not stored"):
            client.responses.create(model="tiny-vl", input="a", previous_response_id="resp_1")

    def test_models_and_the_tokenizer(self, client: openai.OpenAI, url: str, model: dsj.Model):
        (listed,) = client.models.list()
        assert listed.id == "tiny-vl"
        assert (
            client.models.retrieve("tiny-vl").model_dump()["max_model_len"] == model.config.text.max_position_embeddings
        )
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.models.retrieve("gpt-5")
        text = "What do you see? é"
        found = httpx.post(f"{url}/tokenize", json={"prompt": text}).json()
        assert found["tokens"] == model.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found["count"] == len(found["tokens"])
        assert httpx.post(f"{url}/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
        chat = httpx.post(f"{url}/tokenize", json={"messages": SAID}).json()
        assert chat["tokens"] == dsj.prepare(model, SAID)["input_ids"][0].tolist()


# (options of a chat request) -> (exception, what its message says, param, code)
ERRORS: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str, str | None, str | None]] = {
    "model": ({"model": "gpt-5"}, openai.NotFoundError, "does not exist", "model", "model_not_found"),
    "context": (
        {"max_tokens": 100_000},
        openai.BadRequestError,
        "exceed",
        "max_tokens",
        "context_length_exceeded",
    ),
    "long text": (
        {"messages": [{"role": "user", "content": "word " * 100_000}]},
        openai.BadRequestError,
        "too many for",
        None,
        "context_length_exceeded",
    ),
    "bias of no token": ({"logit_bias": {"99999999": 1}}, openai.BadRequestError, "logit_bias", None, None),
    "min above max": (
        {"max_tokens": 3, "extra_body": {"min_tokens": 4}},
        openai.BadRequestError,
        "min_tokens",
        None,
        None,
    ),
    "range": ({"temperature": -1}, openai.BadRequestError, "temperature -1", "temperature", "invalid_value"),
    "type": ({"n": "two"}, openai.BadRequestError, "n 'two'", "n", "invalid_value"),
    "role": ({"messages": [{"role": "robot", "content": "a"}]}, openai.BadRequestError, "robot", None, None),
    "no messages": ({"messages": []}, openai.BadRequestError, "messages", "messages", "invalid_value"),
    "logprobs": ({"top_logprobs": 3}, openai.BadRequestError, "needs logprobs", "top_logprobs", None),
    "many logprobs": (
        {"n": 128, "logprobs": True, "top_logprobs": 20, "max_tokens": 98},
        openai.BadRequestError,
        "128 x 98 x 21 = 263424",
        None,
        None,
    ),
    "bias": ({"logit_bias": {"a": 1}}, openai.BadRequestError, "token ids", None, "invalid_value"),
    "no schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        openai.BadRequestError,
        "no schema",
        "response_format.json_schema",
        None,
    ),
    "tools": (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        openai.BadRequestError,
        "no place for tools",
        None,
        None,
    ),
    "picture": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a"}}]}
            ]
        },
        openai.PermissionDeniedError,
        "",
        None,
        "media_refused",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_openais_exceptions(client: openai.OpenAI, case: str, stream: bool) -> None:
    options, kind, text, param, code = ERRORS[case]
    body: dict[str, Any] = {"model": "tiny-vl", "messages": SAID, "stream": stream} | options
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**body)
    assert text in str(caught.value)
    if param is not None:
        assert caught.value.param == param
    if code is not None:
        assert caught.value.code == code
