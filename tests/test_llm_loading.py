"""Loading local models: the hub's cache and downloads, LoRA adapters, devices; one clear line for what is wrong."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echelon.errors import EchelonError
from echelon.llm import CausalChoiceModel, ChoicePrompt, ModelStore, option_lines
from echelon.llm._loading import load_causal, locate
from echelon.llm.prompts import LETTERS
from tiny_model import make_tiny_model

OPTIONS = ("shelf 3", "shelf 5", "dock", "wait")
PROMPTS = [
    ChoicePrompt("You guide robots.", f"Robot {n} at {n % 7}, 2.\n{option_lines(OPTIONS)}\nAnswer:", OPTIONS)
    for n in range(1, 6)
]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def logprobs(model: CausalChoiceModel) -> np.ndarray:
    return np.stack([scores.logprobs for scores in model.score(PROMPTS)])


def one_line(error: pytest.ExceptionInfo[EchelonError]) -> str:
    line = str(error.value)
    assert "\n" not in line
    return line


# --- the hub -----------------------------------------------------------------------------------------------------


def fill_hub_cache(hub: Path, name: str, files: Path) -> Path:
    """What a download by the hub's library leaves: hub/models--org--name/{refs/main, snapshots/<commit>/…}."""
    root = hub / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    shutil.copytree(files, root / "snapshots" / COMMIT)
    return root / "snapshots" / COMMIT


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """An empty hub cache and no network; the list grows by each attempt at one."""
    constants = pytest.importorskip("huggingface_hub").constants
    attempts: list[Any] = []

    def refuse(*args: Any, **_: Any) -> Any:
        attempts.append(args)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return attempts


def test_a_cached_model_loads_without_a_network(tiny: Path, tmp_path: Path) -> None:
    fill_hub_cache(tmp_path / "home" / "hub", "org/tiny-model", tiny)
    code = (
        "import socket, sys; sys.path[:0] = sys.argv[1:]\n"
        "def refuse(*a, **k): raise SystemExit('asked the network')\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
        "from test_llm_loading import *\n"
        "print(logprobs(CausalChoiceModel.load('hf:org/tiny-model', dtype='float32')).tobytes().hex())"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path / "home")}
    out = subprocess.run([sys.executable, "-c", code, *sys.path], capture_output=True, text=True, check=True, env=env)
    here = CausalChoiceModel.load(f"hf:{tiny}", dtype="float32")
    assert out.stdout.strip() == logprobs(here).tobytes().hex()


def test_an_absent_model_is_not_tried_again_and_again(offline: list[Any]) -> None:
    with pytest.raises(EchelonError) as caught:
        load_causal("hf:org/absent")
    line = one_line(caught)
    assert "there is no folder org/absent" in line
    assert "could not be reached" in line
    assert "hf:<folder>" in line
    assert 1 <= len(offline) <= 2  # the hub's library may ask a question of its own, once


