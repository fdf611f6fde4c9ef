"""A GGUF file is converted once, atomically, to bitwise the same float32 weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from litecache.adapter import gguf
from litecache.adapter.gguf import convert_gguf, packaged_gguf
from litecache.errors import ConfigError, ModelNotSupportedError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LITECACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def fake_file(tmp_path: Path) -> Path:
    path = tmp_path / "fake.gguf"
    path.write_bytes(b"not really")
    return path


def fake_convert(source: Path, folder: Path, progress: bool) -> None:
    (folder / "model.safetensors").write_bytes(source.read_bytes())


def test_a_conversion_happens_once_per_content(
    home: Path, fake_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "_convert", fake_convert)
    first = convert_gguf(fake_file)
    copy = fake_file.with_name("copy.gguf")
    shutil.copy(fake_file, copy)
    monkeypatch.setattr(gguf, "_convert", None)
    assert convert_gguf(str(copy)) == first
    assert first.parent == home / "models"
    monkeypatch.setattr(gguf, "_convert", fake_convert)
    fake_file.write_bytes(b"other weights")
    assert convert_gguf(fake_file) != first


def test_a_failed_conversion_leaves_nothing(
    home: Path, fake_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(source: Path, folder: Path, progress: bool) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_convert", half)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(fake_file)
    assert list((home / "models").iterdir()) == []


def test_a_concurrent_conversion_of_the_same_file_is_no_error(
    home: Path, fake_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slower(source: Path, folder: Path, progress: bool) -> None:
        monkeypatch.setattr(gguf, "_convert", fake_convert)
        winner.append(convert_gguf(source))
        fake_convert(source, folder, progress)

    winner: list[Path] = []
    monkeypatch.setattr(gguf, "_convert", slower)
    assert [convert_gguf(fake_file)] == winner
    assert list((home / "models").iterdir()) == winner


def test_bad_files_are_refused_by_name(home: Path, tmp_path: Path, fake_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.gguf"):
        convert_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ConfigError, match=r"ends in \.gguf"):
        convert_gguf(tmp_path)
    with pytest.raises(ModelNotSupportedError, match=r"fake\.gguf"):
        convert_gguf(fake_file, progress=False)
    assert list((home / "models").iterdir()) == []


def test_packages_without_a_gguf_file_are_refused() -> None:
    with pytest.raises(ConfigError, match="no_such_package_here"):
        packaged_gguf("no_such_package_here")
    with pytest.raises(ConfigError, match=r"carries a \.gguf"):
        packaged_gguf("rich")


@pytest.mark.slow
def test_smollm2_reloads_bitwise_equal_with_its_tokenizer(smollm2_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = packaged_gguf()
    direct = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True)
    )
    reloaded = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype="float32")
    state = reloaded.state_dict()
    assert state.keys() == direct.state_dict().keys()
    for name, tensor in direct.state_dict().items():
        assert torch.equal(state[name], tensor.float()), name
    text = "The tide tables of 1931, said Ms. Ødegård: 3.14 m!"
    own = AutoTokenizer.from_pretrained(smollm2_dir)
    assert own.decode(own(text).input_ids) == text
    assert own.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_the_progress_bar_counts_tensors_and_gives_transformers_its_own_back() -> None:
    from transformers import modeling_gguf_pytorch_utils as parser

    original = parser.tqdm
    seen: list[float] = []

    def convert_and_fail() -> None:
        with gguf._own_tensor_bar(lambda percent, stage: seen.append(percent)):
            assert list(parser.tqdm(["a", "b", "c"], desc="ignored")) == ["a", "b", "c"]
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        convert_and_fail()
    assert len(seen) == 3
    assert seen == sorted(seen)
    assert 0 < seen[0] < seen[-1] < 100
    assert parser.tqdm is original


def test_a_file_is_read_once_for_a_conversion_and_again_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import gguf as parser

    read: list[str] = []
    reader = read.append
    monkeypatch.setattr(parser, "GGUFReader", reader)

    def read_and_fail() -> None:
        with gguf._read_once():
            for _ in range(3):
                parser.GGUFReader("a.gguf")
            raise RuntimeError("in the middle")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="in the middle"):
            read_and_fail()
    assert read == ["a.gguf"] * 2
    assert parser.GGUFReader is reader
