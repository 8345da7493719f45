"""The names of ResNet and Swin weights in foreign checkpoints."""

from __future__ import annotations

from fastmask.integrations.checkpoints.names import NameRule, rename

# Of our backbones, which are those of transformers.
RESNET_STAGE = r"backbone\.encoder\.stages\.{stage}\.layers\.(\d+)"
SWIN_BLOCK = r"backbone\.swin\.encoder\.layers\.(\d+)\.blocks\.(\d+)"
NOT_LEARNED = r".*\.(num_batches_tracked|relative_position_index)"


def detectron2_resnet() -> list[NameRule]:
    """detectron2's ResNets, of the basic stem (R50, R101) and of DeepLab's (R101c)."""
    norm = r"normalization\.(.*)"
    rules = [
        NameRule(r"backbone\..*\.num_batches_tracked", ()),
        rename(r"backbone\.embedder\.embedder\.convolution\.weight", "backbone.stem.conv1.weight"),
        rename(rf"backbone\.embedder\.embedder\.{norm}", r"backbone.stem.conv1.norm.\1"),
    ]
    for i in range(3):
        own, foreign = rf"backbone\.embedder\.embedder\.{i}", f"backbone.stem.conv{i + 1}"
        rules += [
            rename(rf"{own}\.convolution\.weight", f"{foreign}.weight"),
            rename(rf"{own}\.{norm}", rf"{foreign}.norm.\1"),
        ]
    for stage in range(4):
        block, foreign = RESNET_STAGE.format(stage=stage), rf"backbone.res{stage + 2}.\1"
        for own, name in [(r"shortcut", "shortcut"), *((rf"layer\.{i}", f"conv{i + 1}") for i in range(3))]:
            rules += [
                rename(rf"{block}\.{own}\.convolution\.weight", f"{foreign}.{name}.weight"),
                rename(rf"{block}\.{own}\.normalization\.(.*)", rf"{foreign}.{name}.norm.\2"),
            ]
    return rules


def microsoft_swin() -> list[NameRule]:
    """The names of Swin's authors, which detectron2's projects took over: one tensor for queries, keys and values."""
    block = r"backbone.layers.\1.blocks.\2"
    own = r"backbone.swin.encoder.layers.\1.blocks.\2.attention"
    partners = tuple(rf"{own}.{part}_proj.\3" for part in "kv")
    bias_table = r"relative_position_bias\.relative_position_bias_table"
    return [
        rename(r"backbone\.swin\.embeddings\.patch_embeddings\.projection\.(.*)", r"backbone.patch_embed.proj.\1"),
        rename(r"backbone\.swin\.embeddings\.norm\.(.*)", r"backbone.patch_embed.norm.\1"),
        NameRule(rf"{SWIN_BLOCK}\.attention\.q_proj\.(.*)", (rf"{block}.attn.qkv.\3",), partners),
        rename(rf"{SWIN_BLOCK}\.attention\.o_proj\.(.*)", rf"{block}.attn.proj.\3"),
        rename(rf"{SWIN_BLOCK}\.attention\.{bias_table}", rf"{block}.attn.relative_position_bias_table"),
        rename(rf"{SWIN_BLOCK}\.layernorm_before\.(.*)", rf"{block}.norm1.\3"),
        rename(rf"{SWIN_BLOCK}\.layernorm_after\.(.*)", rf"{block}.norm2.\3"),
        rename(rf"{SWIN_BLOCK}\.mlp\.(.*)", rf"{block}.mlp.\3"),
        rename(r"backbone\.swin\.encoder\.layers\.(\d+)\.downsample\.(.*)", r"backbone.layers.\1.downsample.\2"),
        *(rename(rf"backbone\.hidden_states_norms\.stage{i + 1}\.(.*)", rf"backbone.norm{i}.\1") for i in range(4)),
        NameRule(r"backbone\.swin\.layernorm\..*", ()),
    ]


def hugging_face_swin(prefix: str) -> list[NameRule]:
    """The Swin of transformers' MaskFormer, a copy with names of its own."""
    block = rf"{prefix}model.encoder.layers.\1.blocks.\2"
    bias_table = r"relative_position_bias\.relative_position_bias_table"
    projections = {"q_proj": "self.query", "k_proj": "self.key", "v_proj": "self.value", "o_proj": "output.dense"}
    return [
        *(
            rename(rf"{SWIN_BLOCK}\.attention\.{own}\.(.*)", rf"{block}.attention.{foreign}.\3")
            for own, foreign in projections.items()
        ),
        rename(rf"{SWIN_BLOCK}\.attention\.{bias_table}", rf"{block}.attention.self.relative_position_bias_table"),
        rename(rf"{SWIN_BLOCK}\.mlp\.fc1\.(.*)", rf"{block}.intermediate.dense.\3"),
        rename(rf"{SWIN_BLOCK}\.mlp\.fc2\.(.*)", rf"{block}.output.dense.\3"),
        *(
            rename(rf"backbone\.hidden_states_norms\.stage{i + 1}\.(.*)", rf"{prefix}hidden_states_norms.{i}.\1")
            for i in range(4)
        ),
        rename(r"backbone\.swin\.(.*)", rf"{prefix}model.\1"),
    ]
