"""Which contract a model speaks, what it is asked in it, and how its answer is put together."""

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.grpc.service_pb2 import ModelInferResponse

from deploy.triton.contract import CONTRACTS
from shared.inference.base import EndpointUnavailable, GenerationParameters, InvalidRequest
from shared.inference.triton.assembly import AnswerAssembler, BrokenStreamError, StopScanner
from shared.inference.triton.channel import status_error, stream_error
from shared.inference.triton.contract import ContractError, ModelContract
from shared.inference.triton.wire import Part, decode, encode

NAMES = ("ensemble", "llm-api")


def config(name: str, *, without: tuple[str, ...] = (), decoupled: bool = True) -> ModelConfig:
    spec = CONTRACTS[name]
    made = ModelConfig(name="m", max_batch_size=spec.max_batch_size)
    made.model_transaction_policy.decoupled = decoupled
    for tensor in spec.inputs:
        if tensor.name not in without:
            made.input.add(name=tensor.name, data_type=f"TYPE_{tensor.data_type}", optional=tensor.optional)
    for tensor in spec.outputs:
        made.output.add(name=tensor.name, data_type=f"TYPE_{tensor.data_type}")
    return made


def encoded(name: str, **parameters) -> dict[str, tuple[list[int], bytes]]:
    contract = ModelContract.from_config(config(name))
    request = encode(
        contract, "hi", GenerationParameters(**{"max_tokens": 9, **parameters}), request_id="r", stream=True
    )
    return {
        tensor.name: (list(tensor.shape), content)
        for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True)
    }


def answered(text: str, reason: str) -> ModelInferResponse:
    response = ModelInferResponse()
    for name, word in (("text_output", text), ("finish_reason", reason)):
        response.outputs.add(name=name, datatype="BYTES")
        response.raw_output_contents.append(len(word.encode()).to_bytes(4, "little") + word.encode())
    return response


@pytest.mark.parametrize("name", NAMES)
def test_a_models_configuration_tells_its_contract(name):
    contract = ModelContract.from_config(config(name))
    assert contract.name == name
    assert contract.cumulative == (name == "llm-api")
    assert contract.batched == (name == "ensemble")
    assert (contract.completion_tokens is None) == (name == "llm-api")
    assert contract.capabilities.unsupported_sampling == (
        ("min_tokens", "repetition_penalty") if name == "llm-api" else ()
    )


def test_the_llm_api_is_asked_in_tensors_without_a_batch_and_never_for_stop_sequences():
    sent = encoded("llm-api", temperature=0.5, seed=3, stop=("END",))
    assert sent["text_input"] == ([1], b"\x02\x00\x00\x00hi")
    assert sent["sampling_param_max_tokens"] == ([1], b"\x09\x00\x00\x00")
    assert sent["sampling_param_seed"] == ([1], b"\x03" + b"\x00" * 7)
    assert sent["streaming"][1] == b"\x01"
    assert sent["sampling_param_exclude_input_from_output"][1] == b"\x01"
    assert sent["return_finish_reason"][1] == b"\x01"
    assert not {"sampling_param_stop", "stop"} & set(sent)


def test_the_ensemble_is_asked_in_batches_of_one_and_told_of_stop_sequences():
    sent = encoded("ensemble", stop=("END",))
    assert sent["max_tokens"] == ([1, 1], b"\x09\x00\x00\x00")
    assert sent["stop_words"] == ([1, 1], b"\x03\x00\x00\x00END")


def test_a_sampling_parameter_without_an_input_is_refused_by_name():
    with pytest.raises(InvalidRequest, match=r"sampling\.repetition_penalty cannot be served: model 'm'"):
        encoded("llm-api", repetition_penalty=1.2)


@pytest.mark.parametrize("missing", ["text_input", "sampling_param_max_tokens"])
def test_a_model_of_neither_contract_is_refused_with_what_it_lacks(missing):
    with pytest.raises(ContractError, match=r"text_input and max_tokens or text_input and sampling_param_max_tokens"):
        ModelContract.from_config(config("llm-api", without=(missing,)))


