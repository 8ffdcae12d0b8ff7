"""The fleet file: directives, models and pools; a mistake is named with its place."""

from pathlib import Path

import pytest

from shared.fleet import FleetError, load_fleet, reworded

GOOD = """
[[directives]]
level = "L0"
[[directives]]
level = "L1"
text = "Always answer briefly."

[[models]]
name = "llama-2-13b-chat"
chat_template = "llama-2"

[[pools]]
name = "california"
model = "llama-2-13b-chat"
zone = "US-CAL-CISO"
[[pools.endpoints]]
name = "california-0"
grpc = "triton-0:8001"
metrics = "http://triton-0:8002/metrics"

[[pools]]
name = "texas"
model = "llama-2-13b-chat"
zone = "US-TEX-ERCO"
[[pools.endpoints]]
name = "texas-0"
grpc = "triton-1:8001"

[[pools]]
name = "judge"
zone = "US-CAL-CISO"
triton_model = "judge"
[[pools.endpoints]]
name = "judge-0"
grpc = "triton-0:8001"

[judge]
pool = "judge"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "fleet.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_options_are_pools_times_levels_and_the_reference_is_the_first(tmp_path: Path) -> None:
    fleet = load_fleet(written(tmp_path, GOOD))
    assert fleet.options_of("llama-2-13b-chat") == ("california/L0", "california/L1", "texas/L0", "texas/L1")
    assert fleet.reference_of("llama-2-13b-chat") == "california/L0"
    assert fleet.same_as_reference("llama-2-13b-chat") == ("california/L0", "texas/L0")
    mixed = load_fleet(written(tmp_path, GOOD.replace('name = "texas"', 'name = "texas"\nvariant = "llama-2-7b-chat"')))
    assert mixed.same_as_reference("llama-2-13b-chat") == ("california/L0",)
    assert fleet.zones == ("US-CAL-CISO", "US-TEX-ERCO")
    assert fleet.chat_template_of(fleet.pool("texas")) == "llama-2"
    assert fleet.directive_text("L1") == "Always answer briefly."
    assert fleet.directive_text("L0") == ""


def test_embodied_carbon_defaults_to_the_papers_server(tmp_path: Path) -> None:
    fleet = load_fleet(written(tmp_path, GOOD))
    assert fleet.pool("california").embodied_g_per_s == pytest.approx(1.6715e-4, rel=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('model = "llama-2-13b-chat"', 'model = "gpt"', "serves model 'gpt', which 'models' does not list"),
        ('name = "texas"', 'name = "california"', "pools.name must be unique; given more than once: california"),
        ('text = "Always answer briefly."', "", "L1 need a 'text'"),
        ('level = "L0"', 'level = "L9"', "must be level L0"),
        ('grpc = "triton-1:8001"', 'grpc = "http://triton-1"', "pools.1.endpoints.0.grpc"),
        ('pool = "judge"', 'pool = "nobody"', "judge.pool names 'nobody'"),
        (
            'grpc = "triton-1:8001"',
            'grpc = "triton-1:8001"\ntls_ca_file = "ca.pem"',
            "endpoint 'texas-0': tls_ca_file would not be used: set tls = true",
        ),
        (
            'grpc = "triton-1:8001"',
            'grpc = "triton-1:8001"\ntls = true\ntls_cert_file = "c.pem"',
            "a client's certificate needs its key, and the key its certificate: add 'tls_key_file'",
        ),
        (
            "[judge]",
            '[[tenants]]\nname = "a"\nmodel = "gpt"\n[judge]',
            "tenant 'a' has model 'gpt', which 'models' does not list",
        ),
        (
            "[judge]",
            '[[tenants]]\nname = "a"\ndirective = "L7"\n[judge]',
            r"tenant 'a' has directive 'L7', which 'directives' does not list \(listed: L0, L1; or optimize\)",
        ),
        ("[judge]", '[[tenants]]\nname = "a"\ndirective = "brief"\n[judge]', "tenants.0.directive"),
        ("[judge]", '[[tenants]]\nname = "a"\n[[tenants]]\nname = "a"\n[judge]', "tenants.name must be unique"),
        (
            "[judge]",
            '[[tenants]]\nname = "a"\nsampling = { temperatur = 1.0 }\n[judge]',
            "tenants.0.sampling.temperatur: Extra inputs",
        ),
        (
            "[judge]",
            '[[tenants]]\nname = "a"\nsampling = { max_tokens = 0 }\n[judge]',
            "tenants.0.sampling.max_tokens",
        ),
        ('zone = "US-TEX-ERCO"', 'zone = "US-TEX-ERCO"\nzoen = 1', "pools.1.zoen: Extra inputs"),
        ("[[models]]", "[[models", "not valid TOML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(FleetError, match=message.replace("[", r"\[")):
        load_fleet(written(tmp_path, GOOD.replace(old, new, 1)))


def test_a_missing_file_says_which_variable_names_one(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="SPROUT_FLEET_FILE"):
        load_fleet(tmp_path / "nowhere.toml")


def test_a_tokenizers_path_is_the_pools_or_the_models_and_relative_to_the_fleet_file(tmp_path: Path) -> None:
    text = GOOD.replace('chat_template = "llama-2"', 'chat_template = "llama-2"\ntokenizer = "weights"', 1)
    text = text.replace('zone = "US-TEX-ERCO"', 'zone = "US-TEX-ERCO"\ntokenizer = "/other/tokenizer.json"', 1)
    fleet = load_fleet(written(tmp_path, text))
    assert fleet.tokenizer_of(fleet.pool("california")) == tmp_path / "weights"
    assert fleet.tokenizer_of(fleet.pool("texas")) == Path("/other/tokenizer.json")
    assert fleet.tokenizer_of(fleet.pool("judge")) is None


def test_tls_fields_of_an_endpoint_take_precedence_over_its_pools(tmp_path: Path) -> None:
    text = GOOD.replace(
        'zone = "US-TEX-ERCO"', 'zone = "US-TEX-ERCO"\ntls = true\ntls_ca_file = "ca.pem"\ntls_server_name = "a"', 1
    )
    text = text.replace('grpc = "triton-1:8001"', 'grpc = "triton-1:8001"\ntls_server_name = "b"', 1)
    fleet = load_fleet(written(tmp_path, text))
    pool = fleet.pool("texas")
    security = pool.endpoints[0].over(pool)
    assert (security.tls, security.tls_ca_file, security.tls_server_name) == (True, tmp_path / "ca.pem", "b")
    california = fleet.pool("california")
    assert not california.endpoints[0].over(california).tls


def test_a_chat_templates_path_is_relative_to_the_fleet_file_or_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    for name, found in (("mine.jinja", str(tmp_path / "mine.jinja")), ("./llama-2", "./llama-2"), ("gemma", "gemma")):
        fleet = load_fleet(written(tmp_path, GOOD.replace('"llama-2"', f'"{name}"', 1)))
        assert fleet.chat_template_of(fleet.pool("texas")) == found


OPENAI_POOL = """
[[pools]]
name = "v"
model = "m"
zone = "GB"
kind = "openai"
chat_template = "server"
{more}
[[pools.endpoints]]
name = "vllm"
{endpoint}
"""


@pytest.mark.parametrize(
    ("more", "endpoint", "complaint"),
    [
        ("", 'url = "http://vllm:8000"', None),
        ("", 'grpc = "vllm:8001"', "needs 'url'"),
        ('kind2 = "x"', 'url = "http://vllm:8000"', "kind2"),
        ("sleep = true", 'url = "http://vllm:8000"', "only Triton servers can be put to sleep"),
    ],
)
def test_pools_of_openai_compatible_servers_have_addresses_of_their_own(tmp_path, more, endpoint, complaint):
    file = tmp_path / "fleet.toml"
    head = '[[directives]]\nlevel = "L0"\n[[models]]\nname = "m"\nchat_template = "chatml"\n'
    file.write_text(head + OPENAI_POOL.format(more=more, endpoint=endpoint))
    if complaint is None:
        (pool,) = load_fleet(file).pools
        assert (pool.kind, pool.served_model) == ("openai", "m")
        return
    with pytest.raises(FleetError, match=complaint):
        load_fleet(file)


def test_a_level_with_another_text_is_told_by_the_hashes_and_one_that_came_or_went_is_none(tmp_path: Path) -> None:
    text = GOOD.replace("[[models]]", '[[directives]]\nlevel = "L2"\ntext = "One word."\n\n[[models]]', 1)
    before = load_fleet(written(tmp_path, text)).directive_hashes
    assert list(before) == ["L0", "L1", "L2"]
    now = load_fleet(written(tmp_path, GOOD.replace("answer briefly", "answer in brief", 1))).directive_hashes
    assert reworded(before, now) == reworded(now, before) == ["L1"]
    assert reworded(before, {level: before[level] for level in ("L0", "L1")}) == reworded({}, now) == []
