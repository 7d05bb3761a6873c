// The page: images come in, panes show them, and the controls say what is seen.

import * as api from "./api.js";
import { plot } from "./draw.js";
import { MAPS, tokenName } from "./maps.js";
import { Pane } from "./pane.js";

const get = (id) => document.getElementById(id);

class App {
  constructor() {
    this.items = [];
    this.models = [];
    this.see = { mode: "heads", layer: 0, head: -1, depth: 0, asker: "hand", crisp: false, compare: false, point: null };
    this.panes = [new Pane(this, "A"), new Pane(this, "B")];
    this.recent = [];
    this.fresh = true;
    this.started = null; // a promise: images may come before the server has said which models it has
    get("panes").append(this.panes[0].root);
  }

  async start() {
    this.models = await api.models();
    const [first] = this.models;
    const more = this.models.length > 1 ? `, and ${this.models.length - 1} more` : "";
    get("facts").textContent = `${first.name}${first.labels ? `: ${first.labels} classes, ${(first.parameters / 1e6).toFixed(1)} M parameters` : ""}${more}`;
  }

  say(words) {
    get("status").textContent = words;
  }

  problem(words) {
    get("problem").textContent = words;
  }

  get shown() {
    return this.see.compare ? this.panes : this.panes.slice(0, 1);
  }

  /** Takes images in; the first of them is shown. */
  add(blobs) {
    const items = [...blobs].map((blob) => ({ blob, name: blob.name || "pasted.png", seen: new Map() }));
    if (!items.length) return;
    this.problem("");
    this.items.push(...items);
    document.body.classList.add("busy-with");
    for (const item of items) get("strip").append(this.thumbnail(item));
    this.show(items[0]);
  }

  thumbnail(item) {
    const image = Object.assign(document.createElement("img"), { alt: item.name, src: URL.createObjectURL(item.blob) });
    const button = Object.assign(document.createElement("button"), { type: "button", title: item.name });
    button.append(image);
    button.addEventListener("click", () => this.show(item));
    item.button = button;
    const row = document.createElement("li");
    row.append(button);
    return row;
  }

  async show(item) {
    await this.started;
    if (!this.models.length) return;
    this.panes[0].choose(item, this.panes[0].model ?? this.models[0].name);
    this.list();
  }

  /** Keeps the newest explanations, and lets older ones go. */
  remember(item, model, most) {
    this.recent.push([item, model]);
    while (this.recent.length > most) {
      const [old, under] = this.recent.shift();
      old.seen.delete(under);
    }
  }

  list() {
    for (const pane of this.panes) pane.list(this.items, this.models);
    for (const item of this.items) item.button.setAttribute("aria-pressed", item === this.panes[0].item);
  }

  /** Looks at a point of the image, given as shares of its width and height; null lets go. */
  point(at) {
    this.see.point = at;
    this.soon();
  }

  soon() {
    this.due ??= requestAnimationFrame(() => {
      this.due = undefined;
      this.draw();
    });
  }

  draw() {
    const words = this.shown.map((pane) => pane.draw()).filter(Boolean);
    clearTimeout(this.telling); // a voice need not read every patch that a hand passes over
    this.telling = setTimeout(() => (get("told").textContent = words.join(" — ")), 150);
  }

  /** Fits the controls to what can be seen now, and draws. */
  refresh() {
    this.list();
    const pane = this.shown.find((one) => one.seen);
    get("look").hidden = !pane;
    if (!pane) return;
    const { data } = pane;
    const see = this.see;
    if (this.fresh && data.layers.length) {
      [see.layer, see.depth, this.fresh] = [data.layers.length - 1, data.layers.length - 1, false];
    }
    if (!MAPS[see.mode].has(data)) see.mode = Object.keys(MAPS).find((mode) => MAPS[mode].has(data));
    see.layer = Math.min(see.layer, Math.max(data.layers.length - 1, 0));
    this.modes(data);
    options(get("layer"), data.layers.map((_, i) => [i, i + 1]), see.layer);
    const heads = data.distance[see.layer]?.length ?? 0;
    see.head = Math.min(see.head, heads - 1);
    options(get("head"), [[-1, "mean of all"], ...Array.from({ length: heads }, (_, i) => [i, i + 1])], see.head);
    const prefix = data.layers[see.layer]?.prefix ?? 0;
    const tokens = Array.from({ length: prefix }, (_, i) => [`token ${i}`, tokenName(data, i)]);
    options(get("asker"), [["hand", "the patch I point at"], ...tokens, ["read", "what the answer is read from"]], see.asker);
    get("depth").max = Math.max((data.depths?.length ?? 1) - 1, 0);
    get("depth").value = see.depth;
    get("depth-value").textContent = `layers 1 to ${Number(get("depth").value) + 1}`;
    const uses = MAPS[see.mode].uses;
    for (const label of document.querySelectorAll(".for-heads")) label.hidden = !uses.includes("heads");
    get("depth-label").hidden = !uses.includes("depth") || !data.depths;
    get("asker").parentElement.hidden = !uses.includes("asker");
    get("meaning").textContent = MAPS[see.mode].meaning;
    get("panes").classList.toggle("two", see.compare);
    get("distances").hidden = !data.distance.length;
    get("plot").replaceChildren(
      ...this.shown.filter((one) => one.seen).map((one) => plot(one.data.distance, see, (layer, head) => this.set({ mode: "heads", layer, head }), one.item.name)),
    );
    this.draw();
  }

