"""Saved members are PEFT adapters with no difference, and damaged folders are refused."""

import json
import math
import shutil

import pytest
import torch

from tests.llm.conftest import spread_members, tiny_base, tiny_batch
from vifamily.errors import CheckpointError, ConfigError
from vifamily.rng import scoped

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")

from vifamily.llm._stacked import StackedCausalLM  # noqa: E402
from vifamily.llm.manifest import base_digest, file_digest, read_manifest  # noqa: E402
from vifamily.llm.saving import export_merged, load_members, load_model, save_members  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

K = 3
SETTINGS = {
    "llama": {
        "target_modules": ["q_proj", "up_proj"],
        "r": 4,
        "lora_alpha": 8,
        "layers_to_transform": [1],
        "use_rslora": True,
    },
    "gpt2": {"r": 4, "lora_alpha": 8},
}


def made(kind="llama", members=K, seed=5, **more):
    config = peft.LoraConfig(**{**SETTINGS[kind], **more})
    model = StackedCausalLM(tiny_base(kind, dtype=torch.float32), config, members, seed=seed)
    spread_members(model, seed)
    return model.eval()


def values(model, rows):
    return model(rows.input_ids, rows.attention_mask, rows.completion_mask).detach()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_members_load_with_peft_without_a_difference(kind, tmp_path):
    model, rows = made(kind), tiny_batch()
    save_members(model, tmp_path)
    for k in range(K):
        with scoped(0):
            base = tiny_base(kind, dtype=torch.float32)
            theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / f"member_{k}")).eval()
        for name, layer in model.adapters():
            their = theirs.base_model.model.get_submodule(name)
            assert torch.equal(their.lora_A["default"].weight, layer.lora_A[k])
            assert torch.equal(their.lora_B["default"].weight, layer.lora_B[k])
            assert their.scaling["default"] == layer.scale
        adapted = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
        assert adapted == set(model.target_names)
        logits = theirs(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
        chosen = logits[:, :-1].log_softmax(-1).gather(-1, rows.input_ids[:, 1:, None]).squeeze(-1)
        theirs_value = chosen[rows.completion_mask[:, 1:]].detach()
        assert float((theirs_value - values(model, rows)[k]).abs().max()) < 1e-5


def test_an_ensemble_comes_back_as_it_was(tmp_path):
    model, rows = made(), tiny_batch()
    model.log_weight.copy_(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log())
    save_members(model, tmp_path, training={"renyi_alpha": 0.8, "unit": "sequence"})
    manifest = read_manifest(tmp_path)
    assert manifest.training == {"renyi_alpha": 0.8, "unit": "sequence"}
    assert {"torch", "peft", "transformers"} <= set(manifest.versions)
    other = load_model(tmp_path, tiny_base(dtype=torch.float32))
    assert torch.equal(values(other, rows), values(model, rows))
    assert torch.equal(other.log_weight, model.log_weight)
    first = {path.name: path.read_bytes() for path in (tmp_path / "member_1").iterdir()}
    save_members(other, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again" / "member_1").iterdir()} == first


def test_the_digest_of_a_base_knows_its_weights_alone():
    base = tiny_base(dtype=torch.float32)
    before = base_digest(base)
    StackedCausalLM(base, peft.LoraConfig(**SETTINGS["llama"]), 2)
    assert base_digest(base) == before
    assert base_digest(tiny_base(dtype=torch.bfloat16)) == before
    assert base_digest(tiny_base(seed=1, dtype=torch.float32)) != before


def test_folders_that_are_refused(tmp_path):
    model, good = made(), tmp_path / "good"
    save_members(model, good)

    def broken(change):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        change(folder)
        return folder

    half = broken(lambda f: (f / "ensemble.json").unlink())
    with pytest.raises(CheckpointError, match="broken off"):
        load_members(model, half)
    weights = "member_1/adapter_model.safetensors"
    cut = broken(lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:-8]))
    with pytest.raises(CheckpointError, match="not the file that was saved"):
        load_members(model, cut)
    text = broken(lambda f: (f / "ensemble.json").write_text("{"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_members(model, text)

    def rewritten(**changes):
        def change(folder):
            content = json.loads((folder / "ensemble.json").read_text())
            (folder / "ensemble.json").write_text(json.dumps(content | changes))

        return broken(change)

    with pytest.raises(CheckpointError, match="format 9"):
        load_members(model, rewritten(format=9))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_members(model, rewritten(files={"../x/member_0/a": "0"}))
    with pytest.raises(CheckpointError, match="has weights"):
        load_members(model, rewritten(weights=[0.5, 0.5]))
    with pytest.raises(CheckpointError, match="3 members"):
        load_members(made(members=2), good)
    with pytest.raises(CheckpointError, match="another rank"):
        load_members(made(r=2), good)
    other = StackedCausalLM(tiny_base(seed=1, dtype=torch.float32), peft.LoraConfig(**SETTINGS["llama"]), K)
    with pytest.raises(CheckpointError, match="another base"):
        load_members(other, good)
    with pytest.raises(ConfigError, match="names no base"):
        load_model(good)


def edited(folder, **changes):
    content = json.loads((folder / "ensemble.json").read_text())
    (folder / "ensemble.json").write_text(json.dumps(content | changes))


def signed(folder, name, data):
    """Put other bytes in the place of a file, with the digest that they have."""
    (folder / name).write_bytes(data)
    files = json.loads((folder / "ensemble.json").read_text())["files"]
    edited(folder, files=files | {name: file_digest(folder / name)})


def settings(folder, **changes):
    path = folder / "member_1" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


WEIGHTS = "member_0/adapter_model.safetensors"
HOSTILE = {
    "a number": (lambda f: (f / "ensemble.json").write_text("3"), "must hold an object"),
    "nothing": (lambda f: (f / "ensemble.json").write_text("null"), "must hold an object"),
    "too deep": (lambda f: (f / "ensemble.json").write_text("[" * 100_000), "cannot be read"),
    "no text": (lambda f: (f / "ensemble.json").write_bytes(b"\xff\xfe"), "cannot be read"),
    "unknown entry": (lambda f: edited(f, extra=1), "entry 'extra' is unknown"),
    "negative weights": (lambda f: edited(f, weights=[-1.0, 1.0, 1.0]), "must be from 0, sum to one"),
    "weights that disagree": (lambda f: edited(f, log_weights=[0.0, math.nan, 5.0]), "and agree"),
    "texts as weights": (lambda f: edited(f, weights=["a", "b", "c"]), "must be float"),
    "many members": (lambda f: edited(f, num_members=10**9), "for 1000000000 members"),
    "files as a list": (lambda f: edited(f, files=[]), "'files' must be dict"),
    "no files": (lambda f: edited(f, files={}), "names no file with its digest for member_0"),
    "a digest of no text": (lambda f: edited(f, files={f"member_{k}/a": 1 for k in range(3)}), "must be a string"),
    "base of no text": (lambda f: edited(f, base=3), "'base' must be str"),
    "training as a list": (lambda f: edited(f, training=[1]), "'training' must be dict"),
    "a member without its folder": (lambda f: shutil.rmtree(f / "member_1"), "is missing"),
    "huge header": (lambda f: signed(f, WEIGHTS, (2**62).to_bytes(8, "little") + b"x"), "no safetensors file"),
    "bad header": (lambda f: signed(f, WEIGHTS, (4).to_bytes(8, "little") + b"{}}}"), "no safetensors file"),
    "a pickle": (lambda f: signed(f, WEIGHTS, b"\x80\x04K\x01."), "no safetensors file"),
    "settings as a list": (lambda f: (f / "member_1/adapter_config.json").write_text("[]"), "must hold an object"),
    "no settings": (lambda f: (f / "member_1/adapter_config.json").unlink(), "no adapter_config.json"),
    "another scale": (lambda f: settings(f, lora_alpha=400), "would be other adapters there"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_folders_that_lie_are_refused(name, tmp_path):
    model = made()
    save_members(model, tmp_path)
    before = [p.clone() for p in model.adapter_parameters()]
    change, words = HOSTILE[name]
    change(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        load_members(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.adapter_parameters(), strict=True))


def test_ranks_that_lie_take_no_memory(tmp_path):
    model = made()
    save_members(model, tmp_path)
    for k in range(K):
        path = tmp_path / f"member_{k}" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 10**9}))
    with pytest.raises(CheckpointError, match="settings with r=1000000000"):
        load_model(tmp_path, tiny_base(dtype=torch.float32))


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    model = made()
    next(model.adapter_parameters()).data[0].fill_(math.nan)
    save_members(model, tmp_path)
    with pytest.raises(CheckpointError, match="not finite"):
        load_members(made(), tmp_path)


def test_bases_that_cannot_be_loaded_are_named(tmp_path):
    save_members(made(), tmp_path)
    with pytest.raises(ConfigError, match="cannot load the base"):
        load_model(tmp_path, tmp_path / "nowhere")


def test_the_merged_adapter_is_the_mean_change(tmp_path):
    model, rows = made(), tiny_batch()
    model.log_weight.copy_(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log())
    export_merged(model, tmp_path)
    assert "not the ensemble" in (tmp_path / "README.md").read_text()
    with scoped(0):
        theirs = peft.PeftModel.from_pretrained(tiny_base(dtype=torch.float32), str(tmp_path)).eval()
    for name, layer in model.adapters():
        their = theirs.base_model.model.get_submodule(name)
        mean = sum(
            w * layer.scale * layer.lora_B[k] @ layer.lora_A[k] for k, w in enumerate(model.log_weight.exp().tolist())
        )
        assert torch.allclose(their.get_delta_weight("default"), mean, atol=1e-6)
        assert math.isclose(their.scaling["default"], layer.scale)
    assert rows


# --- damaged and hostile files ---


def changed_manifest(folder, **changes):
    path = folder / "ensemble.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def resealed(folder, name):
    """The manifest with the digest that a file has now: damage that a digest does not show."""
    content = json.loads((folder / "ensemble.json").read_text())
    changed_manifest(folder, files=content["files"] | {name: file_digest(folder / name)})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"surprise": 1}, "'surprise' is unknown"),
        ({"num_members": "3"}, "'num_members' must be int"),
        ({"files": []}, "'files' must be dict"),
        ({"files": {"member_0/adapter_model.safetensors": 3}}, "must be a string"),
        ({"files": {}}, "names no file with its digest for member_0"),
        ({"weights": [2.0, -0.5, -0.5]}, "has weights"),
        ({"weights": [float("nan"), 0.5, 0.5]}, "has weights"),
        ({"weights": ["1", "0", "0"]}, "'weights' must be float"),
        ({"log_weights": [0.0, 0.0, 0.0]}, "has weights"),
        ({"base": None}, "'base' must be str"),
    ],
)
def test_manifests_whose_entries_make_no_sense_are_refused(tmp_path, changes, said):
    folder = tmp_path / "members"
    save_members(made(), folder)
    changed_manifest(folder, **changes)
    with pytest.raises(CheckpointError, match=said):
        load_members(made(), folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 100_000])
