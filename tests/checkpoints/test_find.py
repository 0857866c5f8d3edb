"""A checkpoint's files are found where they are said to be, whole or in shards."""

import hashlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from made_checkpoints import IDX, close, equal
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

import checkpoints.hub_format as hub_format
import checkpoints.pretrained as pretrained
from checkpoints.files import read_json, read_tensors, write_json, write_tensors
from checkpoints.hub_format import CONFIG, INDEX, PICKLE, PICKLE_INDEX, WEIGHTS
from checkpoints.pretrained import checkpoint_digest, read_shape
from model import GPT

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sharded(base: Path, tmp_path: Path) -> Path:
    GPT2LMHeadModel.from_pretrained(base).save_pretrained(
        tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail as soon as the hub or its cache is asked."""
    def asked(*_: Any) -> None:
        raise AssertionError("the hub was asked")

    for name in ("try_to_load_from_cache", "get_hf_file_metadata", "hf_hub_download"):
        monkeypatch.setattr(hub_format, name, asked)


LOCAL = ["./best", "../best", "/no/best", "~/best", "out/run/best", "out\\best", "out/best/",
         ".best", "C:/best", "out/a best", "a--b", "a..b", "a" * 97, "best.git", ""]


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", [*map(Path, ("best", "out/best", "gpt2", "gpt2-mini")), *LOCAL])
@pytest.mark.parametrize(
    "read", [GPT.from_pretrained, read_shape, checkpoint_digest])
def test_missing_local_folder_never_asks_the_hub(
    name: str | Path, read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^there is no folder .*|^\. has no") as missing:
        read(name)
    assert "\n" not in str(missing.value)


@pytest.mark.usefixtures("no_hub")
def test_path_and_text_of_an_existing_folder_are_the_same(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    for name in (base, str(base), Path("base"), "base", "./base"):
        equal(GPT.from_pretrained(name)(IDX)[0], GPT.from_pretrained(base)(IDX)[0])


@pytest.mark.usefixtures("no_hub")
def test_missing_folder_in_a_folder_that_is_here_never_asks_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no folder out/run"):
        GPT.from_pretrained("out/run")


def test_password_of_the_hubs_address_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("401 for url: https://user:secret@hub.local/gpt2")

    monkeypatch.setattr(hub_format, "get_hf_file_metadata", refuse)
    with pytest.raises(OSError, match=r"401 for url: https://hub\.local/gpt2$"):
        GPT.from_pretrained("no-such-model")


@pytest.mark.usefixtures("no_hub")
def test_file_in_place_of_a_folder_never_asks_the_hub(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    with pytest.raises(FileNotFoundError, match=f"there is no folder base/{WEIGHTS}"):
        GPT.from_pretrained(f"base/{WEIGHTS}")


# ---- shards ----


def test_shards_load_as_the_whole_does(base: Path, sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    equal(dict(GPT.from_pretrained(sharded).state_dict()),
          dict(GPT.from_pretrained(base).state_dict()))


def test_whole_file_comes_before_shards(base: Path, sharded: Path) -> None:
    shutil.copyfile(base / WEIGHTS, sharded / WEIGHTS)
    write_json(sharded / INDEX, {})
    close(GPT.from_pretrained(sharded)(IDX)[0], GPT.from_pretrained(base)(IDX)[0])


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"sharded has no {shard.name}$"):
        GPT.from_pretrained(sharded)


def test_tensor_that_no_shard_holds_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name, _ = tensors.popitem()
    write_tensors(shard, tensors)
    with pytest.raises(ValueError, match=f"missing {name}"):
        GPT.from_pretrained(sharded)


@pytest.mark.parametrize(
    "shard", ["../base/model.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..",
              "..x.safetensors", "model.bin", "", 3, None, ["x.safetensors"], "x.safetensors\n"])
def test_shard_outside_the_folder_is_refused(sharded: Path, shard: Any) -> None:
    weight_map = read_json(sharded / INDEX)["weight_map"]
    write_json(sharded / INDEX, {"weight_map": weight_map | {"transformer.wte.weight": shard}})
    with pytest.raises(ValueError, match=f"{INDEX}: weight_map must give each tensor"):
        GPT.from_pretrained(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a.safetensors"]}])
def test_index_without_shards_is_refused(sharded: Path, index: dict[str, Any]) -> None:
    write_json(sharded / INDEX, index)
    with pytest.raises(ValueError, match="weight_map must give"):
        GPT.from_pretrained(sharded)


# ---- pickled weights of older checkpoints ----


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_weights_load_as_safetensors_do(base: Path, new_format: bool) -> None:
    plain = GPT.from_pretrained(base)(IDX)[0]
    tensors = read_tensors(base / WEIGHTS)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]  # tied, in the same memory
    torch.save(tensors, base / PICKLE, _use_new_zipfile_serialization=new_format)
    (base / WEIGHTS).unlink()
    equal(GPT.from_pretrained(base)(IDX)[0], plain)
    assert checkpoint_digest(base)


def test_pickled_shards_load(base: Path) -> None:
    plain, tensors = GPT.from_pretrained(base)(IDX)[0], read_tensors(base / WEIGHTS)
    names = {name: f"pytorch_model-{place % 2}.bin" for place, name in enumerate(tensors)}
    for shard in set(names.values()):
        torch.save({n: t for n, t in tensors.items() if names[n] == shard}, base / shard)
    write_json(base / PICKLE_INDEX, {"weight_map": names})
    (base / WEIGHTS).unlink()
    equal(GPT.from_pretrained(base)(IDX)[0], plain)


class Harmful:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


class Large:
    """What torch unpickles although it is no tensor."""

    def __reduce__(self) -> Any:
        return bytearray, (1000,)


@pytest.mark.parametrize("content", [
    {"a": Harmful()}, Harmful(), [1], {"a": 1}, {1: torch.ones(2)},
    {"a": torch.ones(1).expand(10**15)}, {"a": torch.eye(3).to_sparse()}, {"a": Large()},
    {"a": torch.empty(3, device="meta")}],
    ids=["code", "code alone", "a list", "a number", "no name", "a huge view", "sparse", "bytes",
         "no data"])
@pytest.mark.parametrize("new_format", [True, False])
def test_pickle_that_holds_more_than_tensors_is_refused(
    base: Path, content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_format: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, base / PICKLE, _use_new_zipfile_serialization=new_format)
    (base / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"{PICKLE} (is damaged|must hold plain tensors)") as error:
        GPT.from_pretrained(base)
    assert "\n" not in str(error.value)
    assert not Path("harmed").exists()


@pytest.mark.parametrize("size", [0, 10, 1000])
def test_cut_pickle_is_refused(base: Path, size: int) -> None:
    torch.save(read_tensors(base / WEIGHTS), base / PICKLE)
    (base / PICKLE).write_bytes((base / PICKLE).read_bytes()[:size])
    (base / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"{PICKLE} is damaged"):
        GPT.from_pretrained(base)


def test_compressed_pickle_is_refused_instead_of_mapped(base: Path) -> None:
    torch.save(read_tensors(base / WEIGHTS), base / "plain.bin")
    with zipfile.ZipFile(base / "plain.bin") as plain, zipfile.ZipFile(
            base / PICKLE, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    (base / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"{PICKLE} is damaged .*data.pkl' in it is compressed$"):
        GPT.from_pretrained(base)


def test_pickled_weights_are_read_once_for_their_shapes_and_once_for_their_numbers(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, read = [], pretrained.read_pickled

    def count(path: Path) -> Any:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(pretrained, "read_pickled", count)
    torch.save(read_tensors(base / WEIGHTS), base / PICKLE, _use_new_zipfile_serialization=False)
    (base / WEIGHTS).unlink()
    GPT.from_pretrained(base)
    assert len(reads) == 2
    GPT.from_pretrained(base)
    assert len(reads) == 3


# ---- the digest ----


@pytest.mark.parametrize("name", ["base", "sharded"])
def test_digest_is_that_of_the_shape_and_of_all_bytes_in_order(
    name: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))
    expected = hashlib.sha256(str(read_shape(folder)).encode() + content).hexdigest()
    assert checkpoint_digest(folder) == checkpoint_digest(str(folder)) == expected


def test_digest_follows_the_weights(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, tensors = checkpoint_digest(base), read_tensors(base / WEIGHTS)
    tensors["transformer.wpe.weight"][0, 0] += 1
    write_tensors(base / WEIGHTS, tensors)  # of the same size
    os.utime(base / WEIGHTS, ns=(0, 1))
    second = checkpoint_digest(base)
    assert second != first
    monkeypatch.setattr(hashlib, "sha256", None)
    assert checkpoint_digest(base) == second  # without reading the file again


def test_digest_of_the_packaged_model_needs_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkpoint_digest("gpt2-mini") == checkpoint_digest(ROOT / "assets" / "gpt2-mini")


def test_digest_follows_what_the_config_fixes_alone(base: Path) -> None:
    first, config = checkpoint_digest(base), read_json(base / CONFIG)
    write_json(base / CONFIG, config | {"transformers_version": "6"})
    assert checkpoint_digest(base) == first
    write_json(base / CONFIG, config | {"n_head": 1})
    assert checkpoint_digest(base) != first
