#!/usr/bin/env bash
# open_clip_torch 3.3.0 (torch 2.14.1, torchvision 0.29.1).
#
# Expected: a class name with a hyphen, as COCO's "wall-brick", is two words for any text encoder.
# Seen: for CLIP it is, with the hyphen as a token between. Before a SigLIP or SigLIP 2 sees a text,
# all punctuation is deleted, not made a space: "wall-brick" becomes "wallbrick", COCO's
# "sky-other-merged" "skyothermerged", ADE20K's "door;double;door" "doordoubledoor". SigLIP's own code
# does so too, so it is the names that have to be rewritten before.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q open_clip_torch==3.3.0 torch==2.14.1 torchvision==0.29.1
cd "$work"
"$work/venv/bin/python" - <<'PY'
import open_clip
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn

models = [name for name in open_clip.list_models() if "SigLIP" in name]
rules = {
    open_clip.get_model_config(name)["text_cfg"]["tokenizer_kwargs"]["clean"] for name in models
}
print(f"{len(models)} SigLIP models clean their texts by {rules}")
assert rules == {"canonicalize"}, "the behaviour has changed"

clip = SimpleTokenizer()
clean = get_clean_fn("canonicalize")
for name, joined in (
    ("wall-brick", "wallbrick"),
    ("sky-other-merged", "skyothermerged"),
    ("door;double;door", "doordoubledoor"),
):
    words = [clip.decode([token]).strip() for token in clip.encode(name)]
    print(f"{name!r}: SigLIP is given {clean(name)!r}, CLIP the tokens {words}")
    assert clean(name) == joined, "the behaviour has changed"
    assert joined not in words and len(words) > 2, "the behaviour has changed"
PY
