"""Arguments of our StyleGAN-XL from the tables that the original's layers made of themselves."""

SIGNAL = {"channels": "channels", "rate": "sampling_rate", "cutoff": "cutoff", "half_width": "half_width"}


def xl_layer(row):
    """A layer of `stylegan_xl.Generator` from a row of a golden schedule."""
    layer = {"name": row["name"]}
    layer |= {ours: row[f"out_{theirs}"] for ours, theirs in SIGNAL.items()}
    layer["size"] = row["out_size"][0]
    for key in ("is_torgb", "is_critically_sampled", "use_fp16", "conv_kernel", "conv_clamp", "magnitude_ema_beta"):
        layer[key] = row[key]
    if not row["is_torgb"]:
        side = "down" if row["down_factor"] > 1 else "up"
        layer["filter_size"] = row[f"{side}_taps"] // row[f"{side}_factor"]
        layer["lrelu_upsampling"] = row["tmp_sampling_rate"] // max(row["in_sampling_rate"], row["out_sampling_rate"])
    layer["use_radial_filters"] = row["down_radial"]
    return layer


def xl_kwargs(case, shapes):
    """Arguments of `stylegan_xl.Generator` from a golden case and the shapes of its tensors by name."""
    layers = [xl_layer(row) for row in case["schedule"]["layers"]]
    conditional = "mapping.embed_proj.weight" in shapes
    w_avg, fc0 = shapes["mapping.w_avg"], shapes["mapping.fc0.weight"]
    return {
        "z_dim": fc0[1] // 2 if conditional else fc0[1],
        "c_dim": w_avg[0] if conditional else 0,
        "w_dim": w_avg[-1],
        "img_resolution": layers[-1]["size"],
        "img_channels": layers[-1]["channels"],
        "layers": layers,
        "input_channels": case["schedule"]["input"]["channels"],
        "output_scale": case.get("synthesis_attributes", {}).get("output_scale", 0.25),
        "mapping_kwargs": {"embedding": shapes["mapping.embed.weight"]},
    }
