// As much of a browser as the page of `align label` needs: node label_browser.js PAGE.html < steps.json
// A step is [what, ...]; after each the page's lines are printed as JSON, with what was downloaded so far.
"use strict";
const fs = require("fs");
const vm = require("vm");

const html = fs.readFileSync(process.argv[2], "utf8");
const script = (attributes) => html.match(new RegExp(`<script${attributes}>([^]*?)</script>`))[1];
const { steps, refuse } = JSON.parse(fs.readFileSync(0, "utf8"));
const kept = new Map();
const downloads = [];
let elements, listeners, window, focused;

function element(id) {
  const handlers = {};
  return {
    id, handlers, children: [], attributes: {}, textContent: "", className: "",
    append(...parts) { this.children.push(...parts); },
    replaceChildren(...parts) { this.children = parts; },
    setAttribute(name, value) { this.attributes[name] = value; },
    addEventListener(name, handler) { handlers[name] = handler; },
    click() {
      focused = this;
      if (this.download) downloads.push([this.download, this.href.parts.join("")]);
      else handlers.click({});
    },
  };
}

function open() {
  elements = Object.fromEntries([...html.matchAll(/ id="(\w+)"/g)].map(([, id]) => [id, element(id)]));
  elements.data.textContent = script(' type="application/json" id="data"');
  listeners = {};
  const storage = {
    getItem: (key) => kept.get(key) ?? null,
    setItem: (key, value) => { if (refuse) throw new Error("quota"); kept.set(key, value); },
  };
  const document = {
    getElementById: (id) => elements[id],
    createElement: () => element(),
    addEventListener: (name, handler) => { listeners[name] = handler; },
  };
  window = {
    document, localStorage: storage, addEventListener() {}, URL: { createObjectURL: (blob) => blob },
    Blob: class { constructor(parts) { this.parts = parts; } },
  };
  vm.runInNewContext(script(""), { window });
}

const cards = () => elements.answers.children;
const buttons = (card) => card.children[0].children.slice(1);
const actions = {
  open,
  key: (key) => {
    let prevented = false;
    listeners.keydown({ key, preventDefault() { prevented = true; } });
    if (key === "Enter" && !prevented && focused) focused.click();
  },
  // Another open page of the same labeler has done this.
  store: (key, answer) => kept.set(key, JSON.stringify(answer)),
  click: (id) => elements[id].click(),
  rank: (text, rank) => buttons(cards().find((card) => card.children[1].textContent === text))[rank - 1].click(),
  cancel: () => elements.load.handlers.change({ target: { files: [] } }),
  load: (text) => elements.load.handlers.change({ target: { files: [{ text: async () => text }] } }),
};

async function main() {
  const log = [];
  for (const [what, ...rest] of [["open"], ...steps]) {
    await actions[what](...rest);
    log.push({
      progress: elements.progress.textContent, message: elements.message.textContent, warning: elements.warning.textContent,
      prompt: elements.prompt.children.map((part) => part.textContent),
      answers: cards().map((card) => card.children[1].textContent),
      ranks: cards().map((card) => 1 + buttons(card).findIndex((button) => button.attributes["aria-pressed"] === "true")),
      marked: cards().findIndex((card) => card.className.includes("marked")),
    });
  }
  console.log(JSON.stringify({ log, downloads }));
}
main();
