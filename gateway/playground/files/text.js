// An answer's text as elements: paragraphs, blocks of code, inline code and bold words.

import { make } from "/playground/dom.js";

const FENCE = /^```[^\n`]*\n([\s\S]*?)(?:\n```[ \t]*$|$(?![\s\S]))/gm;
const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*/g;

/** The elements of `text`; a block of code may still be open. */
export function render(text) {
  const parts = [];
  let from = 0;
  for (const found of text.matchAll(FENCE)) {
    parts.push(...paragraphs(text.slice(from, found.index)));
    parts.push(make("pre", { tabIndex: 0 }, make("code", {}, found[1])));
    from = found.index + found[0].length;
  }
  parts.push(...paragraphs(text.slice(from)));
  return parts;
}

function paragraphs(text) {
  const blocks = text.split(/\n{2,}/).filter((block) => block.trim());
  return blocks.map((block) => make("p", {}, ...inline(block.replace(/^\n+|\n+$/g, ""))));
}

function inline(text) {
  const parts = [];
  let from = 0;
  for (const found of text.matchAll(INLINE)) {
    parts.push(text.slice(from, found.index));
    const isCode = found[1] !== undefined;
    parts.push(make(isCode ? "code" : "strong", {}, isCode ? found[1] : found[2]));
    from = found.index + found[0].length;
  }
  return [...parts, text.slice(from)];
}
