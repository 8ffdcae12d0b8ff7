"""The registry of services and `python -m services`."""

import importlib
import pkgutil
import sys

import pytest

import services
from services import SERVICES
from services.__main__ import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["services", *arguments])
    main()


def test_every_package_below_services_is_registered():
    assert sorted(SERVICES) == sorted(module.name for module in pkgutil.iter_modules(services.__path__) if module.ispkg)
    for name, service in SERVICES.items():
        module = service.load()
        assert (name, service.description) == (module.NAME, module.DESCRIPTION)
        assert callable(module.build_app)


@pytest.mark.parametrize("name", ["carbon_feed", "carbon-feed"])
def test_a_service_is_run_by_its_name(monkeypatch, name):
    ran = []
    monkeypatch.setattr("services.carbon_feed.app.main", lambda: ran.append(True))
    run(monkeypatch, name)
    assert ran


def test_help_lists_the_services(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed and service.description in printed for name, service in SERVICES.items())


def test_an_unknown_service_is_an_error_that_lists_the_known_ones(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "unknown")
    assert ended.value.code == 2
    assert "no service 'unknown'; there are: carbon_feed, evaluator, gateway, ledger" in capsys.readouterr().err


def test_a_service_that_an_image_does_not_contain_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run(monkeypatch, "router")
    assert "'router' is not installed here" in capsys.readouterr().err
