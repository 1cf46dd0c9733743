// The page of `align label`: one labeler's ranks, and the document that takes them.
// Texts are strangers' data: they enter the document as text, never as HTML.
"use strict";

class Ranks {
  // data: {name, labeler, tasks: [{key, head, items, messages, texts, order}]}; storage: localStorage, or null.
  constructor(data, storage) {
    this.name = data.name;
    this.labeler = data.labeler;
    this.tasks = data.tasks;
    this.storage = storage;
    this.kept = storage !== null; // whether the browser has the work that was done
    this.answers = this.tasks.map((task) => ({ ranks: task.texts.map(() => null), skipped: false }));
    this.restore();
  }

  place(i) {
    return `align label ${this.labeler} ${this.tasks[i].key}`;
  }

  // Each task by itself, so that two open pages do not overwrite each other's.
  restore() {
    if (!this.kept) return;
    try {
      this.tasks.forEach((_, i) => {
        const found = JSON.parse(this.storage.getItem(this.place(i)));
        if (found !== null) this.answers[i] = found;
      });
    } catch {
      this.kept = false;
    }
  }

  keep(i) {
    try {
      this.storage.setItem(this.place(i), JSON.stringify(this.answers[i]));
    } catch {
      this.kept = false;
    }
  }

  rank(i, answer, rank) {
    this.answers[i].ranks[answer] = rank;
    this.answers[i].skipped = false;
    this.keep(i);
  }

  skip(i) {
    this.answers[i].skipped = true;
    this.keep(i);
  }

  // What is still wanting in task i; nothing where it is ranked or was skipped.
  wanting(i) {
    const { ranks, skipped } = this.answers[i];
    if (skipped) return "";
    if (ranks.includes(null)) return "Give every answer a rank.";
    if (new Set(ranks).size === 1) return "All answers have one rank, which prefers none: rank them apart, or skip.";
    return "";
  }

  isRanked(i) {
    return !this.answers[i].skipped && this.wanting(i) === "";
  }

  count() {
    const ranked = this.tasks.filter((_, i) => this.isRanked(i)).length;
    return { ranked, skipped: this.answers.filter((answer) => answer.skipped).length, all: this.tasks.length };
  }

  // The next task after i that waits, from the start again past the end; -1 where none does.
  next(i) {
    const all = this.tasks.length;
    for (let step = 1; step <= all; step++) {
      if (this.wanting((i + step) % all) !== "") return (i + step) % all;
    }
    return -1;
  }

  // Rankings as JSON lines: the rows as they came, with ranks and labeler. What was skipped or not done is not in it.
  lines() {
    const rows = this.tasks.flatMap(({ key, head, items }, i) => {
      if (!this.isRanked(i)) return [];
      const { ranks } = this.answers[i];
      const completions = items.map((item, k) => `${item.slice(0, -1)}, "rank": ${ranks[k]}}`).join(", ");
      const made = `"labeler": ${JSON.stringify(this.labeler)}, "label_task": "${key}"`;
      return [`${head.slice(0, -1)}, "completions": [${completions}], ${made}}\n`];
    });
    return rows.join("");
  }

  // Ranks from a file that was downloaded before, for what is not ranked here; gives how many were taken. Throws where a
  // line is no such ranking, and then takes none.
  take(text) {
    const known = new Map(this.tasks.map(({ key }, i) => [key, i]));
    const found = text.split("\n").filter((line) => line.trim() !== "").map((line) => {
      const row = JSON.parse(line);
      const i = row.labeler === this.labeler ? known.get(row.label_task) : undefined;
      const ranks = row.completions.map((item) => item.rank);
      const size = i === undefined ? ranks.length : this.tasks[i].items.length;
      if (ranks.length !== size || !ranks.every((rank) => Number.isInteger(rank) && rank >= 1 && rank <= size)) {
        throw new Error("ranks that no page gives");
      }
      return [i, ranks];
    });
    const wanted = found.filter(([i]) => i !== undefined && !this.isRanked(i));
    for (const [i, ranks] of wanted) {
      this.answers[i] = { ranks, skipped: false };
      this.keep(i);
    }
    return wanted.length;
  }
}

class Page {
  // download: what is done with a file's name and its text.
  constructor(document, ranks, download) {
    this.document = document;
    this.ranks = ranks;
    this.download = download;
    this.at = Math.max(0, ranks.next(-1));
    const on = (id, action) => document.getElementById(id).addEventListener("click", action);
    on("previous", () => this.go(this.at - 1));
    on("next", () => this.go(this.at + 1));
    on("skip", () => this.skip());
    on("waiting", () => this.onward());
    on("download", () => this.save());
    document.addEventListener("keydown", (event) => this.pressed(event));
    this.draw();
  }

