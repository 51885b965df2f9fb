"""The names and shapes of the published checkpoints' tensors.

The layouts are tables, written down from guided-diffusion's published description and flags and not
derived from this package's network, which is tested against them. A block is a list of parts:
"conv a b" is a 3x3 convolution from a to b channels, "res a b" a residual block (its up- and
downsampling have no parameters), "attn c" self-attention.
"""

Shapes = dict[str, tuple[int, ...]]

# Width; then blocks between bars, "×n" for n of the same, a space in front of each resolution.
FFHQ = {
    "width": 128,
    "input_blocks": """
        conv 3 128 | res 128 128 ×2 |  res 128 128 ×2 |  res 128 256 | res 256 256
        |  res 256 256 ×2 |  res 256 512, attn 512 | res 512 512 |  res 512 512""",
    "middle_block": "res 512 512, attn 512, res 512 512",
    "output_blocks": """
        res 1024 512 | res 1024 512, res 512 512
        |  res 1024 512, attn 512 | res 768 512, attn 512, res 512 512
        |  res 768 256 | res 512 256, res 256 256 |  res 512 256 | res 384 256, res 256 256
        |  res 384 128 | res 256 128, res 128 128 |  res 256 128 ×2""",
}
IMAGENET = {
    "width": 256,
    "input_blocks": """
        conv 3 256 | res 256 256 ×3 |  res 256 256 ×3 |  res 256 512 | res 512 512 ×2
        |  res 512 512, attn 512 ×2 | res 512 512
        |  res 512 1024, attn 1024 | res 1024 1024, attn 1024 | res 1024 1024
        |  res 1024 1024, attn 1024 ×2""",
    "middle_block": "res 1024 1024, attn 1024, res 1024 1024",
    "output_blocks": """
        res 2048 1024, attn 1024 ×2 | res 2048 1024, attn 1024, res 1024 1024
        |  res 2048 1024, attn 1024 ×2 | res 1536 1024, attn 1024, res 1024 1024
        |  res 1536 512, attn 512 | res 1024 512, attn 512 | res 1024 512, attn 512, res 512 512
        |  res 1024 512 ×2 | res 768 512, res 512 512
        |  res 768 256 | res 512 256 | res 512 256, res 256 256 |  res 512 256 ×3""",
}


def blocks(described: str) -> list[str]:
    """The blocks between bars, each as often as it says."""
    return [
        block
        for group in described.split("|")
        for block, _, times in [group.strip().partition(" ×")]
        for _ in range(int(times or 1))
    ]


def affine(name: str, *shape: int) -> Shapes:
    """A layer's weight of the given shape, and its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def part(name: str, description: str, embedding: int) -> Shapes:
    """The tensors of one part of a block."""
    kind, *numbers = description.split()
    a, b = int(numbers[0]), int(numbers[-1])
    if kind == "conv":
        return affine(name, b, a, 3, 3)
    if kind == "attn":
        return (
            affine(f"{name}.norm", a)
            | affine(f"{name}.qkv", 3 * a, a, 1)
            | affine(f"{name}.proj_out", a, a, 1)
        )
    return (
        affine(f"{name}.in_layers.0", a)
        | affine(f"{name}.in_layers.2", b, a, 3, 3)
        | affine(f"{name}.emb_layers.1", 2 * b, embedding)
        | affine(f"{name}.out_layers.0", b)
        | affine(f"{name}.out_layers.3", b, b, 3, 3)
        | (affine(f"{name}.skip_connection", b, a, 1, 1) if a != b else {})
    )


def shapes(layout: dict) -> Shapes:
    """Every tensor of a checkpoint: name and shape."""
    width, found = layout["width"], {}
    found |= affine("time_embed.0", 4 * width, width) | affine("time_embed.2", 4 * width, 4 * width)
    named = {"middle_block": layout["middle_block"]}
    for side in ("input_blocks", "output_blocks"):
        named |= {f"{side}.{i}": block for i, block in enumerate(blocks(layout[side]))}
    for name, block in named.items():
        for j, description in enumerate(block.split(", ")):
            found |= part(f"{name}.{j}", description, 4 * width)
    return found | affine("out.0", width) | affine("out.2", 6, width, 3, 3)
