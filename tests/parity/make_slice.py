"""Cut the committed slice from a golden folder: `python -m tests.parity.make_slice`.

The slice lets a fresh clone check the core numbers (positional encoding, mapper, rescaling, text encoder with bypass)
without the full folder: groups a, b, c, g of golden/neti and, of the twin's text encoder, all but the embedding rows
that no golden prompt uses.
"""

from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from tests.parity import golden


def main() -> None:
    """Write tests/parity/slice."""
    source, target = golden.folder("neti"), golden.SLICE / "neti"
    shutil.rmtree(golden.SLICE, ignore_errors=True)
    target.mkdir(parents=True)
    everything = load_file(source / "golden.safetensors")
    kept = {name: value for name, value in everything.items() if name.split("/")[0] in _GROUPS}
    save_file(kept, target / "golden.safetensors")
    shutil.copyfile(source / "config.json", target / "config.json")

    text = golden.folder("tiny-sd14") / "text_encoder"
    state = load_file(text / "model.safetensors")
    used = torch.cat([value.flatten() for name, value in kept.items() if name.endswith("input_ids")])
    ids = torch.cat([used, kept["ids/super_category_token_id"].flatten()]).unique()
    name = next(name for name in state if name.endswith("token_embedding.weight"))
    ids = ids[ids < len(state[name])]  # the placeholder's own id is no row
    state["rows"], state["ids"] = state.pop(name)[ids].clone(), ids
    (golden.SLICE / "text_encoder").mkdir()
    save_file(state, golden.SLICE / "text_encoder" / "model.safetensors")
    config = json.loads((text / "config.json").read_text())
    (golden.SLICE / "text_encoder" / "config.json").write_text(json.dumps(config, indent=1) + "\n")


_GROUPS = ("a", "b", "c", "g", "ids", "mapper", "mapper_encoder")

if __name__ == "__main__":
    main()