  part(tag, className, text) {
    const element = this.document.createElement(tag);
    element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  go(i) {
    if (i < 0 || i >= this.ranks.tasks.length) return;
    this.at = i;
    this.draw();
  }

  onward() {
    const i = this.ranks.next(this.at);
    if (i >= 0) this.go(i);
    else this.refresh();
  }

  skip() {
    this.ranks.skip(this.at);
    this.onward();
  }

  // With what another open page of this labeler has done.
  save() {
    this.ranks.restore();
    this.refresh();
    const text = this.ranks.lines();
    if (text === "") this.document.getElementById("message").textContent = "Nothing is ranked yet.";
    else this.download(`rankings-${this.ranks.name}-${this.ranks.labeler}.jsonl`, text);
  }

  // A digit ranks the marked answer and marks the next without a rank; Enter goes on when all have one.
  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter") event.preventDefault(); // or it would press the button that was clicked last
    const { order } = this.ranks.tasks[this.at];
    const digit = Number(event.key);
    if (digit >= 1 && digit <= order.length) {
      this.give(this.marked, digit);
    } else if (event.key === "Enter" && !event.repeat && this.ranks.wanting(this.at) === "") {
      this.onward();
    }
  }

  give(place, rank) {
    const { order } = this.ranks.tasks[this.at];
    const before = this.ranks.answers[this.at].ranks[order[place]];
    this.ranks.rank(this.at, order[place], rank);
    if (before === null) this.marked = this.firstWaiting(place);
    this.refresh();
  }

  firstWaiting(otherwise) {
    const { order } = this.ranks.tasks[this.at];
    const found = order.findIndex((answer) => this.ranks.answers[this.at].ranks[answer] === null);
    return found >= 0 ? found : otherwise;
  }

  // The task's prompt and answers anew.
  draw() {
    const task = this.ranks.tasks[this.at];
    const said = task.messages.flatMap(({ role, content }) => [
      this.part("div", "role", role),
      this.part("div", "text", content),
    ]);
    this.document.getElementById("prompt").replaceChildren(...said);
    this.marked = this.firstWaiting(0);
    this.cards = task.order.map((answer, place) => this.card(task.texts[answer], place, task.order.length));
    this.document.getElementById("answers").replaceChildren(...this.cards.map(({ element }) => element));
    this.refresh();
  }

  card(text, place, size) {
    const element = this.part("div", "answer");
    const buttons = Array.from({ length: size }, (_, i) => {
      const button = this.part("button", "rank", String(i + 1));
      button.addEventListener("click", () => {
        this.marked = place;
        this.give(place, i + 1);
      });
      return button;
    });
    const row = this.part("div", "ranks");
    row.append(this.part("span", "role", `answer ${"ABCDEFGHIJKLMNOPQRSTUVWXYZ"[place] ?? place + 1}`), ...buttons);
    element.append(row, this.part("div", "text", text));
    return { element, buttons };
  }

  // What a click changes: ranks, the mark, counts and messages.
  refresh() {
    const { order } = this.ranks.tasks[this.at];
    const { ranks, skipped } = this.ranks.answers[this.at];
    this.cards.forEach(({ element, buttons }, place) => {
      element.className = place === this.marked ? "answer marked" : "answer";
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(ranks[order[place]] === i + 1)));
    });
    const count = this.ranks.count();
    const left = count.all - count.ranked - count.skipped;
    const say = (id, text) => (this.document.getElementById(id).textContent = text);
    say("progress", `prompt ${this.at + 1} of ${count.all}: ${count.ranked} ranked, ${count.skipped} skipped, ${left} wait`);
    const done = left === 0 ? "All done: download the rankings." : "Ranked: Enter or Next waiting.";
    say("message", skipped ? "Skipped; a rank takes it back." : this.ranks.wanting(this.at) || done);
    const lost = "This browser keeps nothing: download before you close the page.";
    say("warning", this.ranks.kept ? "" : lost);
  }
}

function start(window) {
  const { document } = window;
  const data = JSON.parse(document.getElementById("data").textContent);
  let storage = null;
  try {
    storage = window.localStorage;
  } catch {
    // Some browsers refuse it to a file: the page says that nothing is kept.
  }
  const ranks = new Ranks(data, storage);
  const page = new Page(document, ranks, (name, text) => {
    const link = document.createElement("a");
    link.href = window.URL.createObjectURL(new window.Blob([text], { type: "application/jsonl" }));
    link.download = name;
    link.click();
  });
  document.getElementById("load").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (file === undefined) return;
    let told;
    try {
      told = `${ranks.take(await file.text())} rankings taken from the file.`;
      event.target.value = ""; // so that the same file can be chosen again
    } catch {
      told = "That file is not one of this page's downloads.";
    }
    page.go(Math.max(0, ranks.next(-1)));
    document.getElementById("message").textContent = told;
  });
  window.addEventListener("beforeunload", (event) => {
    if (!ranks.kept && ranks.count().ranked > 0) event.preventDefault();
  });
  return page;
}

if (typeof module === "undefined") start(window);
else module.exports = { Ranks, Page, start };
