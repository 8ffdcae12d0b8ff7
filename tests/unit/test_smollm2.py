"""SmolLM2: translation to llama.cpp's requests and from its chunks, parameters, and sources of energy."""

import pytest

from deploy.triton.repository import ParameterError
from deploy.triton.request import GenerationRequest
from deploy.triton.smollm2.engine import CompletionError, Progress, completion_body
from deploy.triton.smollm2.parameters import SmolLm2Parameters
from deploy.triton.smollm2.power import CpuTimeModel, RaplCounter, RaplError, available_source, energy_label

PARAMETERS = SmolLm2Parameters(gpu_uuid="cpu-modelled")


def chunk(text, *, reason=None, usage=None, **more):
    return {"choices": [{"text": text, "finish_reason": reason, "logprobs": more.pop("logprobs", None)}],
            **({"usage": usage} if usage else {}), **more}  # fmt: skip


def test_a_request_is_translated_for_llama_cpp():
    body = completion_body(
        GenerationRequest(
            text="p",
            max_tokens=9,
            stop_words=("x",),
            sampling={"temperature": 0.0, "seed": 2**40 + 3, "repetition_penalty": 1.1, "min_tokens": 4},
            return_log_probs=True,
        ),
        PARAMETERS,
    )
    assert (body["prompt"], body["n_predict"], body["stop"], body["temperature"]) == ("p", 9, ["x"], 0.0)
    assert body["seed"] == 3
    assert body["n_probs"] == 1
    assert body["top_p"] == PARAMETERS.top_p
    assert body["repeat_penalty"] == 1.1
    assert not {"top_k", "min_tokens"} & set(body)
    assert body["cache_prompt"] is False


def test_each_chunk_is_a_token_and_the_last_one_corrects_the_count():
    progress = Progress()
    for text in ("The", " sky"):
        progress.take(chunk(text))
    assert (progress.text, progress.tokens, progress.finished) == ("The sky", 2, False)
    progress.sent()
    progress.take(chunk(""))  # the end-of-text token has no text
    progress.take(chunk("", reason="stop", usage={"completion_tokens": 4, "prompt_tokens": 11}))
    assert (progress.text, progress.tokens, progress.finished, progress.prompt_tokens) == ("", 2, True, 11)


def test_log_probabilities_and_the_prompts_length_are_read_where_present():
    progress = Progress()
    progress.take(chunk("a", logprobs={"content": [{"logprob": -0.5}]}, timings={"prompt_n": 7}))
    assert progress.log_probs == [-0.5]
    assert progress.prompt_tokens == 7


@pytest.mark.parametrize(
    ("error", "invalid"),
    [
        ({"code": 400, "message": "prompt too long"}, True),
        ({"code": 500, "message": "no memory"}, False),
        ("odd", False),
    ],
)
def test_an_error_tells_whether_the_request_is_invalid(error, invalid):
    with pytest.raises(CompletionError) as caught:
        Progress().take({"error": error})
    assert caught.value.invalid is invalid


def test_parameters_survive_the_round_trip_through_a_configuration():
    parameters = SmolLm2Parameters(gpu_uuid="g", energy_source="rapl", slots=3, temperature=0.7)
    assert SmolLm2Parameters.from_texts(parameters.to_texts()) == parameters


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "'gpu_uuid' is missing"),
        ({"gpu_uuid": "g", "slots": "0"}, "'slots' must be at least 1"),
        ({"gpu_uuid": "g", "slots": "many"}, "'slots' must be a number"),
        ({"gpu_uuid": "g", "energy_source": "guess"}, "'energy_source' must be one of"),
        ({"gpu_uuid": "g", "colour": "red"}, "'colour' is not a parameter"),
    ],
)
def test_invalid_parameters_are_rejected_by_name(texts, message):
    with pytest.raises(ParameterError, match=message):
        SmolLm2Parameters.from_texts(texts)


def package(folder, name, uj, range_uj=1_000_000_000):
    zone = folder / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{uj}\n")
    (zone / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return zone / "energy_uj"


def test_rapl_adds_up_packages_and_handles_wrapping_counters(tmp_path):
    first = package(tmp_path, "intel-rapl:0", 999_000_000)
    second = package(tmp_path, "intel-rapl:1", 5_000_000)
    package(tmp_path, "intel-rapl:0:0", 123)  # a part of the first
    counter = RaplCounter(tmp_path)
    first.write_text("4000000")
    second.write_text("6000000")
    assert counter.read_j() == pytest.approx(5.000001 + 1.0)
    assert counter.read_j() == pytest.approx(6.000001)
    assert available_source(tmp_path) == "rapl"


def test_without_rapl_energy_is_modelled_and_its_label_says_so(tmp_path):
    with pytest.raises(RaplError, match="no RAPL package"):
        RaplCounter(tmp_path)
    assert available_source(tmp_path / "absent") == "modelled"
    assert energy_label("modelled") == "cpu-modelled"
    assert energy_label("rapl") == "cpu-rapl"


def test_modelled_energy_is_cpu_time_times_a_cores_power():
    times = iter([10.0, 12.5])
    assert CpuTimeModel(6.0, cpu_time_s=lambda: next(times)).read_j() == pytest.approx(15.0)
