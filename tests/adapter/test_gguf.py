"""A GGUF file is converted once, atomically, to bitwise the same float32 weights."""

from __future__ import annotations

import os
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


def write_tiny_gguf(path: Path) -> None:
    """A Llama of two layers with quantised matrices, and a tokenizer of letters."""
    import gguf as parser
    import numpy as np

    eight_bit = parser.GGMLQuantizationType.Q8_0
    out = parser.GGUFWriter(path, "llama")
    out.add_name("tiny")
    out.add_context_length(64)
    out.add_embedding_length(32)
    out.add_block_count(2)
    out.add_feed_forward_length(64)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list(["<s>", "</s>", "a", "b", "c", "ab", "abc", "d"])
    out.add_token_types([3, 3, 1, 1, 1, 1, 1, 1])
    out.add_token_merges(["a b", "ab c"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes |= {"attn_norm": (32,), "ffn_norm": (32,)}
    layers = {f"blk.{layer}.{name}": shapes[name] for layer in range(2) for name in shapes}
    dice = np.random.default_rng(0)
    ends = {"token_embd": (8, 32), "output": (8, 32), "output_norm": (32,)}
    for name, shape in {**ends, **layers}.items():
        values = dice.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            data = parser.quants.quantize(values, eight_bit)
            out.add_tensor(f"{name}.weight", data, raw_dtype=eight_bit)
        else:
            out.add_tensor(f"{name}.weight", values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def check_conversion(source: Path, folder: Path, text: str) -> None:
    """What was converted to `folder` is what transformers makes of the file, bit for bit."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    direct = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True)
    )
    state = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict()
    assert state.keys() == direct.state_dict().keys()
    for name, tensor in direct.state_dict().items():
        assert torch.equal(state[name], tensor.float()), name
    own = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    assert own(text).input_ids == theirs(text).input_ids
    assert own.decode(own(text).input_ids) == text


def test_a_converted_model_and_tokenizer_are_those_that_transformers_reads(
    home: Path, tmp_path: Path
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    check_conversion(tmp_path / "tiny.gguf", convert_gguf(tmp_path / "tiny.gguf"), "abcdab")


@pytest.mark.slow
def test_smollm2_has_its_tokenizer_and_with_long_the_weights_that_transformers_reads(
    smollm2_dir: Path,
) -> None:
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(smollm2_dir)
    assert own.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    text = "The tide tables of 1931, said Ms. Ødegård: 3.14 m!"
    assert own.decode(own(text).input_ids) == text
    if os.environ.get("LITECACHE_TEST_PROFILE") == "long":  # transformers takes half a minute
        check_conversion(packaged_gguf(), smollm2_dir, text)


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
