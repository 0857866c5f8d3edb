"""JSON and safetensors files, written atomically; the paths and names of files."""

import hashlib
import importlib.metadata
import json
import os
import pickletools
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora import check_state

TEMPORARY = r"\..+\.\d+\.partial(\.\w+)?"  # the names of `atomic_write`'s temporary files
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What `torch.save` names in a file of tensors.
PICKLED = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor|tensor_v2|parameter)")
OLD_PICKLES = 5  # the older format of `torch.save` begins with so many
LARGEST_TEXT = 2**26  # bytes; the largest tokenizer.json of the hub has half as many
SLUG_BYTES = 40  # names are built of several slugs; file systems allow 255 bytes


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it on success and vanishes otherwise.

    Raises OSError naming `path` if it cannot be written, as on a full disk.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask leaves; safetensors would set 0600
        yield temporary
        with open(temporary, "r+b") as file:  # Windows syncs only files open for writing
            os.fsync(file.fileno())
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        with suppress(OSError):  # as where the folder could not be made
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_text(path: Path) -> str:
    """Read a text in UTF-8. Raises ValueError if it has other bytes, or too many."""
    if (size := path.stat().st_size) > LARGEST_TEXT:
        raise ValueError(f"{path} has {size:,} bytes; at most {LARGEST_TEXT:,} are read")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError if the file holds anything else."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with the metadata that `transformers` requires."""
    with atomic_write(path) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, temporary, {"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises ValueError if it is damaged, OSError if it is missing."""
    with _refusing_damage(path):
        return load_file(path)


def meta_tensors(path: Path) -> dict[str, Tensor]:
    """Return the header of a safetensors file as tensors that have shapes, but no data.

    Raises as `read_tensors` does.
    """
    with _refusing_damage(path), safe_open(path, "pt") as file:
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta")
                for name in file.keys()}  # noqa: SIM118


def stream_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a safetensors file, holding only one of them in memory.

    Raises as `read_tensors` does.
    """
    for name in meta_tensors(path):
        # Closing the file unmaps its pages.
        with _refusing_damage(path), safe_open(path, "pt") as file:
            yield name, file.get_tensor(name)


def read_fitting(path: Path, expected: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, in float32, that has those of `expected`.

    Raises ValueError, before any is read, if their names or shapes differ; then as `read_tensors`
    and `finite_float32` do.
    """
    check_fit(expected, meta_tensors(path), what)
    return {name: finite_float32(tensor, f"{path}: {name}")
            for name, tensor in read_tensors(path).items()}


def check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> None:
    """Compare the names and shapes of a file's tensors as `check_state` does; cut long messages."""
    try:
        check_state(expected, found, what)
    except ValueError as error:  # it names every tensor, and names may hold line breaks
        faults = " ".join(str(error).split())
        raise ValueError(faults if len(faults) < 400 else f"{faults[:390]} ...") from None


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a `pytorch_model.bin` into memory, without running any code in it.

    Raises ValueError if the file holds anything else.
    """
    try:
        refuse_other_names(path)
        mmap = zipfile.is_zipfile(path)  # the older format cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # torch raises nearly anything for a damaged file
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged or holds more than tensors: {reason}") from None
    sound = isinstance(tensors, dict) and all(
        isinstance(name, str) and type(tensor) in (Tensor, nn.Parameter)
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
        for name, tensor in tensors.items())
    if not sound:
        raise ValueError(f"{path} must hold plain tensors by their names")
    return tensors


def refuse_other_names(path: Path) -> None:
    """Raise an error if a file of `torch.save` is compressed, or names more than tensors.

    torch runs no code either, but it would make a bytearray of any size, and map compressed bytes
    as if they were numbers.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            for _ in range(OLD_PICKLES):
                _check_names(file)
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename!r:.80} in it is compressed")
            if entry.filename.endswith("data.pkl"):
                with archive.open(entry) as file:
                    _check_names(file)


def _check_names(file: IO[bytes]) -> None:
    for operation, name, _ in pickletools.genops(file):
        if "GLOBAL" in operation.name and not PICKLED.fullmatch(str(name)):
            raise ValueError(f"it names {name!r:.80}")


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, TypeError, RuntimeError) as error:  # torch's, for absurd shapes
        reason = str(error).partition("\n")[0]  # without torch's C++ trace
        raise ValueError(f"{path} is not a safetensors file, or damaged: {reason}") from None


def finite_float32(tensor: Tensor, where: str) -> Tensor:
    """Return a weight in float32.

    Raises ValueError, which starts with `where`, for integers and for numbers that are not finite.
    """
    if tensor.dtype not in FLOATS:
        allowed = ", ".join(str(dtype) for dtype in FLOATS)
        raise ValueError(f"{where} is {tensor.dtype}; weights are one of {allowed}")
    tensor = tensor.float()
    # The sum costs a tenth of the copy that follows; finite numbers may have an infinite one.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise ValueError(f"{where} holds NaN or infinite numbers")
    return tensor


def packaged_file(distribution: str, file: str) -> Path:
    """Return the path of a data file in an installed wheel, without importing the package."""
    return Path(str(importlib.metadata.distribution(distribution).locate_file(file)))


def local_path(where: str, text: str) -> str:
    """Return a setting's path, or name on the hub, with `~` expanded.

    Raises ValueError, naming the place `where` it was set, if there is none.
    """
    if not text.strip() or re.search("[\0\ud800-\udfff]", text):  # the latter are no UTF-8
        raise ValueError(f"{where} must be a name or a path")
    return os.path.expanduser(text)


def writable_folder(folder: Path) -> Path:
    """Make `folder` if it is missing. Raises OSError if nothing can be written to it."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise OSError(f"{folder} is not a writable folder")
    return folder


def anchored(name: str, names: Collection[str] = ()) -> str:
    """Return the absolute path of a file or folder; a name, of `names` or of the hub, unchanged."""
    return os.path.abspath(name) if name not in names and os.path.exists(name) else name


def slug(text: str) -> str:
    """Turn any text into a part of a file name; different texts give different names."""
    name = re.sub(r"\W+", "-", text)
    if name == text and len(name.encode()) <= SLUG_BYTES:
        return name
    short = name.encode()[:SLUG_BYTES].decode(errors="ignore").strip("-")
    return f"{short}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def files_sha256(paths: Iterable[Path], head: str = "") -> str:
    """Return the SHA-256, in hexadecimal, of the text `head` and then the files, read in blocks."""
    digest = hashlib.sha256(head.encode())
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
