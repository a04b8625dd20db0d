// Questions to begin with, about pictures that this page draws.

import { byId, make } from "/playground/dom.js";

const SIDE = 336;
const COLORS = {
  red: "#d62828",
  orange: "#f77f00",
  green: "#2ea043",
  blue: "#2166d4",
  purple: "#8338b4",
};

const EXAMPLES = [
  { question: "What do you see?", pictures: [[["star", "red", 0.5, 0.5, 0.3]]] },
  {
    question: "Describe the image as JSON.",
    pictures: [
      [
        ["circle", "blue", 1 / 6, 1 / 6, 0.3],
        ["triangle", "green", 5 / 6, 5 / 6, 0.18],
      ],
    ],
  },
  {
    question: "What do the images show?",
    pictures: [[["cross", "purple", 0.5, 0.5, 0.3]], [["diamond", "orange", 0.5, 0.5, 0.3]]],
  },
];

/** Shows the examples; `ask(question, files)` is called with the one that is chosen. */
export function begin(ask) {
  byId("examples").replaceChildren(...EXAMPLES.map((example) => card(example, ask)));
}

function card({ question, pictures }, ask) {
  const drawn = pictures.map(draw);
  const choose = async () => ask(question, await Promise.all(drawn.map(toFile)));
  return make(
    "li",
    {},
    make(
      "button",
      { type: "button", class: "example", onclick: choose },
      make("span", { class: "example-pictures", "aria-hidden": "true" }, ...drawn),
      make("span", {}, question),
    ),
  );
}

function draw(shapes) {
  const canvas = make("canvas", { width: SIDE, height: SIDE });
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, SIDE, SIDE);
  for (const [shape, color, x, y, size] of shapes) {
    context.fillStyle = COLORS[color];
    context.beginPath();
    trace(context, shape, x * SIDE, y * SIDE, (size * SIDE) / 2);
    context.fill();
  }
  return canvas;
}

function trace(context, shape, x, y, r) {
  if (shape === "circle") {
    context.arc(x, y, r, 0, 2 * Math.PI);
    return;
  }
  for (const [dx, dy] of OUTLINES[shape]) context.lineTo(x + dx * r, y + dy * r);
  context.closePath();
}

const ARM = 0.36;
const OUTLINES = {
  triangle: [[0, -1], [1, 1], [-1, 1]],
  diamond: [[0, -1], [0.75, 0], [0, 1], [-0.75, 0]],
  cross: [
    [-ARM, -1], [ARM, -1], [ARM, -ARM], [1, -ARM], [1, ARM], [ARM, ARM],
    [ARM, 1], [-ARM, 1], [-ARM, ARM], [-1, ARM], [-1, -ARM], [-ARM, -ARM],
  ],
  star: Array.from({ length: 10 }, (_, corner) => {
    const reach = corner % 2 ? 0.42 : 1;
    const angle = (corner * Math.PI) / 5;
    return [reach * Math.sin(angle), -reach * Math.cos(angle)];
  }),
};

function toFile(canvas) {
  return new Promise((resolve) => {
    canvas.toBlob((blob) => resolve(new File([blob], "drawing.png", { type: blob.type })));
  });
}
