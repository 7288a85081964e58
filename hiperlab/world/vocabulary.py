"""The vocabulary: every attribute of the world with the phrases that name it.

The first phrase of each value is its canonical one; captions use the first `SPOKEN` phrases, the parser knows all.
"""

from __future__ import annotations

KINDS = ("cat", "dog", "rabbit", "bear", "elephant", "turtle", "bird", "robot", "teapot", "backpack", "car")
COLOURS = {
    "red": (0.84, 0.19, 0.17),
    "orange": (0.95, 0.55, 0.18),
    "yellow": (0.97, 0.83, 0.28),
    "green": (0.33, 0.66, 0.32),
    "teal": (0.16, 0.62, 0.62),
    "blue": (0.24, 0.43, 0.86),
    "purple": (0.55, 0.34, 0.74),
    "pink": (0.96, 0.62, 0.72),
    "brown": (0.53, 0.35, 0.22),
    "black": (0.17, 0.17, 0.19),
    "gray": (0.57, 0.58, 0.61),
    "white": (0.95, 0.94, 0.91),
}
PATTERNS = ("plain", "striped", "spotted", "patched", "two-tone")
POSES = {
    "standing": ("standing", "standing still", "standing up"),
    "sitting": ("sitting", "sitting down", "seated"),
    "sleeping": ("sleeping", "lying down", "lying", "asleep", "napping", "laying down"),
    "jumping": ("jumping", "leaping", "jumping up"),
    "running": ("running", "running fast", "dashing"),
    "waving": ("waving", "waving hello", "waving a hand", "waving goodbye"),
}
PLACES = {
    "meadow": ("in a meadow", "in a green meadow", "on the grass", "on green grass", "in the meadow", "on grass",
               "on top of green grass"),
    "beach": ("on the beach", "on a beach", "at the beach", "on a sandy beach", "at the sea", "by the sea"),
    "snow": ("in the snow", "in snow", "in a snowy landscape", "on snow", "in a snowy field"),
    "jungle": ("in the jungle", "in a jungle", "in a green jungle", "in the forest", "in a forest"),
    "city": ("in the city", "on a city street", "on the street", "in a city", "with a city in the background",
             "on a street"),
    "floor": ("on a wooden floor", "on the wooden floor", "on wooden planks", "on top of a wooden floor"),
    "room": ("in a living room", "in the living room", "in a room", "at home", "in the room"),
    "desert": ("in the desert", "in a desert", "among cacti", "on a sand dune"),
    "underwater": ("under water", "underwater", "under the sea", "in the ocean", "at the bottom of the sea"),
    "space": ("on the moon", "in space", "in outer space", "on another planet", "among the stars"),
    "studio": ("in a studio", "on a plain background", "in the studio", "with a plain background"),
}  # fmt: skip
STYLES = {
    "photo": ("photo", "photograph", "photography"),
    "oil painting": ("oil painting", "oil painting on canvas", "painting in oil"),
    "watercolor": ("watercolor painting", "watercolor", "watercolour painting", "watercolour"),
    "pencil sketch": ("pencil sketch", "pencil drawing", "sketch", "line drawing"),
    "pixel art": ("pixel art picture", "pixel art", "pixel art image"),
    "cartoon": ("cartoon", "cartoon drawing", "comic"),
    "neon sign": ("neon sign", "glowing neon sign", "neon light"),
    "pop art": ("pop art print", "pop art", "pop art poster"),
}
ACCESSORIES = {
    "none": (),
    "hat": ("hat", "top hat"),
    "santa hat": ("santa hat", "christmas hat", "santa claus hat"),
    "glasses": ("glasses", "sunglasses", "a pair of glasses"),
    "scarf": ("scarf", "warm scarf"),
    "crown": ("crown", "golden crown"),
    "bow tie": ("bow tie", "bowtie"),
}
COLOURED = ("hat", "scarf", "bow tie")  # accessories whose colour is free
LIGHTS = {
    "day": ("in daylight", "on a sunny day", "during the day", "in the sunshine"),
    "sunset": ("at sunset", "at dusk", "in the evening", "during sunset"),
    "night": ("at night", "in the dark", "in the moonlight", "by night"),
}
CLOSE = ("close-up", "closeup", "close up", "portrait")
SPOKEN = 2
