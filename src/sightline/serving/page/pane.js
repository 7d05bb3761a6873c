// One image under one model: the picture with its map, the answer, and what can be taken home.

import * as api from "./api.js";
import { answers, inWords } from "./answers.js";
import { addHeads } from "./arrays.js";
import { cellAt, draw, middle } from "./draw.js";
import { MAPS } from "./maps.js";

const KEPT = 8; // explanations; each may be some megabytes

export class Pane {
  constructor(app, letter) {
    this.app = app;
    this.root = document.createElement("section");
    this.root.className = "pane";
    this.root.setAttribute("aria-label", `View ${letter}`);
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-roledescription", "attention map");
    this.side = document.createElement("div");
    this.title = document.createElement("h2");
    this.choices = document.createElement("p");
    this.choices.className = "fields";
    this.image = this.chooser(`Image of view ${letter}`, "Image", (value) => this.choose(app.items[Number(value)], this.model));
    this.which = this.chooser(`Model of view ${letter}`, "Model", (value) => this.choose(this.item, value));
    this.answer = document.createElement("div");
    const take = document.createElement("p");
    take.className = "row";
    take.append(this.button("Save picture", () => this.savePicture()), this.button("Save arrays", () => this.saveArrays()));
    this.side.append(this.title, this.choices, this.answer, take);
    this.root.append(this.canvas, this.side);
    this.listen();
  }

  chooser(label, word, chosen) {
    const select = document.createElement("select");
    select.setAttribute("aria-label", label);
    select.addEventListener("change", () => chosen(select.value));
    const around = document.createElement("label");
    around.append(`${word} `, select);
    this.choices.append(around);
    return select;
  }

  button(words, action) {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = words;
    made.addEventListener("click", async () => {
      try {
        await action();
      } catch (fault) {
        this.app.problem(fault.message);
      }
    });
    return made;
  }

  listen() {
    const point = (event) => {
      if (!this.data) return;
      const box = this.canvas.getBoundingClientRect();
      const scale = Math.min(box.width / this.canvas.width, box.height / this.canvas.height);
      const x = (event.clientX - box.left - (box.width - scale * this.canvas.width) / 2) / scale;
      const y = (event.clientY - box.top - (box.height - scale * this.canvas.height) / 2) / scale;
      this.app.point({ x: x / this.canvas.width, y: y / this.canvas.height });
    };
    this.canvas.addEventListener("pointermove", point);
    this.canvas.addEventListener("pointerdown", point);
    this.canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.app.point(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!this.data || (!step && event.key !== "Escape")) return;
    event.preventDefault();
    if (!step) return this.app.point(null);
    const grid = this.data.layers[this.app.see.layer] ?? this.data.grid;
    const now = this.here();
    let cell = { row: Math.floor(grid.rows / 2), column: Math.floor(grid.columns / 2) };
    if (now) {
      cell = cellAt(this.data, grid, now.x, now.y);
      cell = {
        row: Math.min(Math.max(cell.row + step[0], 0), grid.rows - 1),
        column: Math.min(Math.max(cell.column + step[1], 0), grid.columns - 1),
      };
    }
    const at = middle(this.data, grid, cell);
    this.app.point({ x: at.x / this.canvas.width, y: at.y / this.canvas.height });
  }

  /** The point that is looked at, in pixels of this picture. */
  here() {
    const at = this.app.see.point;
    return at && { x: at.x * this.canvas.width, y: at.y * this.canvas.height };
  }

  get data() {
    return this.seen?.data;
  }

  /** Lists the images and models that can be chosen here. */
  list(items, models) {
    this.image.replaceChildren(...items.map((item, i) => new Option(item.name, i, false, item === this.item)));
    this.which.replaceChildren(...models.map((model) => new Option(model.name, model.name, false, model.name === this.model)));
    this.which.parentElement.hidden = models.length < 2;
    this.image.parentElement.hidden = !this.app.see.compare;
    this.choices.hidden = models.length < 2 && !this.app.see.compare;
  }

  /** Shows an image under a model, asking the server where that has not been seen yet. */
  async choose(item, model) {
    [this.item, this.model] = [item, model];
    const ask = (this.ask = Symbol());
    this.app.say(`Looking at ${item.name} …`);
    try {
      if (!item.seen.has(model)) {
        item.seen.set(model, await api.explained(item, model));
        this.app.remember(item, model, KEPT);
      }
    } catch (fault) {
      if (ask !== this.ask) return;
      this.seen = null;
      this.app.say("");
      this.app.problem(fault.message);
      this.app.refresh();
      return;
    }
    if (ask !== this.ask) return;
    this.seen = item.seen.get(model);
    this.app.problem("");
    this.app.say(`${item.name}: ${inWords(this.seen.result)}`);
    this.title.textContent = item.name;
    this.answer.replaceChildren(...answers(this.seen.result));
    [this.canvas.width, this.canvas.height] = [this.seen.picture.width, this.seen.picture.height];
    this.canvas.setAttribute("aria-label", `${item.name} under ${model}. Arrow keys choose the patch that asks, Escape lets go.`);
    this.app.refresh();
  }

  /** Draws what is to be seen now, and tells it. */
  draw() {
    this.root.hidden = !this.seen;
    if (!this.seen) return "";
    const see = this.app.see;
    const mode = MAPS[see.mode].has(this.data) ? see.mode : "image";
    const map = MAPS[mode].make(this.data, see, this.here());
    if (map.missing !== undefined) {
      this.fetch(map.missing);
      draw(this.canvas, this.seen.picture, this.data, null, { crisp: see.crisp });
      return "This layer is being fetched …";
    }
    draw(this.canvas, this.seen.picture, this.data, map.none ? null : map, { crisp: see.crisp, marked: map.marked });
    return map.words;
  }

  async fetch(number) {
    const seen = this.seen;
    seen.asked ??= new Set();
    if (seen.asked.has(number)) return;
    seen.asked.add(number);
    try {
      const sent = await api.layer(this.item, this.model, number);
      addHeads(seen.data.heads, sent);
      seen.data.layers[number].prefix = sent.prefix.shape[2];
      this.app.refresh();
    } catch (fault) {
      this.app.problem(fault.message);
    }
  }

  async savePicture() {
    const blob = await new Promise((done) => this.canvas.toBlob(done, "image/png"));
    save(blob, `${stem(this.item.name)}-${this.app.see.mode}.png`);
  }

  async saveArrays() {
    save(await api.arrays(this.item, this.model), `${stem(this.item.name)}.npz`);
  }
}

const stem = (name) => name.replace(/\.[^.]*$/, "") || "image";

function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
