"""Training the miniature: from captions and rendered pictures to a small Stable Diffusion and its judges.

    python -m hiperlab.miniature preset=gpu                      every stage, one folder out
    python -m hiperlab.miniature preset=cpu stages=[vae,clip]    some of them; what is finished is not done again

Door and plan: main.py (command line), plan.py (order, budgets, what all stages share), record.py (stage.json),
keys.py (chance by number), module.py and fit.py (one Lightning training with a time budget).
Stages, in order: tokenizer.py, pictures.py with draw_shard.py (data), vae.py, latents.py, clip.py, decoder.py,
critic.py (kinds from noisy latents; it teaches the U-Net), unet.py, identity.py and reader.py (judges, network in
hiperlab/metric/world/network.py), scorer.py (independent CLIP), export.py with card.py, report.py with bars.py.

This package is a program like hiperlab.run: it may import any room, and no room imports it.
"""
