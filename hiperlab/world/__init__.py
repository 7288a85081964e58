"""The procedural world: subjects whose identity is known, scenes, captions, and the true picture of any prompt.

    who = identity(seed, "cat")                      # identity.py: what stays the same
    now = scene(seed, pose="jumping", place="snow")  # scene.py: what a prompt controls, and chance
    rgb, mask = render(who, now, size=128)           # draw.py: a pure function, any size
    caption(who, now, rng); parse(prompt)            # caption.py: words and back; true_picture(who, prompt, seed, size)
    views("cats", 512); edit("standing_dog")         # subjects.py: embedded data and the split of the seeds

Drawing: pen.py (shapes, coats, shading), face.py, quadruped.py, walker.py, car.py, backdrop.py, places.py, indoors.py,
styles.py. Skia draws on the CPU because it needs 5 ms for a picture that signed distances in torch draw in 300 ms, and
because its antialiased vector shapes are the same picture at every size.
"""
