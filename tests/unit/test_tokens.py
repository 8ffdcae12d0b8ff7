"""Counting tokens with a model's own tokenizer."""

import sys
import threading

import pytest

from shared.fleet_parts import FleetError
from shared.inference.tokens import LONG_TEXT_CHARS, TokenCounts, Tokenizer, Tokenizers
from tests.support.tokenizer import write_tokenizer


def test_a_models_folder_and_its_tokenizer_file_count_alike(tmp_path):
    folder = write_tokenizer(tmp_path)
    for path in (folder, folder / "tokenizer.json"):
        assert Tokenizer(path).tokens("a word more", special=False) == 3
        assert Tokenizer(path).tokens("a word more", special=True) == 4


async def test_neither_the_tokenizers_truncation_nor_its_padding_falsify_a_count(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    assert await tokenizer.count("word " * 20, "word") == TokenCounts(prompt=21, completion=1)
    assert await tokenizer.count("", "") == TokenCounts(prompt=1, completion=0)


async def test_a_long_text_is_counted_outside_the_event_loop(tmp_path, monkeypatch):
    tokenizer, seen = Tokenizer(write_tokenizer(tmp_path)), []
    whole = tokenizer._counts

    def watched(prompt, completion):
        seen.append(threading.current_thread() is threading.main_thread())
        return whole(prompt, completion)

    monkeypatch.setattr(tokenizer, "_counts", watched)
    long = "word " * (LONG_TEXT_CHARS // 5)
    assert (await tokenizer.count(long, "word")).prompt == LONG_TEXT_CHARS // 5 + 1
    await tokenizer.count("word", "word")
    assert seen == [False, True]


def test_each_tokenizer_is_loaded_once(tmp_path):
    tokenizers, path = Tokenizers(), write_tokenizer(tmp_path)
    assert tokenizers.load(None) is None
    assert tokenizers.load(path) is tokenizers.load(path)


def test_a_tokenizer_that_does_not_do_is_named_with_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(FleetError, match=r"nowhere is neither a tokenizer\.json nor a folder with one"):
        Tokenizer(tmp_path / "nowhere")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(FleetError, match=r"broken\.json cannot be read"):
        Tokenizer(tmp_path / "broken.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(FleetError, match="needs the package 'tokenizers'"):
        Tokenizer(write_tokenizer(tmp_path))
