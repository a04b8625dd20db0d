// Pictures of the message that is being written: chosen, dropped, pasted, taken or drawn.

import { button, byId, make, plural, size } from "/playground/dom.js";

const SERVED = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const SHRUNK_PIXELS = 4e6;
const QUALITIES = [0.9, 0.8, 0.6, 0.4];

let pictures = [];
let limits = {};
let say = () => {};

/** Connects the buttons; `note` shows a line of text to the visitor. */
export function begin(note) {
  say = note;
  byId("choose").onclick = () => byId("files").click();
  for (const id of ["files", "shot"]) {
    byId(id).onchange = async () => {
      await add([...byId(id).files]);
      byId(id).value = "";
    };
  }
  byId("camera").onclick = openCamera;
  document.addEventListener("paste", (event) => {
    const pasted = [...event.clipboardData.files];
    if (!pasted.length) return;
    event.preventDefault();
    add(pasted);
  });
  acceptDrops();
}

/** What /health says of the server's limits; unknown ones are not checked here. */
export function setLimits(config) {
  limits = config || {};
  const known = [
    limits.max_images && `up to ${plural(limits.max_images, "picture")}`,
    limits.max_media_bytes && `${size(limits.max_media_bytes)} each`,
  ].filter(Boolean);
  byId("choose").title = known.length ? `Add pictures (${known.join(", ")})` : "Add pictures";
  show();
}

/** Adds files that are pictures; others are named in a note. */
export async function add(files) {
  const notes = [];
  for (const file of files) {
    try {
      pictures.push(await read(file, notes));
    } catch {
      notes.push(`${file.name || "That"} is no picture that this browser can show.`);
    }
  }
  say(notes.join(" "));
  show();
  byId("question").focus();
}

/** The pictures, which the message takes with it; the list is empty afterwards. */
export function take() {
  const taken = pictures;
  pictures = [];
  show();
  return taken;
}

/** Puts pictures back, to be sent again, in the place of those that are there. */
export function restore(taken) {
  release(pictures);
  pictures = [...taken];
  show();
}

/** Frees what the browser keeps for showing pictures, which are not shown again. */
export function release(shown) {
  for (const { preview } of shown) URL.revokeObjectURL(preview);
}

export const count = () => pictures.length;

/** Why the pictures cannot be sent; empty if they can. */
export function fault() {
  if (limits.max_images && pictures.length > limits.max_images) {
    return `The server takes ${plural(limits.max_images, "picture")} in one request.`;
  }
  const wrong = pictures.find(excess);
  return wrong ? `${wrong.name} is too large: shrink or remove it.` : "";
}

/** A picture as a data: URL, made once. */
export async function dataUrl(picture) {
  picture.data ??= await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(picture.blob);
  });
  return picture.data;
}

async function read(file, notes) {
  let blob = file;
  const bitmap = await decode(blob);
  if (!SERVED.includes(blob.type)) {
    blob = await draw(bitmap, bitmap.width, bitmap.height, "image/png");
    notes.push(`${file.name} was converted to PNG, since the server does not take its format.`);
  }
  return described(blob, file.name || "picture", bitmap);
}

function described(blob, name, { width, height }) {
  return { blob, name, width, height, preview: URL.createObjectURL(blob) };
}

/** The picture as an image element. Rejects what is no picture. */
async function decode(blob) {
  const image = new Image();
  image.src = URL.createObjectURL(blob);
  try {
    await image.decode();
  } finally {
    URL.revokeObjectURL(image.src);
  }
  return image;
}

function draw(image, width, height, type, quality) {
  const canvas = make("canvas", { width, height });
  canvas.getContext("2d").drawImage(image, 0, 0, width, height);
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("no picture"))), type, quality);
  });
}

