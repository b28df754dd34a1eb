"""No file that is loaded can run code.

Each payload would leave a marker file, and none does. Files with code are refused with an error.
"""

import io
import json
import os
import pickle
import shutil
import tarfile

import pytest
from faults.disk import Together
from PIL import Image

from iomm.config import InputError
from iomm.engine.config import parse
from iomm.engine.data import index
from iomm.engine.data.shards import Shards
from iomm.engine.resilience import checkpoint_reader, checkpoint_writer
from iomm.engine.shapes.mllm import WEIGHTS
from iomm.internvl import load_mllm
from iomm.vae import load_vae


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "code was run"


@pytest.fixture
def payload(marker):
    assert b"touch" in pickle.dumps(Payload(marker))
    return pickle.dumps(Payload(marker))


@pytest.mark.parametrize(
    "name", ["step-00000001.pt", "folder/__0_0.distcp", "folder/.metadata", "folder/model.pt2"]
)
def test_foreign_checkpoint_is_refused(name, payload, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(payload)
    target = path if path.parent == tmp_path else path.parent
    problems = Together(1).run(lambda rank: checkpoint_reader.verify(target, rank))
    assert "no intact MANIFEST.json" in problems[0]


def test_pickle_with_a_valid_hash_is_refused(payload, tmp_path):
    folder, name = tmp_path / "step-00000001", "rank-00000-of-00001.safetensors"
    folder.mkdir()
    (folder / name).write_bytes(payload)
    facts = {"bytes": len(payload), "sha256": checkpoint_reader.sha256(folder / name)}
    (folder / "MANIFEST.json").write_bytes(
        checkpoint_reader.seal(
            {
                "format": checkpoint_writer.FORMAT,
                "step": 1,
                "world_size": 1,
                "files": {name: facts},
                "shapes": {"w": [1]},
            }
        )
    )
    with pytest.raises(InputError, match="is not a safetensors file"):
        checkpoint_reader.Reader(folder).full("master", "w")


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("suffix", ["pkl", "pyd", "pth"])
def test_unknown_members_of_a_tar_are_not_loaded(suffix, payload, tmp_path):
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(jpeg, "JPEG")
    tar = tar_of(
        tmp_path / "a.tar",
        {"0.jpg": jpeg.getvalue(), f"0.{suffix}": payload, f"1.{suffix}": payload},
    )
    index.build(str(tar), tmp_path / "index", progress=False)
    assert len(Shards(tmp_path / "index")) == 1


def test_postscript_named_jpeg_is_refused(marker, tmp_path):
    eps = (
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n"
        f"(%pipe%touch {marker}) (w) file\nshowpage\n"
    ).encode()
    with pytest.raises(InputError):
        index.build(
            str(tar_of(tmp_path / "a.tar", {"0.jpg": eps})), tmp_path / "index", progress=False
        )


def test_shards_that_are_commands_are_refused(marker, tmp_path):
    with pytest.raises(InputError):
        index.ensure_index(f"pipe:touch {marker}", tmp_path / "cache", progress=False)


@pytest.mark.parametrize(
    "text",
    [
        "run:\n  dir: !!python/object/apply:os.system ['touch {}']\n",
        "!!python/object/new:os.system [touch {}]\n",
        "model:\n  _target_: os.system\n  command: touch {}\n",
    ],
)
def test_config_with_code_is_refused(text, marker):
    with pytest.raises(InputError, match=r"f\.yaml:\d+: "):
        parse(text.format(marker), "f.yaml")


def test_model_with_its_own_code_is_refused(marker, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(f"import os\nos.system('touch {marker}')\n")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "evil",
                "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
            }
        )
    )
    with pytest.raises(InputError, match=r"model\.mllm: cannot read the config of .* custom code"):
        load_mllm(str(folder))


@pytest.mark.parametrize(
    "name, key",
    [
        ("tokenizer_config.json", "AutoTokenizer"),
        ("processor_config.json", "AutoProcessor"),
        ("chat_template.jinja", None),
    ],
)
def test_tokenizer_code_is_not_run(name, key, marker, tmp_path):
    """Not always refused: we choose the tokenizer's class, and never render templates."""
    folder = shutil.copytree(WEIGHTS, tmp_path / "mllm")
    (folder / "evil.py").write_text(f"import os\nos.system('touch {marker}')\n")
    path = folder / name
    if key is None:
        path.write_text(
            "{{ cycler.__init__.__globals__.os.popen('touch " + str(marker) + "').read() }}"
        )
    else:
        facts = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(
            json.dumps(
                {
                    **facts,
                    "auto_map": {
                        key: ["evil.Tokenizer", "evil.Tokenizer"] if "Tok" in key else "evil.P"
                    },
                }
            )
        )
    try:
        load_mllm(str(folder))
    except InputError as error:
        assert "model.mllm: cannot load" in str(error)


def test_autoencoder_in_a_pickle_is_refused(payload, tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    for name in ("diffusion_pytorch_model.bin", "model.pt2", "model.ckpt"):
        (folder / name).write_bytes(payload)
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        load_vae(str(folder))
    with pytest.raises(InputError, match=r"model\.vae"):
        load_vae(str(folder / "model.pt2"))
