"""A vision transformer, pruned by what images do in it: heads and channels go, and the class stays.

    python examples/vit.py

The model and the images are random, so only the shapes and the proof mean something; put in your own with
``ViTForImageClassification.from_pretrained`` and a ``DataLoader`` of images. Takes about five seconds.
"""

from __future__ import annotations

import torch
from transformers import ViTConfig, ViTForImageClassification

import graphprune


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=10, **sizes)).eval()
    images = [{"pixel_values": torch.randn(4, 3, 32, 32)} for _ in range(4)]
    small = graphprune.compile(model, 0.3, method="wanda-sp", data=images, allocation="uniform")
    print(graphprune.report(small))
    for name, (before, after) in graphprune.report(small).widths.items():
        print(f"  {name}: {before} → {after}")
    with torch.no_grad():
        dense, pruned = (m(images[0]["pixel_values"]).logits for m in (model, small))
    print(f"cosine of the logits with the dense ones: {torch.cosine_similarity(dense, pruned).mean():.3f}")
    print(f"still a {type(small).__name__}")


if __name__ == "__main__":
    main()