def test_manifests_that_hold_no_object_are_refused(tmp_path, text):
    folder = tmp_path / "members"
    save_members(made(), folder)
    (folder / "ensemble.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"cannot be read|must hold an object"):
        load_members(made(), folder)


def test_matrices_that_are_not_finite_or_no_matrices_are_refused(tmp_path):
    folder, name = tmp_path / "members", "member_1/adapter_model.safetensors"
    save_members(made(), folder)
    found = safetensors_torch.load_file(folder / name)
    first = sorted(found)[0]
    found[first][0, 0] = float("nan")
    safetensors_torch.save_file(found, folder / name)
    resealed(folder, name)
    with pytest.raises(CheckpointError, match="not finite"):
        load_members(made(), folder)
    (folder / name).write_bytes(b"\xff" * 64)
    resealed(folder, name)
    model = made(seed=8)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_members(model, folder)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)


def test_settings_that_do_not_belong_to_the_matrices_are_refused(tmp_path):
    folder, name = tmp_path / "members", "member_0/adapter_config.json"
    save_members(made(), folder)
    whole = (folder / name).read_text()

    def rewritten(text):
        (folder / name).write_text(text)
        content = json.loads((folder / "ensemble.json").read_text())
        if name in content["files"]:
            resealed(folder, name)

    base = tiny_base(seed=0, dtype=torch.float32)
    rewritten(json.dumps(json.loads(whole) | {"r": 10**9}))
    with pytest.raises(CheckpointError, match="settings with r=1000000000"):
        load_model(folder, base)
    rewritten(json.dumps(json.loads(whole) | {"lora_alpha": 1000}))
    with pytest.raises(CheckpointError, match="would be other adapters"):
        load_members(made(), folder)
    rewritten("[]")
    with pytest.raises(CheckpointError, match="must hold an object"):
        load_model(folder, base)
    rewritten(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}))
    with pytest.raises(ConfigError, match="only LoRA"):
        load_model(folder, base)


def test_a_base_or_tokenizer_that_cannot_be_loaded_is_named(tmp_path):
    folder = tmp_path / "members"
    save_members(made(), folder)
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot load the base"):
        load_model(folder, nowhere, local_files_only=True)