  modes(data) {
    const able = Object.entries(MAPS).filter(([, map]) => map.has(data));
    const key = able.map(([mode]) => mode).join();
    if (this.able !== key) {
      this.able = key;
      const legend = get("modes").firstElementChild;
      get("modes").replaceChildren(legend, ...able.map(([mode, map]) => {
        const input = Object.assign(document.createElement("input"), { type: "radio", name: "mode", value: mode });
        input.addEventListener("change", () => this.set({ mode }));
        const label = document.createElement("label");
        label.append(input, map.name);
        return label;
      }));
    }
    for (const input of get("modes").querySelectorAll("input")) input.checked = input.value === this.see.mode;
  }

  set(change) {
    Object.assign(this.see, change);
    this.refresh();
  }

  compare(on) {
    this.see.compare = on;
    const [a, b] = this.panes;
    if (on) {
      get("panes").append(b.root);
      const other = this.items[(this.items.indexOf(a.item) + 1) % this.items.length];
      const model = this.models.find((one) => one.name !== a.model && this.items.length < 2)?.name ?? a.model;
      b.choose(b.item ?? other, b.model ?? model);
    } else {
      b.root.remove();
    }
    this.refresh();
  }
}

function options(select, rows, value) {
  const key = JSON.stringify(rows);
  if (select.dataset.rows !== key) {
    select.dataset.rows = key;
    select.replaceChildren(...rows.map(([own, words]) => new Option(words, own)));
  }
  select.value = String(value);
  if (select.selectedIndex < 0) select.selectedIndex = 0;
}

const app = new App();

get("files").addEventListener("change", (event) => {
  app.add(event.target.files);
  event.target.value = "";
});
get("layer").addEventListener("change", (event) => app.set({ layer: Number(event.target.value) }));
get("head").addEventListener("change", (event) => app.set({ head: Number(event.target.value) }));
get("depth").addEventListener("input", (event) => app.set({ depth: Number(event.target.value) }));
get("asker").addEventListener("change", (event) => app.set({ asker: event.target.value }));
get("crisp").addEventListener("change", (event) => app.set({ crisp: event.target.checked }));
get("compare").addEventListener("change", (event) => app.compare(event.target.checked));
get("controls").addEventListener("submit", (event) => event.preventDefault());

for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragover" || kind === "dragenter");
    if (kind === "drop") app.add(event.dataTransfer.files);
  });
}
document.addEventListener("paste", (event) => app.add(event.clipboardData.files));

let stream = null;
const stop = () => stream?.getTracks().forEach((track) => track.stop());
get("camera").addEventListener("click", async () => {
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    app.problem("There is no camera, or this page may not use it.");
    return;
  }
  get("video").srcObject = stream;
  await get("video").play();
  get("snap").showModal();
});
get("shoot").addEventListener("click", async () => {
  const video = get("video");
  const frame = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  frame.getContext("2d").drawImage(video, 0, 0);
  const blob = await frame.convertToBlob({ type: "image/jpeg", quality: 0.95 });
  get("snap").close();
  app.add([new File([blob], `camera-${app.items.length + 1}.jpg`, { type: blob.type })]);
});
get("unsnap").addEventListener("click", () => get("snap").close());
get("snap").addEventListener("close", stop);

app.started = app.start().catch((fault) => app.problem(fault.message));