def test_what_the_cache_holds_in_part_is_not_used(tiny: Path, tmp_path: Path, offline: list[Any]) -> None:
    snapshot = fill_hub_cache(tmp_path / "hub", "org/part", tiny)
    assert locate("hf:org/part") == snapshot
    weights = snapshot / "model.safetensors"
    weights.rename(snapshot / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EchelonError, match="could not be reached"):
        locate("hf:org/part")
    (snapshot / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert locate("hf:org/part") == snapshot
    (snapshot / "config.json").unlink()
    with pytest.raises(EchelonError, match="could not be reached"):
        locate("hf:org/part")
    assert 2 <= len(offline) <= 3


def test_offline_mode_is_named(offline: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EchelonError, match="HF_HUB_OFFLINE forbids"):
        locate("hf:org/absent")
    assert offline == []


def test_a_folder_goes_before_the_hub(
    tiny: Path, tmp_path: Path, offline: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, tmp_path / "org" / "tiny")
    assert locate("hf:org/tiny").resolve() == tmp_path / "org" / "tiny"
    (tmp_path / "org" / "empty").mkdir()
    with pytest.raises(EchelonError, match=r"no config\.json"):
        locate("hf:org/empty")
    # What can't be an id is a folder that isn't there: nobody is asked.
    for name in ("tiny", "/org/tiny", "./a/b", "org/../tiny", "a/b/c", "~/none", "org/x y"):
        with pytest.raises(EchelonError, match="no folder"):
            locate(f"hf:{name}")
    assert offline == []


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as one download needs."""

    files: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path} {self.headers.get('Authorization')}")
        if "gated" in path:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif "/tiny" not in path:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/"):
            names = sorted(file.name for file in self.files.iterdir())
            if "/tree/" in path:
                sizes = [(name, (self.files / name).stat().st_size) for name in names]
                body: Any = [{"type": "file", "path": n, "size": size, "oid": n.encode().hex()} for n, size in sizes]
            else:
                body = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        else:
            name = path.rpartition("/")[2]
            self._send(200, (self.files / name).read_bytes(), {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on this machine, and an empty cache; what it was asked."""
    shutil.copytree(tiny, tmp_path / "files")
    (tmp_path / "files" / "pytorch_model.bin").write_bytes(b"a pickle")
    (tmp_path / "files" / "consolidated.safetensors").write_bytes(b"another format")
    handler = type("Hub", (_Hub,), {"files": tmp_path / "files", "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    env = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    for name, value in {**env, "HF_TOKEN": "hf_secret", "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    yield handler.asked  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


def in_a_process(names: list[str]) -> list[str]:
    """What loading each of them says, in one process that reads the hub's variables anew."""
    code = (
        "import sys, json; sys.path[:0] = json.loads(sys.argv[1])\n"
        "from test_llm_loading import *\n"
        "for name in sys.argv[2:]:\n"
        "    try: print('ok', logprobs(CausalChoiceModel.load(name, dtype='float32')).tobytes().hex())\n"
        "    except EchelonError as error: print(error)"
    )
    command = [sys.executable, "-c", code, json.dumps(sys.path), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_download_takes_what_it_needs_and_no_pickle(tiny: Path, tmp_path: Path, hub: list[str]) -> None:
    first, gated, absent = in_a_process(["hf:org/tiny", "hf:org/gated", "hf:org/none"])
    assert first == "ok " + logprobs(CausalChoiceModel.load(f"hf:{tiny}", dtype="float32")).tobytes().hex()
    assert "is gated: accept its terms" in gated
    assert "HF_TOKEN" in gated
    assert "the hub has no such model, or it is private" in absent
    assert any("model.safetensors" in line for line in hub)
    assert not any(".bin" in line or "consolidated" in line for line in hub)
    assert all("Bearer hf_secret" in line for line in hub if " /api/models/" in line)
    hub.clear()
    assert in_a_process(["hf:org/tiny"]) == [first]
    assert hub == []  # the cache is enough


# --- LoRA --------------------------------------------------------------------------------------------------------


def make_adapter(folder: Path, base: Path, *, named: str | None = None, **settings: Any) -> Path:
    """A random LoRA adapter of rank 4, large enough to turn answers."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **settings)
        adapted = peft.get_peft_model(model, config)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
        adapted.save_pretrained(folder)
    if named is not None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": named}))
    return folder


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("lora") / "adapter", tiny)


def test_a_merged_adapter_scores_as_the_unmerged_one(tiny: Path, adapter: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), adapter)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    letters = [tokenizer.encode(x, add_special_tokens=False)[0] for x in LETTERS[: len(OPTIONS)]]
    expected = []
    for prompt in PROMPTS:
        messages = [{"role": "system", "content": prompt.shared}, {"role": "user", "content": prompt.text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.inference_mode():
            expected.append(torch.log_softmax(plain.eval()(ids).logits[0, -1, letters], -1).numpy())
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    model = CausalChoiceModel.load(f"hf:{adapter}", dtype="float32")
    assert torch.equal(torch.random.get_rng_state(), before)
    got, base = logprobs(model), logprobs(CausalChoiceModel.load(f"hf:{tiny}", dtype="float32"))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(got - base).max() > 0.1
    assert not any("lora" in name for name, _ in model._model.named_parameters())
    assert model.name == f"hf:{adapter}"


def test_where_an_adapter_finds_its_base(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    class Store(ModelStore):
        def __init__(self) -> None:
            self.known = {"tiny-1": None}  # type: ignore[dict-item]

        def path(self, name: str) -> Path:
            assert name == "tiny-1"
            return tiny

    expected = logprobs(CausalChoiceModel.load(f"hf:{adapter}", dtype="float32"))
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    shutil.copytree(tiny, folder / "base")
    path = folder / "adapter_config.json"
    for name in ("base", "tiny-1", "/another/machine/models/tiny-1"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}))
        model = CausalChoiceModel.load(f"hf:{folder}", dtype="float32", store=Store())
        np.testing.assert_array_equal(logprobs(model), expected)
    for wrong in ("/not/here", None, "", 3):
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": wrong}))
        with pytest.raises(EchelonError, match=r"no base model .*base_model_name_or_path") as caught:
            CausalChoiceModel.load(f"hf:{folder}", store=Store())
        one_line(caught)


def test_an_adapter_of_an_id_asks_the_hub(tiny: Path, tmp_path: Path, offline: list[Any]) -> None:
    folder = make_adapter(tmp_path / "adapter", tiny, named="org/base")
    with pytest.raises(EchelonError, match=r"'hf:org/base'.*could not be reached"):
        CausalChoiceModel.load(f"hf:{folder}")
    fill_hub_cache(tmp_path / "hub", "org/base", tiny)
    assert logprobs(CausalChoiceModel.load(f"hf:{folder}")).shape == (5, 4)
    fill_hub_cache(tmp_path / "hub", "org/adapter", folder)  # an adapter can come from the hub as well
    assert logprobs(CausalChoiceModel.load("hf:org/adapter")).shape == (5, 4)
    assert 1 <= len(offline) <= 2  # the hub's library may ask a question of its own, once


@pytest.mark.parametrize("harm", ["narrow", "lacks", "surplus", "kind", "bin", "json", "list", "cut", "tokens"])
def test_an_adapter_that_can_not_be_used_gets_one_line(tiny: Path, adapter: Path, tmp_path: Path, harm: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(adapter, tmp_path / "adapter")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())
    name = sorted(tensors)[0]
    told = "does not fit its base model"
    if harm == "narrow":
        tensors = {k: v[..., :-1].contiguous() if "lora_A" in k else v for k, v in tensors.items()}
    elif harm == "lacks":
        del tensors[name]
    elif harm == "surplus":
        tensors[name.replace("layers.0", "layers.9")] = tensors[name].clone()
    elif harm == "kind":
        settings["peft_type"], told = "PREFIX_TUNING", "only LORA"
    elif harm == "bin":
        (folder / "adapter_model.bin").write_bytes(b"a pickle")
        told = r"no adapter_model\.safetensors"
    elif harm == "tokens":
        settings["target_modules"] = ["no_such_layer"]
    save_file(tensors, weights, {"format": "pt"})
    config.write_text({"json": "{", "list": "[]"}.get(harm, json.dumps(settings)))
    if harm == "bin":
        weights.unlink()
    elif harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    told = {"json": "adapter's configuration", "list": "only LORA"}.get(harm, told)
    with pytest.raises(EchelonError, match=told) as caught:
        CausalChoiceModel.load(f"hf:{folder}")
    one_line(caught)


def test_a_missing_peft_is_named(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EchelonError, match=r"needs peft.*pip install"):
        CausalChoiceModel.load(f"hf:{adapter}")


# --- devices -----------------------------------------------------------------------------------------------------


def test_no_gpu_is_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EchelonError, match="device 'cuda': no GPU") as caught:
        CausalChoiceModel.load(f"hf:{tiny}", device="cuda")
    one_line(caught)
    for device in ("auto", "cpu"):
        assert CausalChoiceModel.load(f"hf:{tiny}", device=device).device == "cpu"  # type: ignore[arg-type]
    with pytest.raises(EchelonError, match=r"unknown device 'gpu'.*'?cpu'?"):
        CausalChoiceModel.load(f"hf:{tiny}", device="gpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_where_the_gpu_has_it(fast: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from echelon.llm import _loading

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: fast)
    assert _loading._device("auto") == _loading._device("cuda") == torch.device("cuda")
    assert _loading._device("cpu") == torch.device("cpu")
    assert _loading._dtype("auto", torch.device("cuda")) == expected
    assert _loading._dtype("float32", torch.device("cuda")) == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_scores_as_the_processor(tiny: Path) -> None:
    expected = logprobs(CausalChoiceModel.load(f"hf:{tiny}", dtype="float32", device="cpu"))
    model = CausalChoiceModel.load(f"hf:{tiny}", dtype="float32", device="cuda")
    assert model.device == "cuda"
    np.testing.assert_allclose(logprobs(model), expected, atol=1e-2)