@pytest.mark.parametrize(
    ("word", "reason"),
    [("None", None), ("stop", "stop"), ("length", "length"), ("timeout", "deadline"), ("cancelled", "cancelled")],
)
def test_the_servers_finish_reason_is_read_and_its_word_for_none_is_none(word, reason):
    contract = ModelContract.from_config(config("llm-api"))
    assert decode(contract, answered("so far", word)) == Part("so far", None, None, final=False, finish_reason=reason)


@pytest.mark.parametrize(
    ("name", "said", "kind"),
    [
        ("llm-api", "Error generating request: The sum of prompt length (9), query length (0) should", InvalidRequest),
        ("llm-api", "Error generating request: out of memory", EndpointUnavailable),
        ("ensemble", "The sum of prompt length", EndpointUnavailable),
    ],
)
def test_a_prompt_that_is_too_long_for_the_llm_api_is_not_taken_for_a_broken_endpoint(name, said, kind):
    phrases = ModelContract.from_config(config(name)).invalid_request_phrases
    for error in (
        status_error("e0", grpc.StatusCode.INTERNAL, said, invalid_request_phrases=phrases),
        stream_error("e0", said, invalid_request_phrases=phrases),
    ):
        assert type(error) is kind
        assert (said in error.for_requester, said in str(error)) == (True, False)


def assembled(texts, *, reason="stop", **options):
    assembler = AnswerAssembler("p", GenerationParameters(max_tokens=50, stop=("END",)), started_at_s=0.0, **options)
    fresh = []
    for index, text in enumerate(texts):
        last = index == len(texts) - 1
        fresh.append(assembler.add(Part(text, None, None, final=last, finish_reason=reason if last else None), now_s=1))
    return fresh, assembler.result(now_s=2.0)


def test_parts_that_carry_the_whole_answer_so_far_are_told_apart():
    fresh, generation = assembled(["One", "One", "One two", "One two three"], cumulative=True)
    assert fresh == ["One", "", " two", " three"]
    assert generation.text == "One two three"
    assert (generation.completion_tokens, generation.token_count_source) == (3, "stream")


def test_a_character_that_is_not_complete_yet_is_waited_for():
    fresh, generation = assembled(["Caf\ufffd", "Café", "Café \ufffd"], cumulative=True)
    assert fresh == ["Caf", "é", " \ufffd"]  # one that never gets complete is the model's own
    assert generation.text == "Café \ufffd"


def test_an_answer_that_is_taken_back_at_its_end_adds_nothing():
    assert assembled(["One two", "One"], cumulative=True)[0] == ["One two", ""]


def test_parts_that_do_not_go_on_from_one_another_are_an_error_not_an_answer():
    with pytest.raises(BrokenStreamError, match="does not continue the parts before it"):
        assembled(["One", " two"], cumulative=True)


@pytest.mark.parametrize("reason", ["length", "deadline", "cancelled"])
def test_the_servers_finish_reason_counts_unless_a_stop_sequence_ended_the_answer(reason):
    assert assembled(["One"], reason=reason)[1].finish_reason == reason
    assert assembled(["One END two"], reason=reason)[1].finish_reason == "stop"


@given(
    st.text(alphabet="abEND ", max_size=30),
    st.lists(st.integers(min_value=0, max_value=40), max_size=6),
    st.booleans(),
)
def test_a_stop_sequence_ends_the_text_wherever_the_parts_are_cut(text, cuts, cumulative):
    """Also where it is spread over several parts; the text before it is complete, that after it is gone."""
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    ends = edges[1:]
    parts = [text[:end] if cumulative else text[begin:end] for begin, end in zip(edges, ends, strict=False)]
    fresh, generation = assembled(parts, cumulative=cumulative)
    assert generation.text == text.partition("END")[0]
    assert "".join(fresh) == generation.text


def test_what_might_begin_a_stop_sequence_is_held_back_and_passed_on_when_it_does_not():
    scanner = StopScanner(("END", "E!"))
    assert [scanner.feed(piece) for piece in ("a E", "N", "x E")] == ["a ", "", "ENx "]
    assert scanner.flush() == "E"
