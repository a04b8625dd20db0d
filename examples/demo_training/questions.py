"""Chats about drawn pictures: what the demo model is trained and judged on.

Every sample is a chat (messages in OpenAI's form whose pictures are Pillow images or lists of
frames) that ends with the one right answer. The same seed always gives the same chat.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from examples.demo_training.scenes import (
    COLORS,
    DIRECTIONS,
    NUMBERS,
    ORDINALS,
    PICTURE_SIZES,
    SHAPES,
    TEXTS,
    WORDS,
    Item,
    Random,
    article,
    draw_motion,
    draw_scene,
    draw_text,
    join,
    plural,
    random_items,
    sentence,
)

Message = dict[str, Any]
Question = Callable[[list[Item], Random], tuple[str, str]]
Chat = Callable[[Random], list[Message]]


def describe(items: list[Item]) -> str:
    return sentence(join([f"{article(item.full_name)} {item.place}" for item in items]))


def as_json(items: list[Item]) -> str:
    return json.dumps(
        [
            {
                "shape": i.shape,
                "color": i.color,
                "size": i.size,
                "position": i.place.split("the ")[1],
            }
            for i in items
        ]
    )


def show_each(names: list[str]) -> str:
    """What each picture shows, in order."""
    return sentence(
        join([f"the {ORDINALS[i]} image shows {article(name)}" for i, name in enumerate(names)])
    )


def ask_describe(items: list[Item], rng: Random) -> tuple[str, str]:
    question = rng.choice(
        [
            "Describe the image.",
            "Describe this image.",
            "What is in this image?",
            "What do you see?",
            "Describe the picture.",
        ]
    )
    return question, describe(items)


def ask_json(items: list[Item], rng: Random) -> tuple[str, str]:
    if len(items) > 2:
        return ask_describe(items, rng)
    return rng.choice(["List the shapes as JSON.", "Describe the image as JSON."]), as_json(items)


def ask_count(items: list[Item], rng: Random) -> tuple[str, str]:
    kind = rng.choice(["shapes", "shape", "color"])
    if kind == "shapes":
        count, noun = len(items), "shape"
    elif kind == "shape":
        noun = rng.choice([rng.choice(items).shape, rng.choice(SHAPES)])
        count = sum(item.shape == noun for item in items)
    else:
        color = rng.choice([rng.choice(items).color, rng.choice(list(COLORS))])
        count, noun = sum(item.color == color for item in items), f"{color} shape"
    verb = "is" if count == 1 else "are"
    return (
        f"How many {plural(2, noun)} are there?",
        f"There {verb} {NUMBERS[count]} {plural(count, noun)}.",
    )


def ask_color(items: list[Item], rng: Random) -> tuple[str, str]:
    unique = [i for i in items if sum(o.shape == i.shape for o in items) == 1]
    if not unique:
        return ask_count(items, rng)
    item = rng.choice(unique)
    return f"What color is the {item.shape}?", f"The {item.shape} is {item.color}."


def ask_shape(items: list[Item], rng: Random) -> tuple[str, str]:
    unique = [i for i in items if sum(o.color == i.color for o in items) == 1]
    if not unique:
        return ask_count(items, rng)
    item = rng.choice(unique)
    return f"What shape is {item.color}?", f"The {item.color} shape is {article(item.shape)}."


def ask_place(items: list[Item], rng: Random) -> tuple[str, str]:
    unique = [i for i in items if sum(o.name == i.name for o in items) == 1]
    if not unique:
        return ask_count(items, rng)
    item = rng.choice(unique)
    if rng.random() < 0.5:
        return f"Where is the {item.name}?", f"The {item.name} is {item.place}."
    return f"What is {item.place}?", f"There is {article(item.full_name)} {item.place}."


def ask_presence(items: list[Item], rng: Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        item = rng.choice(items)
        name = item.name
    else:
        name = f"{rng.choice(list(COLORS))} {rng.choice(SHAPES)}"
    present = any(item.name == name for item in items)
    question = f"Is there {article(name)}?"
    return question, f"Yes, there is {article(name)}." if present else f"No, there is no {name}."


SCENE_QUESTIONS = [
    ask_describe,
    ask_describe,
    ask_describe,
    ask_json,
    ask_count,
    ask_color,
    ask_shape,
    ask_place,
    ask_presence,
]


def image_part(image: Image.Image) -> Message:
    return {"type": "image", "image": image}


def video_part(frames: list[Image.Image]) -> Message:
    return {"type": "video", "video": frames}


def text_part(text: str) -> Message:
    return {"type": "text", "text": text}


def user(*parts: Message) -> Message:
    return {"role": "user", "content": list(parts)}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": [text_part(text)]}


def scene_chat(rng: Random) -> list[Message]:
    items = random_items(rng, rng.choice([1, 1, 1, 2, 2, 3]))
    question, answer = rng.choice(SCENE_QUESTIONS)(items, rng)
    image, text = image_part(draw_scene(items, rng)), text_part(question)
    messages = [user(image, text) if rng.random() < 0.7 else user(text, image), assistant(answer)]
    while rng.random() < 0.3 and len(messages) < 6:  # a follow-up about the same picture
        question, answer = rng.choice(SCENE_QUESTIONS)(items, rng)
        messages += [user(text_part(question)), assistant(answer)]
    return messages


def one_question(items: list[Item], questions: Sequence[Question], rng: Random) -> list[Message]:
    question, answer = rng.choice(questions)(items, rng)
    image, text = image_part(draw_scene(items, rng)), text_part(question)
    return [user(image, text) if rng.random() < 0.7 else user(text, image), assistant(answer)]


def first_look_chat(rng: Random) -> list[Message]:
    """The easiest lesson: one shape, one question."""
    return one_question(
        random_items(rng, 1), [ask_describe, ask_describe, ask_color, ask_shape, ask_place], rng
    )


def which_is_which_chat(rng: Random) -> list[Message]:
    """Two or three shapes, all different: the color of one shape, or the shape of one color."""
    while True:
        items = random_items(rng, rng.choice([2, 2, 3]))
        if len({i.shape for i in items}) == len({i.color for i in items}) == len(items):
            return one_question(items, [ask_color, ask_shape], rng)


def question_chat(rng: Random) -> list[Message]:
    """One question of any kind about one to three shapes."""
    questions = [
        ask_color,
        ask_shape,
        ask_place,
        ask_place,
        ask_presence,
        ask_presence,
        ask_count,
        ask_describe,
    ]
    return one_question(random_items(rng, rng.choice([1, 2, 2, 2, 3, 3])), questions, rng)


def text_reading_chat(rng: Random) -> list[Message]:
    text = rng.choice(TEXTS)
    question = rng.choice(
        [
            "What does the text say?",
            "What is written in the image?",
            "Read the text.",
            "Describe the image.",
        ]
    )
    image, part = image_part(draw_text(text, rng)), text_part(question)
    return [
        user(image, part) if rng.random() < 0.7 else user(part, image),
        assistant(f'The text says "{text}".'),
    ]


def several_images_chat(rng: Random) -> list[Message]:
    count = rng.choice([2, 2, 2, 3])
    scenes = [random_items(rng, 1) for _ in range(count)]
    kind = rng.choice(["different", "each", "which", "ordinal"])
    if kind == "different" and count == 2 and rng.random() < 0.5:
        first = scenes[0][0]
        scenes[1] = [Item(first.shape, first.color, first.size, scenes[1][0].cell)]
    images = [image_part(draw_scene(scene, rng)) for scene in scenes]
    names = [scene[0].name for scene in scenes]
    if kind == "different" and count == 2:
        question = rng.choice(["Are these images different?", "Are the two images different?"])
        if names[0] == names[1]:
            answer = f"No, both images show {article(names[0])}."
        else:
            answer = (
                f"Yes, the first image shows {article(names[0])} "
                f"and the second image shows {article(names[1])}."
            )
    elif kind == "which" and len(set(names)) == count:
        index = rng.randrange(count)
        question, answer = (
            f"Which image shows {article(names[index])}?",
            f"The {ORDINALS[index]} image shows {article(names[index])}.",
        )
    elif kind == "ordinal":
        index = rng.randrange(count)
        question, answer = (
            f"What does the {ORDINALS[index]} image show?",
            f"The {ORDINALS[index]} image shows {article(names[index])}.",
        )
    else:
        question, answer = "What do the images show?", show_each(names)
    return [user(*images, text_part(question)), assistant(answer)]


def video_chat(rng: Random) -> list[Message]:
    item = random_items(rng, 1)[0]
    direction = rng.choice(list(DIRECTIONS))
    frames = draw_motion(item, direction, 4, rng)
    question = rng.choice(
        ["What happens in the video?", "Describe the video.", "How does the shape move?"]
    )
    return [
        user(video_part(frames), text_part(question)),
        assistant(f"The {item.name} moves {direction}."),
    ]


def text_chat(rng: Random) -> list[Message]:
    kind = rng.randrange(7)
    if kind == 0:
        question = rng.choice(["Hello!", "Hello", "Hi!", "Hi", "Good morning!", "Hey"])
        answer = "Hello! Send me a picture and I will tell you what I see."
    elif kind == 1:
        question = rng.choice(["Who are you?", "What are you?", "What is your name?"])
        answer = "I am a tiny vision-language model. I see shapes, colors and text."
    elif kind == 2:
        question = rng.choice(["What can you do?", "Help", "How can you help me?"])
        answer = (
            "I can describe shapes, count them, name their colors, read short texts "
            "and follow a moving shape in a video."
        )
    elif kind == 3:
        stop = rng.randint(3, 20)
        question, answer = f"Count to {stop}.", ", ".join(str(i) for i in range(1, stop + 1)) + "."
    elif kind == 4:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        question, answer = f"What is {a} + {b}?", f"{a} + {b} = {a + b}."
    elif kind == 5:
        word = rng.choice(WORDS)
        question, answer = f"Spell {word}.", " ".join(word)
    else:
        question = rng.choice(["Thank you!", "Thanks!", "Bye!", "Goodbye!"])
        answer = "You are welcome!" if question.startswith("Thank") else "Goodbye!"
    return [user(text_part(question)), assistant(answer)]


CHATS = [
    (scene_chat, 0.48),
    (text_reading_chat, 0.24),
    (several_images_chat, 0.14),
    (video_chat, 0.05),
    (text_chat, 0.09),
]

# What to practise until which share of the training time: (share, weighted chats, picture sizes).
# Telling shapes apart within one picture is learned in minutes when practised alone, and hardly
# at all in the full mix.
LESSONS = [
    (0.06, [(first_look_chat, 0.5), (which_is_which_chat, 0.5)], PICTURE_SIZES[:1]),
    (
        0.35,
        [(question_chat, 0.72), (which_is_which_chat, 0.08), (text_reading_chat, 0.2)],
        PICTURE_SIZES[:1],
    ),
    (
        1.0,
        [
            (question_chat, 0.28),
            (scene_chat, 0.3),
            (text_reading_chat, 0.22),
            (several_images_chat, 0.11),
            (video_chat, 0.03),
            (text_chat, 0.06),
        ],
        PICTURE_SIZES,
    ),
]


def sample(
    seed: int,
    kinds: Sequence[tuple[Chat, float]] = CHATS,
    size: tuple[int, int] | None = None,
    scale: int | None = None,
) -> list[Message]:
    """The chat for ``seed``, all its pictures of one ``size`` if given; the answer comes last."""
    rng = Random(seed, size, scale)
    make = rng.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]
    messages = make(rng)
    if rng.random() < 0.15:
        messages = [
            {"role": "system", "content": [text_part("You are a helpful assistant.")]},
            *messages,
        ]
    return messages
