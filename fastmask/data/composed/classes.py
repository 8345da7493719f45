"""Names and colors of the classes of the composed scenes: ten garments (things) and three textures (stuff)."""

THING_CLASSES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
STUFF_CLASSES = ("brick", "grass", "gravel")
CLASS_NAMES = THING_CLASSES + STUFF_CLASSES
THING_LABELS = tuple(range(len(THING_CLASSES)))
STUFF_LABELS = tuple(range(len(THING_CLASSES), len(CLASS_NAMES)))

PALETTE = (
    (239, 83, 80),
    (66, 133, 244),
    (255, 167, 38),
    (213, 92, 203),
    (0, 172, 193),
    (255, 213, 79),
    (126, 87, 194),
    (38, 198, 146),
    (240, 98, 146),
    (141, 178, 46),
    (161, 120, 104),
    (84, 126, 88),
    (120, 132, 148),
)
