"""The offline API: every form of a prompt, results as vLLM names them, stops, and nothing left behind."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fourfold
from fourfold import LLM, AsyncLLM, RequestOutput, SamplingParams
from fourfold.core.errors import CapacityError, ConfigError, FourfoldError, RequestError
from fourfold.engine.client import InProcessEngineClient
from fourfold.engine.engine import Engine
from fourfold.weights.synthetic import write_checkpoint

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parent.parent
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=1.0, seed=4, max_tokens=14)
OPTIONS: dict[str, Any] = {"device": "cpu", "max_model_len": 1000, "max_num_seqs": 4}
QUESTION = {"role": "user", "content": "Which city? <think> is text here."}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("llm") / "tiny"
    write_checkpoint(directory, "tiny", weights="float32", seed=1)
    return str(directory)


@pytest.fixture(scope="module")
def shared(model: str) -> LLM:
    return LLM(model, **OPTIONS)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """A model that a test must leave as idle as it found it."""
    shared.reset_prefix_cache()
    yield shared
    stats = shared.stats()
    assert stats.num_running == stats.num_waiting == stats.pages_used == 0


def generate(llm: LLM, prompts: Any, params: Any = GREEDY, **more: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False, **more)


def text(result: RequestOutput) -> str:
    return result.outputs[0].text


# ---- names


def test_importing_the_names_loads_no_torch() -> None:
    code = (
        "import sys, fourfold; assert not [m for m in sys.modules if m.startswith('fourfold.')];"
        "fourfold.SamplingParams(max_tokens=3); assert 'fourfold.llm' not in sys.modules;"
        "from fourfold import *; from fourfold import LLM, AsyncLLM, RequestOutput, CompletionOutput;"
        "import fourfold.core.client, fourfold.engine.client;"
        "assert 'torch' not in sys.modules; assert 'LLM' in dir(fourfold)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_errors(model: str) -> None:
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = fourfold.LMM
    with pytest.raises(TypeError, match="swap_space"):
        LLM(model, swap_space=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"gpu_memory_utilization": 2.0}, "gpu_memory_utilization"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype"),
        ({"speculative_config": {"method": "ngram"}}, '"method": "mtp"'),
        ({"speculative_config": {"method": "mtp", "k": 1}}, "unknown k"),
        ({"speculative_config": {"method": "mtp", "num_speculative_tokens": 9}}, "1 to 3"),
        ({"chat_profile": "v9"}, "v9"),
        ({"tensor_parallel_size": 2}, "not supported yet"),
        ({"device": "tpu"}, "tpu"),
        ({"tokenizer": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_options_are_named(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FourfoldError, match=message):
        LLM(model, **{**OPTIONS, **options})


def test_an_option_without_effect_says_so(model: str) -> None:
    with pytest.warns(UserWarning, match="trust_remote_code has no effect"):
        AsyncLLM(model, trust_remote_code=True, **OPTIONS)


# ---- prompts


def test_every_form_of_a_prompt_gives_the_same_answer(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("The river", allow_special=True)
    (expected,) = generate(llm, "The river")
    assert expected.prompt == "The river"
    assert expected.prompt_token_ids == ids
    assert len(expected.outputs[0].token_ids) == 8
    for form in (
        ["The river"],
        {"prompt": "The river"},
        [{"prompt": "The river", "cache_salt": "mine"}],
        ids,
        tuple(ids),
        [ids],
        {"prompt_token_ids": ids},
    ):
        (got,) = generate(llm, form)
        assert got.outputs == expected.outputs
        assert got.prompt_token_ids == ids
        assert got.prompt in ("The river", None)
    (named,) = generate(llm, {"prompt": "shown", "prompt_token_ids": ids})
    assert named.prompt == "shown"
    assert named.outputs == expected.outputs


def test_results_are_in_order_and_alone_equals_together(llm: LLM) -> None:
    prompts = ["The", "A small model", "<｜User｜>Hi", "你好，世界", "x" * 300, "1 2 3"]
    params = [replace(SAMPLED, seed=n, max_tokens=3 + 2 * n) for n in range(6)]
    together = generate(llm, prompts, params, priority=[3, 2, 1, 0, 5, 4])
    assert [r.prompt for r in together] == prompts
    assert len({r.request_id for r in together}) == 6
    assert 11 in together[2].prompt_token_ids or len(together[2].prompt_token_ids) < 6  # a marker
    for prompt, each, result in zip(prompts, params, together, strict=True):
        assert result.finished
        assert len(result.outputs[0].token_ids) == each.max_tokens
        assert generate(llm, prompt, each)[0].outputs == result.outputs


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (5, "prompts must be"),
        ([5, "a"], "found 5"),
        ([1.5], "found 1.5"),
        ({"promt": "a"}, "'promt'"),
        ({}, "found {}"),
        ([[1, 2], None], "found None"),
        ([], None),
        ([[]], "at least one token"),
        ([[-1]], "token -1"),
        ([[640]], "token 640"),
    ],
)
def test_bad_prompts_are_named(llm: LLM, prompts: Any, message: str | None) -> None:
    if message is None:
        assert generate(llm, prompts) == []
        return
    with pytest.raises(RequestError, match=message):
        generate(llm, prompts)


def test_a_refused_prompt_means_that_none_runs(llm: LLM) -> None:
    before = llm.stats().num_steps
    with pytest.raises(CapacityError, match=r"exceeds max_model_len \(1000\)"):
        generate(llm, ["fine", [1] * 999])
    with pytest.raises(RequestError, match="2 entries for 3 prompts"):
        generate(llm, ["a", "b", "c"], [GREEDY, GREEDY])
    with pytest.raises(RequestError, match="priority has 1 entries for 2"):
        generate(llm, ["a", "b"], priority=[1])
    assert llm.stats().num_steps == before
    assert len(generate(llm, "fine")) == 1


# ---- results


def test_log_probabilities_have_vllms_shape(llm: LLM) -> None:
    params = replace(GREEDY, logprobs=2, prompt_logprobs=0, max_tokens=3)
    (result,) = generate(llm, "The city", params)
    (answer,) = result.outputs
    assert answer.logprobs is not None
    assert result.prompt_logprobs is not None
    assert len(answer.logprobs) == 3
    for token, at in zip(answer.token_ids, answer.logprobs, strict=True):
        assert len(at) == 2  # the greedy token is the likeliest
        assert at[token].rank == 1
        assert at[token].decoded_token == llm.tokenizer.decode([token])
        assert sorted(each.rank or 0 for each in at.values()) == [1, 2]
    total = sum(at[t].logprob for t, at in zip(answer.token_ids, answer.logprobs, strict=True))
    assert answer.cumulative_logprob == pytest.approx(total)
    first, *others = result.prompt_logprobs
    assert first is None
    assert [list(at or ()) for at in others] == [[t] for t in result.prompt_token_ids[1:]]
    plain = generate(llm, "The city", replace(GREEDY, max_tokens=3))[0]
    assert plain.prompt_logprobs is None
    assert plain.outputs[0].logprobs is None
    assert plain.outputs[0].cumulative_logprob is None
    assert plain.outputs[0].token_ids == answer.token_ids


def test_why_an_answer_ended(llm: LLM) -> None:
    always = replace(GREEDY, ignore_eos=False)
    eos, pad = 1, 2

    def answer(**changes: Any) -> Any:
        return generate(llm, "The", replace(always, **changes))[0].outputs[0]

    ended = answer(logit_bias={eos: 100.0})
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert (ended.text, ended.token_ids) == ("", [eos])
    assert ended.finished()
    asked = answer(logit_bias={eos: 100.0}, stop_token_ids=[eos])
    assert (asked.finish_reason, asked.stop_reason) == ("stop", eos)
    for token in (0, pad):
        named = answer(logit_bias={token: 100.0}, stop_token_ids=[token])
        assert (named.finish_reason, named.stop_reason) == ("stop", token)
        assert (named.text, named.token_ids) == ("", [token])
    full = answer(ignore_eos=True)
    assert (full.finish_reason, full.stop_reason) == ("length", None)
    # A marker that ends nothing stays in the text.
    marker = answer(logit_bias={pad: 100.0}, max_tokens=2)
    assert marker.text == "<｜▁pad▁｜>" * 2


def test_metrics_and_cached_tokens(llm: LLM) -> None:
    ids = [3 + n % 500 for n in range(400)]
    first, again = (generate(llm, ids)[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert first.cache_miss is not None
    assert again.num_cached_tokens == 399
    assert again.cache_miss is None
    assert again.outputs == first.outputs
    metrics = first.metrics
    assert metrics is not None
    assert metrics.first_token_latency is not None
    assert metrics.last_token_latency is not None
    assert 0 < metrics.first_token_latency < metrics.last_token_latency


def test_numbers_that_are_not_finite_end_one_request(llm: LLM) -> None:
    table = llm._engine.loaded.model.embed.table
    expected = generate(llm, "The")
    kept = table[600].clone()
    table[600] = float("nan")
    bad, good = generate(llm, [[600, 5], "The"])
    table[600] = kept
    assert bad.outputs[0].finish_reason == "error"
    assert "not finite" in (bad.outputs[0].error or "")
    assert good.outputs == expected[0].outputs


# ---- stop strings


def test_a_stop_string_ends_the_text_before_it_and_the_request_in_the_engine(llm: LLM) -> None:
    (free,) = generate(llm, "The city", replace(SAMPLED, max_tokens=24))
    whole = text(free)
    assert len(whole) > 12
    for begin, end in ((1, 3), (4, 5), (6, 11)):
        stop = whole[begin:end]
        before = llm.stats().num_steps
        params = replace(SAMPLED, max_tokens=24, stop=[stop, "never said"], logprobs=0)
        (result,) = generate(llm, "The city", params)
        (answer,) = result.outputs
        assert answer.text == whole[: whole.index(stop)]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
        count = len(answer.token_ids)
        assert answer.token_ids == free.outputs[0].token_ids[:count]
        assert len(answer.logprobs or ()) == count < 24
        # The engine ran no further than the token that completed it.
        assert llm.stats().num_steps - before <= count + 2


def test_stop_strings_do_not_depend_on_drafts(model: str, llm: LLM) -> None:
    drafting = LLM(
        model, speculative_config={"method": "mtp", "num_speculative_tokens": 3}, **OPTIONS
    )
    (free,) = generate(llm, "The city", SAMPLED)
    whole = text(free)
    for at in range(0, len(whole) - 2, 3):
        params = replace(SAMPLED, stop=[whole[at : at + 2]])
        (plain,), (fast,) = (
            generate(llm, "The city", params),
            generate(drafting, "The city", params),
        )
        assert plain.outputs == fast.outputs
    assert sum(drafting.stats().drafted) > 0
    assert drafting.stats().pages_used == 0


def test_a_stop_string_ends_one_of_several_answers(llm: LLM) -> None:
    params = replace(SAMPLED, n=3)
    (free,) = generate(llm, "The city", params)
    stop = free.outputs[1].text[2:6]
    assert stop not in free.outputs[0].text + free.outputs[2].text
    (result,) = generate(llm, "The city", replace(params, stop=stop))
    assert result.outputs[0] == free.outputs[0]
    assert result.outputs[2] == free.outputs[2]
    assert result.outputs[1].text == free.outputs[1].text[: free.outputs[1].text.index(stop)]
    assert [o.finish_reason for o in result.outputs] == ["length", "stop", "length"]


def test_before_min_tokens_no_stop_string_counts(llm: LLM) -> None:
    whole = text(generate(llm, "The city", SAMPLED)[0])
    params = replace(SAMPLED, stop=[whole[0]], min_tokens=10)
    (answer,) = generate(llm, "The city", params)[0].outputs
    assert len(answer.token_ids) >= 10
    assert whole.startswith(answer.text)


# ---- streams and interruptions


def test_a_stream_grows_to_what_generate_gives(llm: LLM) -> None:
    prompts = ["The city", "A"]
    expected = generate(llm, prompts, SAMPLED)
    seen: dict[str | None, list[RequestOutput]] = {}
    for result in llm.stream(prompts, SAMPLED):
        seen.setdefault(result.prompt, []).append(result)
    for result in expected:
        steps = seen[result.prompt]
        assert steps[-1].outputs == result.outputs
        assert steps[-1].finished
        assert not steps[0].finished
        for earlier, later in itertools.pairwise(steps):
            assert text(later).startswith(text(earlier))
            assert len(later.outputs[0].token_ids) == len(earlier.outputs[0].token_ids) + 1


def test_a_stream_that_is_closed_leaves_nothing(llm: LLM) -> None:
    stream = llm.stream(["The", "A"], SAMPLED)
    next(stream)
    with pytest.raises(RequestError, match="running already"):
        generate(llm, "x")
    stream.close()
    assert len(generate(llm, "x")) == 1


def test_an_interrupted_step_spoils_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [3 + n % 500 for n in range(300)]
    expected = generate(llm, ids)[0].outputs
    step = Engine.step

    def interrupted(engine: Engine) -> Any:
        step(engine)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(llm, [ids, "The"])
    monkeypatch.undo()
    assert llm.stats().images == llm.stats().pages_used == 0
    (result,) = generate(llm, ids)
    assert result.num_cached_tokens == 0
    assert result.outputs == expected


def test_a_bar_is_shown_unless_it_is_not_wanted(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.generate(["a", "b"], GREEDY)
    assert "Processed prompts: 100%" in capsys.readouterr().err
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capsys.readouterr() == ("", "")


# ---- chat


def test_a_conversation_becomes_the_models_own_prompt(llm: LLM) -> None:
    thinking, plain = (
        llm.chat([QUESTION], GREEDY, False, chat_template_kwargs={"thinking": switch})[0]
        for switch in (True, False)
    )
    bos, user, assistant = (f"<｜{name}｜>" for name in ("begin▁of▁sentence", "User", "Assistant"))
    asked = f"{bos}{user}{QUESTION['content']}{assistant}"
    assert thinking.prompt == asked + "<think>"
    assert plain.prompt == asked + "</think>"
    tokenizer = llm.get_tokenizer()
    assert tokenizer.decode(thinking.prompt_token_ids) == thinking.prompt
    # What the user wrote is text: the only marker is the header's.
    assert thinking.prompt_token_ids.count(tokenizer.special_id("<think>")) == 1
    # The state before the header was kept, so the other header resumes from there.
    assert plain.num_cached_tokens == len(plain.prompt_token_ids) - 1
    assert len(plain.outputs[0].token_ids) == 8


def test_several_conversations_and_tools(llm: LLM) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    conversations = [[QUESTION], [{"role": "system", "content": "Be brief."}, QUESTION]]
    both = llm.chat(conversations, GREEDY, use_tqdm=False, tools=[tool])
    assert all('"look_up"' in (result.prompt or "") for result in both)
    alone = [llm.chat(each, GREEDY, use_tqdm=False, tools=[tool])[0] for each in conversations]
    assert [r.outputs for r in both] == [r.outputs for r in alone]
    continued = [QUESTION, {"role": "assistant", "content": "It is"}]
    (result,) = llm.chat(continued, GREEDY, use_tqdm=False, continue_final_message=True)
    assert (result.prompt or "").endswith("It is")


@pytest.mark.parametrize(
    ("messages", "kwargs", "message"),
    [
        ("hello", None, "messages must be a list"),
        ([{"role": "friend"}], None, r"messages\[0\]\.role"),
        ([QUESTION], {"thinkin": True}, "'thinkin'"),
        ([QUESTION], {"reasoning_effort": "heroic"}, "reasoning_effort"),
        ([], None, "at least one message"),
    ],
)
def test_bad_conversations_are_named(llm: LLM, messages: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.chat(messages, GREEDY, chat_template_kwargs=kwargs)


# ---- the async variant


@asynccontextmanager
async def async_llm(model: str) -> AsyncIterator[AsyncLLM]:
    """One whose engine runs in a thread."""
    llm = AsyncLLM(model, **OPTIONS)
    await llm.start(InProcessEngineClient(llm.launch))
    async with llm:
        yield llm


async def last(results: AsyncIterator[RequestOutput]) -> RequestOutput:
    found = [result async for result in results]
    assert all(text(b).startswith(text(a)) for a, b in itertools.pairwise(found))
    assert [result.finished for result in found] == [False] * (len(found) - 1) + [True]
    return found[-1]


def test_the_async_variant_gives_the_same(model: str, llm: LLM) -> None:
    prompts = ["The city", [5, 6, 7], {"prompt": "A"}]
    expected = generate(llm, prompts, replace(SAMPLED, n=2))
    stop = expected[0].outputs[0].text[2:5]
    stopped = generate(llm, prompts, replace(SAMPLED, n=2, stop=stop))
    chatted = llm.chat([QUESTION], GREEDY, use_tqdm=False)

    async def run() -> None:
        async with async_llm(model) as llm:
            for params, known in (
                (replace(SAMPLED, n=2), expected),
                (replace(SAMPLED, n=2, stop=stop), stopped),
            ):
                work = [last(llm.generate(prompt, params)) for prompt in prompts]
                got = await asyncio.gather(*work)
                assert [r.outputs for r in got] == [r.outputs for r in known]
            answer = await last(llm.chat([QUESTION], GREEDY))
            assert answer.outputs == chatted[0].outputs
            assert answer.prompt == chatted[0].prompt
            with pytest.raises(CapacityError):
                await last(llm.generate([1] * 999))
            stats = await llm.stats()
            assert stats.num_running == stats.pages_used == 0

    asyncio.run(run())


def test_an_async_request_can_be_left_or_aborted(model: str) -> None:
    long = replace(GREEDY, max_tokens=900)

    async def run() -> None:
        async with async_llm(model) as llm:
            async for result in llm.generate("The", long):
                assert result.outputs[0].finish_reason is None
                break
            ended = asyncio.create_task(last(llm.generate("The", long, "mine")))
            while (await llm.stats()).num_running == 0:
                await asyncio.sleep(0.01)
            assert await llm.abort("mine")
            assert (await ended).outputs[0].finish_reason == "abort"
            assert not await llm.abort("mine")
            await llm.reset_prefix_cache()
            stats = await llm.stats()
            assert stats.num_running == stats.num_waiting == stats.images == 0

    asyncio.run(run())


@pytest.mark.full
def test_the_async_variant_in_a_process(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    async def run() -> list[RequestOutput]:
        async with AsyncLLM(model, **OPTIONS) as llm:
            work = [last(llm.generate(prompt, GREEDY)) for prompt in ("The city", "A")]
            return await asyncio.gather(*work)

    async def refused() -> None:
        llm = AsyncLLM(model, **{**OPTIONS, "max_model_len": 10**7})
        with pytest.raises(CapacityError, match="max_position_embeddings"):
            await last(llm.generate("The city", GREEDY))

    got = asyncio.run(run())
    assert all(len(r.outputs[0].token_ids) == 8 for r in got)
    asyncio.run(refused())


def test_an_async_option_that_is_wrong_is_refused_before_any_process(model: str) -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        AsyncLLM(model, max_num_seqs=-1)
