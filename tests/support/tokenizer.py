"""A tokenizer for tests: every word is a token, and begin-of-sequence stands in front of a prompt."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors


def write_tokenizer(folder: Path) -> Path:
    """Write `tokenizer.json` into a folder, as models publish it, with a truncation and a padding of its own."""
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1, "word": 2}, unk_token="[UNK]"))  # type: ignore[arg-type]
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # type: ignore[assignment]
    made.enable_truncation(8)
    made.enable_padding(length=8)
    made.save(str(folder / "tokenizer.json"))
    return folder
