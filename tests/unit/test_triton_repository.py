"""The model servers: reading requests, the models' parameters, the model repository, and the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

from deploy.triton.contract import INPUTS, OUTPUTS
from deploy.triton.models import smollm2, stand_in_judge, stand_in_llm
from deploy.triton.repository import ParameterError, RepositoryError, write_repository
from deploy.triton.request import InvalidRequestError, read_request
from deploy.triton.serve import arguments, chosen_models
from deploy.triton.server import Server, TritonPorts
from deploy.triton.stand_in.batching import CurveRules, RecordedRules
from deploy.triton.stand_in.faults import FaultRules
from deploy.triton.stand_in.judge import JudgeRules
from deploy.triton.stand_in.parameters import StandInParameters, named_curve, read_directives
from deploy.triton.stand_in.prompt import Directive
from deploy.triton.stand_in.workload import WorkloadError
from shared.batch_curve import MEASURED

WORKLOAD = Path("/data/w.jsonl")
CURVE_TEXTS = {f"curve.{name}": "1" for name in ("idle_w", "step_j", "token_j", "step_s", "token_s")}


def tensors(**values):
    def array(value):
        if isinstance(value, np.ndarray):
            return value
        return np.array(
            [[value.encode() if isinstance(value, str) else value]], dtype=object if isinstance(value, str) else None
        )

    return {
        name: array(value)
        for name, value in {"text_input": "hello", "max_tokens": 5, **values}.items()
        if value is not None
    }


def test_a_request_is_read_from_its_tensors():
    request = read_request(
        tensors(stream=True, exclude_input_in_output=True, temperature=0.5, seed=7, return_num_output_tokens=True,
                stop_words=np.array([[b"</s>", b"", b"[INST]"]], dtype=object))
    )  # fmt: skip
    assert (request.text, request.max_tokens, request.stop_words) == ("hello", 5, ("</s>", "[INST]"))
    assert (request.stream, dict(request.sampling)) == (True, {"temperature": 0.5, "seed": 7})
    assert request.return_num_output_tokens
    assert not request.return_log_probs


def test_only_an_answer_that_is_not_streamed_begins_with_the_prompt():
    assert read_request(tensors()).echoes_input
    assert not read_request(tensors(stream=True)).echoes_input
    assert not read_request(tensors(exclude_input_in_output=True)).echoes_input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text_input": None}, "'text_input' is missing"),
        ({"text_input": "  "}, "'text_input' is empty"),
        ({"text_input": np.array([[b"\xff"]], dtype=object)}, "'text_input' is not UTF-8"),
        ({"text_input": np.array([[b"a"], [b"b"]], dtype=object)}, "batches are not supported"),
        ({"max_tokens": None}, "'max_tokens' is missing"),
        ({"max_tokens": 0}, "'max_tokens' must lie between 1"),
        ({"max_tokens": -3}, "got -3"),
        ({"beam_width": 4}, "'beam_width' must be 1 here, got 4"),
        ({"num_return_sequences": 2}, "'num_return_sequences' must be 1"),
        ({"return_context_logits": True}, "'return_context_logits' is not supported"),
        ({"temperature": -1.0}, "'temperature' must be a number between 0"),
        ({"top_p": 1.5}, "'top_p' must be a number between 0 and 1"),
        ({"top_k": -1}, "'top_k' must not be negative"),
    ],
)
def test_an_invalid_request_is_rejected_by_the_tensors_name(given, message):
    with pytest.raises(InvalidRequestError, match=message):
        read_request(tensors(**given))


@pytest.mark.parametrize(
    ("batch", "idle_power_w"),
    [
        (RecordedRules(slots=9, slowdown=0.5, shared_energy=0.25), 12.5),
        (CurveRules(curve=MEASURED["llama-3.1-8b-h100"].stretched(3.0), slots=9), 0.0),
    ],
)
def test_parameters_survive_the_round_trip_through_a_configuration(batch, idle_power_w):
    parameters = StandInParameters(
        workload=WORKLOAD,
        model="m",
        gpu_uuid="g",
        idle_power_w=idle_power_w,
        directives=(Directive("L1", 'Say "less".'),),
        tick_ms=7.0,
        batch=batch,
        judge=JudgeRules(position_bias=0.3, unparseable=0.01),
        faults=FaultRules(error_share=0.3, seed=7),
    )
    assert StandInParameters.from_texts(parameters.to_texts()) == parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wrokload": "x"}, "'wrokload' is not a parameter"),
        ({"role": "poet"}, "'role' must be one of llm, judge"),
        ({"model": ""}, "'model' is missing"),
        ({"tick_ms": "soon"}, "'tick_ms' must be a number, got 'soon'"),
        ({"judge.position_bias": "2"}, "'position_bias' is a probability"),
        ({"faults.error_share": "-1"}, "'error_share' is a probability"),
        ({"directives": "L1"}, "'directives' must be a JSON list"),
        ({"curve.idle_w": "1"}, "'curve.step_j' is missing"),
        (CURVE_TEXTS, "'batch.shared_energy' has no effect with a curve"),
    ],
)
def test_invalid_parameters_are_rejected_by_name(changes, message):
    texts = StandInParameters(workload=WORKLOAD, model="m", gpu_uuid="g").to_texts()
    with pytest.raises(ParameterError, match=message):
        StandInParameters.from_texts({**texts, **changes})


def test_directives_are_read_from_json():
    assert read_directives('[{"level": "L1", "text": "Be brief."}]') == (Directive("L1", "Be brief."),)


def test_a_repository_has_a_folder_for_each_model(tmp_path):
    models = [
        stand_in_llm(WORKLOAD),
        stand_in_llm(WORKLOAD, model="llama-2-7b-chat", name="ensemble-7b"),
        stand_in_judge(WORKLOAD),
        smollm2(name="smol", energy_source="modelled"),
    ]
    write_repository(tmp_path / "models", models)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["ensemble", "ensemble-7b", "judge", "smol"]
    config = (tmp_path / "models/ensemble-7b/config.pbtxt").read_text()
    assert 'name: "ensemble-7b"' in config
    assert "decoupled: true" in config
    assert 'key: "model" value { string_value: "llama-2-7b-chat" }' in config
    for tensor in (*INPUTS, *OUTPUTS):
        assert f'name: "{tensor.name}" data_type: TYPE_{tensor.data_type}' in config
    assert [model.gpu_uuid for model in models] == [
        "stand-in-llama-2-13b-chat", "stand-in-llama-2-7b-chat", "stand-in-judge", "cpu-modelled",
    ]  # fmt: skip
    source = (tmp_path / "models/smol/1/model.py").read_text()
    compile(source, "model.py", "exec")
    assert "deploy.triton.smollm2.model" in source


def test_a_model_with_a_curve_has_a_companion_that_meters_its_idle_and_asleep_power(tmp_path):
    curve = MEASURED["qwen3-14b-h100"]
    model = stand_in_llm(WORKLOAD, gpu_uuid="gpu-2", batch=CurveRules(curve=curve))
    assert (model.idle_power_w, model.asleep_power_w) == (100.0, 10.0)
    assert model.parameters["idle_power_w"] == "0.0"
    write_repository(tmp_path, [model, stand_in_judge(WORKLOAD)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ensemble", "ensemble-gpu", "judge"]
    config = (tmp_path / "ensemble-gpu/config.pbtxt").read_text()
    parameters = {"model": "ensemble", "gpu_uuid": "gpu-2", "idle_power_w": "100.0", "asleep_power_w": "10.0"}
    for name, value in parameters.items():
        assert f'key: "{name}" value {{ string_value: "{value}" }}' in config
    assert "deploy.triton.gpu" in (tmp_path / "ensemble-gpu/1/model.py").read_text()


def test_an_idle_power_beside_a_curve_is_rejected():
    batch = CurveRules(curve=MEASURED["qwen3-14b-h100"])
    with pytest.raises(ParameterError, match="'idle_power_w' has no effect with a curve"):
        stand_in_llm(WORKLOAD, batch=batch, idle_power_w=55.0)
    with pytest.raises(ParameterError, match="'idle_power_w' has no effect with a curve"):
        StandInParameters(workload=WORKLOAD, model="m", gpu_uuid="g", batch=batch)


def test_a_curve_has_a_name_and_may_be_stretched():
    assert named_curve("llama-3.1-8b-h100", stretch=200.0) == MEASURED["llama-3.1-8b-h100"].stretched(200.0)
    with pytest.raises(ParameterError, match="no curve 'a100'; use one of: qwen3-14b-h100, "):
        named_curve("a100")
    with pytest.raises(ParameterError, match="'stretch' must be greater than 0"):
        named_curve("llama-3.1-8b-h100", stretch=0.0)


def test_writing_a_repository_replaces_its_content(tmp_path):
    write_repository(tmp_path, [stand_in_llm(WORKLOAD), stand_in_judge(WORKLOAD)])
    write_repository(tmp_path, [stand_in_llm(WORKLOAD)])
    assert [path.name for path in tmp_path.iterdir()] == ["ensemble"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "at least one model"),
        ([stand_in_llm(WORKLOAD, name="a/b")], "is not a model name"),
        ([stand_in_llm(WORKLOAD), stand_in_llm(WORKLOAD, gpu_uuid="g")], "model name used twice.*ensemble"),
        ([stand_in_llm(WORKLOAD), stand_in_llm(WORKLOAD, name="other")], "'gpu_uuid' used twice"),
        (
            [
                stand_in_llm(WORKLOAD, name="a", batch=CurveRules(curve=MEASURED["qwen3-14b-h100"])),
                stand_in_llm(WORKLOAD, name="a-gpu", gpu_uuid="g"),
            ],
            "model name used twice.*a-gpu",
        ),
    ],
)
def test_models_that_cannot_be_combined_are_rejected(tmp_path, models, message):
    with pytest.raises(RepositoryError, match=message):
        write_repository(tmp_path / "models", models)


def test_clients_control_the_models_of_a_server_only_where_it_is_allowed():
    server = Server(Path("/bin/tritonserver"), Path("/b"), Path("/bin/python3"), ())
    ports = TritonPorts(1, 2, 3)
    assert {"--model-control-mode=explicit", "--load-model=*"} <= set(
        server.command(Path("/m"), ports, address="127.0.0.1")
    )
    command = server.command(Path("/m"), ports, address="0.0.0.0", model_control=False)
    assert not any("model-control" in argument or "load-model" in argument for argument in command)


@pytest.fixture
def small(tmp_path):
    answers = {f"{model}/L0": {"energy_j": 1.0, "time_s": 1.0} for model in ("llama-2-13b-chat", "llama-2-7b-chat")}
    path = tmp_path / "small.jsonl"
    path.write_text(json.dumps({"task": "t", "prompt": "p", "preferred": None, "responses": answers}))
    return path


def test_serve_takes_options_that_are_not_given_from_the_environment(small):
    environment = {
        "WORKLOAD": str(small),
        "SPROUT_TRITON_MODELS": "ensemble=llama-2-13b-chat,fast=llama-2-7b-chat",
        "SPROUT_TRITON_POSITION_BIAS": "0.4",
        "SPROUT_TRITON_IDLE_POWER_W": "60",
        "SPROUT_TRITON_CURVE": "recorded",
    }
    models = chosen_models(arguments(["--idle-power-w", "70"], environment), say=print)
    assert [model.name for model in models] == ["ensemble", "fast", "judge"]
    assert models[0].idle_power_w == 70
    assert models[2].parameters["judge.position_bias"] == "0.4"
    assert [m.name for m in chosen_models(arguments(["--judge", "none", "--models", "e=smollm2"], {}), say=print)] == [
        "e"
    ]


def test_serve_has_a_measured_curve_by_default_and_takes_another_or_recorded_energy(small):
    def llm(*given):
        return chosen_models(arguments([*given, "--judge=none"], {"WORKLOAD": str(small)}), say=print)[0]

    def batch(*given):
        return StandInParameters.from_texts(llm(*given).parameters).batch

    assert batch() == CurveRules(curve=MEASURED["qwen3-14b-h100"])
    assert batch("--curve=llama-3.1-8b-h100", "--stretch=200", "--slots=9") == CurveRules(
        curve=MEASURED["llama-3.1-8b-h100"].stretched(200.0), slots=9
    )
    assert batch("--curve=recorded", "--slowdown=0.5") == RecordedRules(slowdown=0.5)
    assert llm("--curve=recorded").idle_power_w == 55
    assert llm("--gpu-uuid=gpu-3").gpu_uuid == "gpu-3"


def test_servers_with_labels_of_their_own_fail_on_different_requests(small):
    seeds = []
    for gpu in ("gpu-0", "gpu-1"):
        options = arguments([f"--gpu-uuid={gpu}", "--error-share=0.1"], {"WORKLOAD": str(small)})
        seeds.append(StandInParameters.from_texts(chosen_models(options, say=print)[0].parameters).faults.seed)
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (["--models", "ensemble"], ParameterError, "--models must be name=model"),
        (["--models", "ensemble=gpt-5"], WorkloadError, "no answers of model 'gpt-5'"),
        (["--workload", "/nonexistent.jsonl"], WorkloadError, "cannot be read"),
        (["--slots", "0"], ValueError, "'slots' must be at least 1"),
        (["--curve", "a100"], ParameterError, "--curve must be recorded or one of qwen3-14b-h100, llama-3.1"),
        (["--stretch", "-1"], ParameterError, "'stretch' must be greater than 0"),
        (["--stretch", "2", "--curve", "recorded"], ParameterError, "--stretch is for a curve"),
        (["--slowdown", "0.1"], ParameterError, "--slowdown is for recorded energy"),
        (["--idle-power-w", "55"], ParameterError, "--idle-power-w is for recorded energy"),
        (
            ["--gpu-uuid", "g", "--models", "a=llama-2-13b-chat,b=llama-2-7b-chat"],
            ParameterError,
            "--gpu-uuid is for a single model, and --models names 2",
        ),
    ],
)
def test_serve_rejects_invalid_options(small, given, error, message):
    with pytest.raises(error, match=message):
        chosen_models(arguments(given, {"WORKLOAD": str(small)}), say=print)
