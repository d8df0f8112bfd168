"""Before any test: what this shell has set for the hub, for servers, for ranks or for WordNet is put away.

Here, and not in a fixture: huggingface_hub and `datasets` read the environment once, when they are imported. CRISP_DATA
stays, and a WNSEARCHDIR that holds WordNet, which may lie nowhere else on this machine.
"""

import os
from pathlib import Path

AWAY = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_", "OPENAI_", "VLLM_", "TORCHELASTIC_", "JUDGE_MODEL",
        "EMBEDDING_MODEL", "CRISP_CACHE", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_")

for name in list(os.environ):
    if name.startswith(AWAY) or name == "WNSEARCHDIR" and not Path(os.environ[name], "data.noun").is_file():
        del os.environ[name]