/** Why the server would refuse a picture; empty if it would not. */
function excess({ blob, width, height }) {
  if (limits.max_media_bytes && blob.size > limits.max_media_bytes) {
    return `${size(blob.size)}; the server takes ${size(limits.max_media_bytes)}`;
  }
  if (limits.max_image_pixels && width * height > limits.max_image_pixels) {
    const most = Math.floor(limits.max_image_pixels / 1e6);
    return `${Math.round((width * height) / 1e6)} megapixels; the server takes ${most}`;
  }
  return "";
}

async function shrink(picture) {
  const most = Math.min(limits.max_image_pixels || Infinity, SHRUNK_PIXELS);
  const scale = Math.min(1, Math.sqrt(most / (picture.width * picture.height)));
  const width = Math.max(1, Math.floor(picture.width * scale));
  const height = Math.max(1, Math.floor(picture.height * scale));
  const image = await decode(picture.blob);
  let blob;
  for (const quality of QUALITIES) {
    blob = await draw(image, width, height, "image/jpeg", quality);
    if (blob.size <= (limits.max_media_bytes || Infinity)) break;
  }
  const shrunk = described(blob, picture.name, { width, height });
  pictures = pictures.map((each) => (each === picture ? shrunk : each));
  release([pictures.includes(shrunk) ? picture : shrunk]); // It may have been removed meanwhile.
  show();
}

function show() {
  byId("pictures").replaceChildren(...pictures.map(preview));
}

function preview(picture) {
  const problem = excess(picture);
  const told = `${picture.width} × ${picture.height}, ${size(picture.blob.size)}`;
  return make(
    "li",
    { class: problem ? "wrong" : "", title: `${picture.name}: ${told}` },
    make("img", { src: picture.preview, alt: picture.name }),
    problem ? make("span", { class: "note" }, problem) : null,
    problem ? button("Shrink", () => shrink(picture)) : null,
    make(
      "button",
      {
        type: "button",
        class: "remove",
        "aria-label": `Remove ${picture.name}`,
        onclick: () => {
          pictures = pictures.filter((each) => each !== picture);
          release([picture]);
          show();
          byId("question").focus();
        },
      },
      "×",
    ),
  );
}

function acceptDrops() {
  let depth = 0;
  const overlay = byId("drop");
  const hasFiles = (event) => [...event.dataTransfer.types].includes("Files");
  addEventListener("dragenter", (event) => {
    if (!hasFiles(event)) return;
    depth += 1;
    overlay.hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (!hasFiles(event)) return;
    depth = Math.max(0, depth - 1);
    overlay.hidden = depth === 0;
  });
  addEventListener("dragover", (event) => {
    if (hasFiles(event)) event.preventDefault();
  });
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    depth = 0;
    overlay.hidden = true;
    add([...event.dataTransfer.files]);
  });
}

/** The camera in a dialog; where the page may not use it, the device's own, by a file input. */
async function openCamera() {
  const own = matchMedia("(pointer: coarse)").matches || !navigator.mediaDevices?.getUserMedia;
  if (own) return byId("shot").click();
  let stream;
  try {
    const video = { facingMode: "environment", width: { ideal: 1280 } };
    stream = await navigator.mediaDevices.getUserMedia({ video });
  } catch (error) {
    return say(`The camera cannot be used (${error.name}); choose a file instead.`);
  }
  await takeFrom(stream);
}

async function takeFrom(stream) {
  const dialog = byId("camera-dialog");
  const video = byId("video");
  video.srcObject = stream;
  dialog.showModal();
  byId("camera-cancel").onclick = () => dialog.close();
  byId("camera-take").onclick = async () => {
    const blob = await draw(video, video.videoWidth, video.videoHeight, "image/jpeg", 0.92);
    dialog.close();
    await add([new File([blob], "camera.jpg", { type: blob.type })]);
  };
  dialog.addEventListener(
    "close",
    () => {
      for (const track of stream.getTracks()) track.stop();
      video.srcObject = null;
    },
    { once: true },
  );
}
