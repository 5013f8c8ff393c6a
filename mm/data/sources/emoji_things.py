"""Well-known concrete things that emoji show, by kind. No name holds a color, or is a part of another's."""

from collections.abc import Mapping

from mm.data.sources import emoji
from mm.data.sources.canvas import Art, Kind, Thing, read_drawing
from mm.data.sources.emoji_concepts import read_concepts
from mm.errors import UserError

KINDS = {
    "animal": Kind("an animal", "animals"),
    "food": Kind("something to eat", "things to eat"),
    "vehicle": Kind("a vehicle", "vehicles"),
    "clothing": Kind("a piece of clothing", "pieces of clothing"),
    "tool": Kind("a tool", "tools"),
    "instrument": Kind("a musical instrument", "musical instruments"),
    "plant": Kind("a plant", "plants"),
    "building": Kind("a building", "buildings"),
    "device": Kind("a device", "devices"),
}

# concept, or concept = name; the common ones first, and some of every color
_THINGS = {
    "animal": "cat, dog, cow, horse, pig, rabbit, elephant, snake, turtle, penguin, frog, lion, monkey, duck, bat, "
    "shark, butterfly, spider, crab, octopus, giraffe, whale, flamingo, swan, ewe = sheep, goat, owl, panda, snail, "
    "zebra, camel, kangaroo, mouse, fox, honeybee = bee, lady beetle = ladybug, parrot, crocodile, rooster, hedgehog, "
    "dolphin, tiger",
    "food": "red apple = apple, banana, lemon, carrot, strawberry, eggplant, grapes = bunch of grapes, mango, peach, "
    "cheese wedge = piece of cheese, broccoli, pineapple, watermelon, pear, tomato, hamburger, pizza, taco, croissant, "
    "doughnut, cookie, birthday cake = cake, egg, pretzel, ice cream, avocado, ear of corn, potato, lollipop, bagel, "
    "coconut, kiwi fruit = kiwi, cucumber, hot pepper = pepper",
    "vehicle": "automobile = car, bus, delivery truck = truck, ambulance, tractor, bicycle, motorcycle, "
    "kick scooter = scooter, helicopter, airplane, rocket, sailboat, canoe, locomotive, speedboat, tram car = tram, "
    "auto rickshaw = rickshaw, flying saucer",
    "clothing": "t shirt, dress, top hat, gloves = pair of gloves, socks = pair of socks, scarf, coat, bikini, kimono, "
    "high heeled shoe = high heel, running shoe = sneaker, hiking boot = boot, jeans = pair of jeans, "
    "shorts = pair of shorts, billed cap = cap, woman's sandal = sandal, glasses = pair of glasses, sari",
    "tool": "hammer, wrench, screwdriver, carpentry saw = saw, axe, scissors = pair of scissors, ladder, broom, "
    "plunger, pick = pickaxe, flashlight, straight ruler = ruler, paintbrush, clamp, shovel, kitchen knife = knife, "
    "magnifying glass tilted left = magnifying glass",
    "instrument": "saxophone, guitar, musical keyboard = piano, trumpet, violin, drum, banjo, accordion, flute, "
    "maracas = pair of maracas, harp, trombone",
    "plant": "cactus, tulip, rose, sunflower, palm tree, evergreen tree = pine tree, four leaf clover = clover, "
    "maple leaf, seedling, hibiscus, potted plant, lotus, cherry blossom, hyacinth",
    "building": "house, school, hospital, castle, church, hotel, bank, factory, stadium, hut, mosque, synagogue",
    "device": "laptop, camera, television, radio, mobile phone, printer, desktop computer, microphone, "
    "headphone = pair of headphones, satellite antenna = satellite dish, alarm clock, joystick, watch, battery",
}


def read_things(of_each_kind: int | None = None) -> dict[str, Thing]:
    """Name of a concept (see emoji_concepts) -> what it is called here; of each kind the first ones only."""
    things = {}
    for kind, listed in _THINGS.items():
        for entry in listed.split(", ")[:of_each_kind]:
            concept, _, name = entry.partition(" = ")
            things[concept] = Thing(name or concept, kind)
    return things


def draw(artist: str, art: emoji.Art, things: Mapping[str, Thing], size: int) -> Art:
    """An artist's drawings by name of the thing; a little larger than they are shown on `size` pixels.

    things: by concept.
    """
    concepts = [concept for concept in read_concepts() if concept.name in things]
    pngs = emoji.draw(artist, art, concepts, round(1.3 * size))
    return {things[c.name].name: read_drawing(pngs[c.code]) for c in concepts if c.code in pngs}


def draw_by_two(
    artist: str, test_artist: str, of_each_kind: int | None, size: int
) -> tuple[dict[str, emoji.Art], dict[str, Art], dict[str, Thing]]:
    """The art of both artists by their names, their drawings, and by concept the things that both have drawn.

    Raises UserError where they are one.
    """
    if artist == test_artist:
        raise UserError(f"test_artist={test_artist} is the artist of the other sets; choose the other one")
    sources = {name: emoji.ART[name](emoji.EmojiConfig()) for name in (artist, test_artist)}
    things = read_things(of_each_kind)
    arts = {name: draw(name, art, things, size) for name, art in sources.items()}
    both = {c: thing for c, thing in things.items() if all(thing.name in art for art in arts.values())}
    return sources, arts, both
