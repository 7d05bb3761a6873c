// Maps over pictures, and the plot of distances.

const ANCHORS = ["000004", "210c4a", "56106e", "89226a", "bb3754", "e35932", "f98c0a", "f9c932", "fcffa4"].map((hex) =>
  [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)),
);

function colour(value) {
  const at = Math.min(Math.max(value, 0), 1) * (ANCHORS.length - 1);
  const low = Math.min(Math.floor(at), ANCHORS.length - 2);
  return ANCHORS[low].map((channel, i) => channel + (ANCHORS[low + 1][i] - channel) * (at - low));
}

/** Where cells lie on the picture: its box is what the model saw, in pixels of the picture. */
export function place(data, grid) {
  const [left, top, right, bottom] = data.box;
  const across = (right - left) / data.input.width;
  const down = (bottom - top) / data.input.height;
  return {
    x: left + data.origin[1] * across,
    y: top + data.origin[0] * down,
    dx: grid.stride[1] * across,
    dy: grid.stride[0] * down,
  };
}

/** The cell under a point of the picture, the nearest one where it lies outside. */
export function cellAt(data, grid, x, y) {
  const at = place(data, grid);
  const clamp = (value, most) => Math.min(Math.max(Math.floor(value), 0), most - 1);
  return { row: clamp((y - at.y) / at.dy, grid.rows), column: clamp((x - at.x) / at.dx, grid.columns) };
}

/** The middle of a cell on the picture. */
export function middle(data, grid, cell) {
  const at = place(data, grid);
  return { x: at.x + (cell.column + 0.5) * at.dx, y: at.y + (cell.row + 0.5) * at.dy };
}

/** The picture with a map over it. `map` has cells on `grid`, and says which value is cold and which is hot. */
export function draw(canvas, picture, data, map, { crisp, marked }) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  context.globalAlpha = 1;
  context.drawImage(picture, 0, 0, width, height);
  context.fillStyle = "rgb(0 0 0 / 0.6)";
  const [left, top, right, bottom] = data.box.map(Math.round);
  context.fillRect(0, 0, width, top);
  context.fillRect(0, bottom, width, height - bottom);
  context.fillRect(0, Math.max(top, 0), left, Math.min(bottom, height) - Math.max(top, 0));
  context.fillRect(right, Math.max(top, 0), width - right, Math.min(bottom, height) - Math.max(top, 0));
  if (!map) return;
  const { grid, cells, rgb, low, high } = map;
  const small = new OffscreenCanvas(grid.columns, grid.rows);
  const inside = small.getContext("2d");
  const pixels = inside.createImageData(grid.columns, grid.rows);
  for (let i = 0; i < grid.rows * grid.columns; i++) {
    const value = rgb ? 1 : Math.min(Math.max((cells[i] - low) / Math.max(high - low, 1e-12), 0), 1);
    const [r, g, b] = rgb ? rgb.subarray(3 * i, 3 * i + 3) : colour(value);
    pixels.data.set([r, g, b, rgb ? 215 : 60 + 130 * value], 4 * i);
  }
  inside.putImageData(pixels, 0, 0);
  const at = place(data, grid);
  context.save();
  context.beginPath();
  context.rect(left, top, right - left, bottom - top);
  context.clip();
  context.imageSmoothingEnabled = !crisp;
  context.imageSmoothingQuality = "high";
  context.drawImage(small, at.x, at.y, at.dx * grid.columns, at.dy * grid.rows);
  context.restore();
  if (marked) {
    const own = place(data, marked.grid);
    const box = [own.x + marked.cell.column * own.dx, own.y + marked.cell.row * own.dy, own.dx, own.dy];
    context.lineWidth = Math.max(width / 160, 2) + 2;
    context.strokeStyle = "#000";
    context.strokeRect(...box);
    context.lineWidth -= 2;
    context.strokeStyle = "#fff";
    context.strokeRect(...box);
  }
}

function svg(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Dots of mean attention distance by layer; `choose` is told the layer and the head of a dot. */
export function plot(distances, now, choose, name) {
  const known = distances.flat().filter((value) => value !== null);
  const most = Math.max(...known, 1);
  const [width, height, left, bottom] = [420, 210, 40, 30];
  const x = (layer) => left + ((layer + 0.5) / distances.length) * (width - left - 8);
  const y = (value) => height - bottom - (value / most) * (height - bottom - 12);
  const means = distances.map((row) => {
    const own = row.filter((value) => value !== null);
    return own.length ? own.reduce((a, b) => a + b, 0) / own.length : null;
  });
  const words = means.map((mean, i) => `layer ${i + 1}: ${mean === null ? "none" : Math.round(mean)}`).join(", ");
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${name}. Mean distance in pixels, ${words}.` });
  for (const part of [0, 0.5, 1]) {
    const at = y(part * most);
    picture.append(svg("line", { x1: left, x2: width - 8, y1: at, y2: at }));
    picture.append(svg("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, Math.round(part * most)));
  }
  const step = Math.ceil(distances.length / 12);
  distances.forEach((row, layer) => {
    if (layer % step === 0) picture.append(svg("text", { x: x(layer), y: height - 10, "text-anchor": "middle" }, layer + 1));
    row.forEach((value, head) => {
      if (value === null) return;
      const chosen = layer === now.layer && (head === now.head || now.head < 0);
      const dot = svg("circle", { cx: x(layer), cy: y(value), r: chosen ? 5.5 : 4.5, class: chosen ? "now" : "" });
      dot.append(svg("title", {}, `layer ${layer + 1}, head ${head + 1}: ${Math.round(value)} pixels`));
      dot.addEventListener("click", () => choose(layer, head));
      picture.append(dot);
    });
  });
  return picture;
}
