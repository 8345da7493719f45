"""Names of the classes of icons, after Unicode's names of emoji; the first 13 and the first 50 are of all kinds."""

# By the names that the sets of icons share, in which hyphens stand for spaces.
NAMES = """
elephant octopus strawberry hamburger guitar camera rocket sailboat mushroom bell cactus penguin pizza tiger-face
rabbit-face pig-face frog owl turtle whale crab butterfly snail banana grapes watermelon carrot eggplant doughnut
ice-cream cookie croissant popcorn automobile bus helicopter ambulance tractor tent castle volcano violin trumpet
drum telephone backpack balloon crown snowman trophy bear koala panda lion fox wolf cow-face horse-face monkey-face
dog-face cat-face mouse-face hamster chicken rooster duck eagle bat shark dolphin tropical-fish blowfish squid
shrimp lady-beetle honeybee spider scorpion crocodile snake camel gorilla leopard rose tulip sunflower hibiscus
palm-tree evergreen-tree maple-leaf four-leaf-clover christmas-tree cherries lemon tangerine peach pear red-apple
kiwi-fruit avocado tomato cucumber ear-of-corn cheese-wedge bacon french-fries taco sushi pancakes lollipop candy
wine-glass beer-mug teacup-without-handle airplane bicycle motorcycle fire-engine delivery-truck taxi tram speedboat
police-car house church saxophone microphone headphone television laptop mobile-phone alarm-clock hourglass-done
light-bulb umbrella sunglasses top-hat necktie jeans t-shirt running-shoe handbag scissors hammer wrench
magnifying-glass-tilted-left gear battery candle soccer-ball
"""
ICON_CLASSES = tuple(name.replace("-", " ") for name in NAMES.split())
