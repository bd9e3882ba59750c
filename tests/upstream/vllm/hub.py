"""Make a Hugging Face cache that has the configurations of models which vLLM's own tests name, without weights: `hub.py FOLDER`."""

import json
import sys
from pathlib import Path

LAYERS = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 50272}
OPT = {"model_type": "opt", "architectures": ["OPTForCausalLM"], **LAYERS, "ffn_dim": 3072, "max_position_embeddings": 2048}
OPT |= {"word_embed_proj_dim": 768, "torch_dtype": "float16", "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
MODELS = {"facebook/opt-125m": OPT}

for name, config in MODELS.items():
    model = Path(sys.argv[1]) / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / "0"
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / "main").write_text("0")
