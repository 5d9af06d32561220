"""A bit that flips in a converted checkpoint is noticed, and its file named, by all that reads it."""

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash

import deepstack_jax as dsj
from converters.hf_to_orbax import convert
from converters.orbax_to_hf import export
from deepstack_jax.bundled import checkpoint_path
from deepstack_jax.checkpoints.hf_checkpoint import read_params
from deepstack_jax.cli import inspect
from deepstack_jax.testing.random_checkpoint import tiny_config, write_random_checkpoint
from tests.test_processes import finish, free_port, start

MANIFEST = "deepstack_jax.json"
RANDOM = np.random.default_rng(3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint and its conversion."""
    folder = tmp_path_factory.mktemp("made")
    write_random_checkpoint(folder / "hf", tiny_config("qwen3_moe", num_hidden_layers=1), dtype="bfloat16")
    convert(folder / "hf", folder / "ckpt")
    return folder


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    """A copy of the conversion."""
    return shutil.copytree(made / "ckpt", tmp_path / "ckpt")


def flip(file: Path, random: np.random.Generator) -> bytes:
    """Flips one bit and returns the bytes from before."""
    before = file.read_bytes()
    data = bytearray(before)
    data[random.integers(len(data))] ^= 1 << random.integers(8)
    file.write_bytes(data)
    return before


def with_sum(contents: dict) -> str:
    """deepstack_jax.json whose checksum is right."""
    text = json.dumps(contents, sort_keys=True)
    return json.dumps({**contents, "xxh3_128": xxhash.xxh3_128_hexdigest(text.encode())})


def test_the_manifest_has_the_sum_of_every_file(checkpoint: Path):
    contents = json.loads((checkpoint / MANIFEST).read_text())
    files = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()}
    assert contents["files"].keys() == files - {MANIFEST}
    for name, one in contents["files"].items():
        data = (checkpoint / name).read_bytes()
        assert one == {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def test_one_flipped_bit_in_any_file_is_refused(checkpoint: Path, tmp_path: Path):
    random = np.random.default_rng(0)
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file.stat().st_size]
    assert {"config.json", "tokenizer.json", MANIFEST, "_METADATA", "zarr.json", "c.0.0.0"} <= {f.name for f in files}
    for file in files:
        before = flip(file, random)
        for read in (
            lambda: dsj.load(checkpoint),
            lambda: inspect.run(checkpoint, verify=True),
            lambda: export(checkpoint, tmp_path / "out"),
        ):
            with pytest.raises(ValueError, match=rf"^{re.escape(str(file))} .+: .*convert") as caught:
                read()
            assert "\n" not in str(caught.value)
        file.write_bytes(before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["ckpt"]


def test_no_bit_of_the_manifest_can_flip(checkpoint: Path):
    """Nor can the version become the one without checksums, whose number differs in one bit."""
    file, random = checkpoint / MANIFEST, np.random.default_rng(1)
    for _ in range(300):
        before = flip(file, random)
        with pytest.raises(ValueError, match=r"deepstack_jax\.json (is damaged|has|lists)"):
            dsj.load(checkpoint)
        file.write_bytes(before)
    file.write_text(file.read_text().replace('"format_version": 3', '"format_version": 2'))
    with pytest.raises(ValueError, match=r"deepstack_jax\.json is damaged"):
        dsj.load(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda contents: contents.pop("files"), "lists no files"),
        (lambda contents: contents["files"]["config.json"].pop("xxh3_128"), "has no length or checksum of config.json"),
        (lambda contents: contents["files"]["config.json"].update(xxh3_128=""), "has no length or checksum of config"),
        (lambda contents: contents["files"].update({"config.json": 5}), "has no length or checksum of config.json"),
    ],
)
def test_a_manifest_without_the_sums_of_its_version_is_refused(change, message: str, checkpoint: Path):
    file = checkpoint / MANIFEST
    contents = json.loads(file.read_text())
    contents.pop("xxh3_128")
    change(contents)
    file.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=r"deepstack_jax\.json has no checksum of its own: convert"):
        dsj.load(checkpoint)
    file.write_text(with_sum(contents))
    with pytest.raises(ValueError, match=rf"deepstack_jax\.json {message}.*: convert the checkpoint again"):
        dsj.load(checkpoint)


def refusal(checkpoint: Path) -> str:
    with pytest.raises(ValueError, match="inspect") as caught:
        dsj.load(checkpoint)
    return str(caught.value)


def edit(file: Path, **changes: object) -> None:
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | changes))


EDITS = {
    "changed": ("config.json", lambda file: edit(file, rms_norm_eps=1e-5)),
    "of the same length": ("config.json", lambda file: file.write_text(file.read_text().replace("1e-06", "1e-05"))),
    "added": ("chat_template.jinja", lambda file: file.write_text("{{ messages[0].content }}")),
    "removed": ("generation_config.json", Path.unlink),
}


@pytest.mark.parametrize("case", EDITS)
def test_one_command_accepts_the_edits_of_text_files(case: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    name, change = EDITS[case]
    change(checkpoint / name)
    message = refusal(checkpoint)
    assert message.startswith(f"{checkpoint / name} ")
    assert f"run deepstack-jax inspect {checkpoint} --accept-edits, otherwise convert again" in message
    inspect.run(checkpoint, accept_edits=True, verify=True)
    did = case if case in ("added", "removed") else "changed"
    assert capsys.readouterr().out.startswith(f"{name} was {did}: accepted\nOK: checksums of ")
    dsj.load(checkpoint)
    before = (checkpoint / MANIFEST).read_bytes()
    inspect.run(checkpoint, accept_edits=True)
    assert capsys.readouterr().out.startswith("no text file was edited\n")
    assert (checkpoint / MANIFEST).read_bytes() == before
    assert not [entry for entry in checkpoint.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda file: file.write_text("{"), r"config\.json is not valid JSON"),
        (
            "config.json",
            lambda file: edit(file, num_hidden_layers=2),
            r"expected .*: its config\.json describes another",
        ),
        (
            "config.json",
            lambda file: edit(file, hidden_size="64"),
            r"hidden_size must be a positive integer, found '64'",
        ),
        ("generation_config.json", lambda file: edit(file, temperature="hot"), r"temperature must be a number"),
        ("tokenizer.json", lambda file: edit(file, model=None), r"the tokenizer in .* can't be loaded"),
        ("tokenizer_config.json", lambda file: file.write_text("[]"), r"holds list, not an object"),
        ("chat_template.jinja", lambda file: file.write_text("{% if %}"), r"chat template"),
        ("params/state/language_model.model.norm.weight/c.0", lambda file: flip(file, RANDOM), "c.0 is not what was"),
        ("params/_METADATA", lambda file: flip(file, RANDOM), "_METADATA is not what was written"),
        ("params/state/extra", Path.touch, "params/state/extra was added after the conversion: remove it"),
        (MANIFEST, lambda file: flip(file, RANDOM), r"deepstack_jax\.json (is damaged|has|lists)"),
    ],
)
def test_edits_are_accepted_only_if_all_files_are_valid(name: str, change, message: str, checkpoint: Path):
    edit(checkpoint / "config.json", rms_norm_eps=1e-5)
    place = next((file for file in checkpoint.rglob("*") if name.endswith(file.name) and file.is_file()), None)
    change(checkpoint / name if place is None or not name.startswith("params") else place)
    before = (checkpoint / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        inspect.run(checkpoint, accept_edits=True)
    assert "\n" not in str(caught.value)
    assert (checkpoint / MANIFEST).read_bytes() == before


def test_files_that_nothing_reads_may_be_added(checkpoint: Path):
    for name in ("README.md", "params/.hidden"):
        (checkpoint / name).touch()
    dsj.load(checkpoint)


def test_edits_of_other_directories_need_no_acceptance(made: Path):
    with pytest.raises(ValueError, match=r"so its files may be edited: leave --accept-edits out"):
        inspect.run(made / "hf", accept_edits=True)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_list_that_leaves_the_directory_is_refused(name: str, checkpoint: Path):
    contents = json.loads((checkpoint / MANIFEST).read_text())
    del contents["xxh3_128"]
    contents["files"][name] = contents["files"]["config.json"]
    (checkpoint / MANIFEST).write_text(with_sum(contents))
    with pytest.raises(ValueError, match=r"deepstack_jax\.json lists '.*', which is not inside the directory"):
        dsj.load(checkpoint)


def test_every_file_of_the_checkpoint_that_ships_has_a_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = shutil.copytree(checkpoint_path("tiny-vl"), tmp_path / "copy")
    random = np.random.default_rng(4)
    inspect.run(copy, verify=True)
    assert capsys.readouterr().out.startswith("OK: checksums of 8 files, ")
    for file in sorted(copy.iterdir()):
        before = flip(file, random)
        for read in (lambda: dsj.load(copy), lambda: convert(copy, tmp_path / "out")):
            with pytest.raises(ValueError, match=rf"^{copy}.* (SHA256SUMS lists|is not a checksum|is missing)"):
                read()
        file.write_bytes(before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_a_checkpoint_of_the_version_without_sums_loads_with_a_note(
    checkpoint: Path, made: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    file = checkpoint / MANIFEST
    contents = json.loads(file.read_text())
    del contents["xxh3_128"]
    files = contents.pop("files")
    contents["params"] = {n.removeprefix("params/"): f["bytes"] for n, f in files.items() if n.startswith("params/")}
    file.write_text(json.dumps(contents | {"format_version": 2}))
    with caplog.at_level(logging.WARNING, "deepstack_jax"):
        params = dsj.load(checkpoint).params
    assert [record.getMessage().split(" has ")[1] for record in caplog.records] == [
        "no checksums, so damaged weights would go unnoticed: convert again to get them"
    ]
    for path, values in read_params(made / "hf"):
        assert np.asarray(params[path]).tobytes() == values.tobytes()
    inspect.run(checkpoint, verify=True)
    assert re.search(
        r"^OK: lengths of \d+ files, [\d,]+ bytes; this checkpoint has no checksums", capsys.readouterr().out
    )
    (checkpoint / "params" / "commit_success.txt").unlink()
    with pytest.raises(ValueError, match=r"commit_success\.txt is missing: the checkpoint is incomplete"):
        dsj.load(checkpoint)


def test_verify_says_what_it_has_checked(made: Path, capsys: pytest.CaptureFixture[str]):
    files = [f for f in (made / "ckpt").rglob("*") if f.is_file() and f.name != MANIFEST]
    nbytes = sum(file.stat().st_size for file in files)
    inspect.run(made / "ckpt", verify=True)
    assert capsys.readouterr().out.startswith(f"OK: checksums of {len(files)} files, {nbytes:,} bytes\n")
    inspect.run(made / "hf", verify=True)
    nbytes = (made / "hf" / "model.safetensors").stat().st_size
    expected = (
        f"OK: headers and lengths of 1 safetensors files, {nbytes:,} bytes; the format has no checksums and there"
    )
    assert capsys.readouterr().out.startswith(expected)


# loads on a mesh of two processes, counts the bytes of pieces that are summed, and says what is refused
SUMS = """
import json, sys
from deepstack_jax.processes import join
join(sys.argv[1], 2, int(sys.argv[2]))
import deepstack_jax as dsj
from deepstack_jax.checkpoints import manifest

summed = {}
plain = manifest.file_sum
def counted(file):
    if file.name.startswith("c."):
        summed[f"{file.parent.name}/{file.name}"] = file.stat().st_size
    return plain(file)
manifest.file_sum = counted
mesh = dsj.make_mesh("tensor=2")
model = dsj.load(sys.argv[3], mesh=mesh)
held = {p: sum(s.data.nbytes for s in a.addressable_shards) for p, a in model.params.items() if ".experts." in p}
experts = {name: size for name, size in summed.items() if ".experts." in name}
refused = ""
try:
    dsj.load(sys.argv[4], mesh=mesh)
except ValueError as error:
    refused = str(error)
print(json.dumps([sum(held.values()), experts, refused]))
"""


def test_each_process_checks_the_pieces_of_its_own_rows(tmp_path: Path):
    """Experts of 1 MiB or more are one piece each; a damaged one stops only the process that holds it."""
    text = {"hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 1, "num_experts": 4}
    write_random_checkpoint(tmp_path / "hf", tiny_config("qwen3_moe", **text), tokenizer=False, repeat_values=True)
    convert(tmp_path / "hf", tmp_path / "ckpt")
    damaged = shutil.copytree(tmp_path / "ckpt", tmp_path / "damaged")
    (expert,) = damaged.rglob("*experts.down_proj/c.3.0.0")
    flip(expert, np.random.default_rng(2))
    where = f"127.0.0.1:{free_port()}"
    directories = str(tmp_path / "ckpt"), str(damaged)
    processes = [start("-c", SUMS, where, str(i), *directories, devices=1) for i in (0, 1)]
    results = [finish(process) for process in processes]
    assert [code for code, *_ in results] == [0, 0], [err[-2000:] for *_, err in results]
    (held, experts, refused), (other_held, other_experts, other_refused) = (json.loads(out) for _, out, _ in results)
    assert (sum(experts.values()), sum(other_experts.values())) == (held, other_held)
    assert not experts.keys() & other_experts.keys()
    assert len(experts) == len(other_experts) == 4
    assert refused == ""
    assert other_refused.startswith(f"{expert} is not what was written")
