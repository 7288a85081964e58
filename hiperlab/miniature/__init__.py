"""Training the miniature: from captions and rendered pictures to a small Stable Diffusion and its judges.

    python -m hiperlab.miniature preset=gpu                                    every stage, one folder out
    python -m hiperlab.miniature preset=cpu stages=[data,latents,unet,export]  one part trained on

Command line and plan: main.py, plan.py (order, budgets, what all stages share), record.py (stage.json), keys.py (chance
by number), module.py and fit.py (one Lightning training with a time budget), parts.py (what a training starts from).
Stages, in order: pictures.py with draw_shard.py (data), latents.py, unet.py with names.py, decoder.py, recoded.py (what
judges read beside true pictures), identity.py, reader.py and scorer.py (judges), export.py with card.py, report.py with
bars.py.

This package is a program like hiperlab.run: it may import any room, and no room imports it.
"""
