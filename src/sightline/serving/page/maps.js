// Which map is shown: a table of ways to look, each with what it needs and what it says.

import { depthRow, headRow, positionRow } from "./arrays.js";
import { cellAt } from "./draw.js";

const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const spot = (cell) => `row ${cell.row + 1}, column ${cell.column + 1}`;

/** Which tokens of a layer ask, and what they are called. */
function asking(data, layer, see, point) {
  const grid = data.layers[layer];
  const prefix = grid.prefix;
  const patches = Array.from({ length: grid.rows * grid.columns }, (_, i) => prefix + i);
  if (see.asker === "hand" && point) {
    const cell = cellAt(data, grid, point.x, point.y);
    const named = `the patch in ${spot(cell)}`;
    return { tokens: [prefix + cell.row * grid.columns + cell.column], named, marked: { grid, cell } };
  }
  const prefixed = /^token (\d+)$/.exec(see.asker);
  if (prefixed && Number(prefixed[1]) < prefix) return { tokens: [Number(prefixed[1])], named: tokenName(data, Number(prefixed[1])) };
  if (data.query === "mean of patches" || !prefix) return { tokens: patches, named: "the mean of all patches" };
  const count = Math.min(data.query === "class token" ? 1 : 2, prefix);
  return { tokens: [...Array(count).keys()], named: `the ${data.query}` };
}

/** What a prefix token is called. */
export function tokenName(data, token) {
  return `the ${data.prefix[token] ?? `prefix token ${token + 1}`}`;
}

function shown(grid, row, asked, unit) {
  const best = row.cells.reduce((most, value, i) => (value > row.cells[most] ? i : most), 0);
  const cell = { row: Math.floor(best / grid.columns), column: best % grid.columns };
  const rest = row.prefix > 0.0005 ? `, ${percent(row.prefix)} to tokens that are no patches` : "";
  return {
    grid,
    cells: row.cells,
    low: 0,
    high: row.cells[best],
    marked: asked.marked,
    words: `${unit} of ${asked.named}: most, ${percent(row.cells[best])}, to ${spot(cell)}${rest}.`,
  };
}

export const MAPS = {
  heads: {
    name: "Attention",
    uses: ["heads", "asker"],
    meaning: "What one head of one layer gives to every patch when a patch, or the token that the answer is read from, asks. Point at a patch.",
    has: (data) => data.layers.length > 0,
    make(data, see, point) {
      const maps = data.heads.get(see.layer);
      if (!maps) return { missing: see.layer };
      const asked = asking(data, see.layer, see, point);
      const who = see.head < 0 ? "Attention (mean of heads)" : `Attention of head ${Math.min(see.head, maps.cells.shape[0] - 1) + 1}`;
      return shown(data.layers[see.layer], headRow(maps, see.head, asked.tokens), asked, `Layer ${see.layer + 1}. ${who}`);
    },
  },
  rollout: {
    name: "Rollout",
    uses: ["depth", "asker"],
    meaning: "The attention of all layers up to a depth, multiplied, with the skip connections: where what is held there came from. It follows attention, not causes.",
    has: (data) => data.rollout !== null,
    make(data, see, point) {
      if (!data.depths) return shown(data.grid, { cells: data.rollout, prefix: 0 }, { named: `the ${data.query}` }, "All layers. Rollout");
      const depth = Math.min(see.depth, data.depths.length - 1);
      const asked = asking(data, depth, see, point);
      return shown(data.grid, depthRow(data.depths[depth], asked.tokens), asked, `Layers 1 to ${depth + 1}. Rollout`);
    },
  },
  positions: {
    name: "Positions",
    uses: [],
    meaning: "How alike the learned position of one patch is to every other’s: cosine, from −1 (dark) to 1 (pale). It belongs to the model, not to the image.",
    has: (data) => data.positions !== null,
    make(data, see, point) {
      const centre = { x: (data.box[0] + data.box[2]) / 2, y: (data.box[1] + data.box[3]) / 2 };
      const at = point ?? centre;
      const cell = cellAt(data, data.grid, at.x, at.y);
      const cells = positionRow(data.positions, cell.row, cell.column);
      return { grid: data.grid, cells, low: -1, high: 1, marked: { grid: data.grid, cell }, words: `Similarity of positions to ${spot(cell)}.` };
    },
  },
  colours: {
    name: "Features",
    uses: [],
    meaning: "What the last layer holds of each patch: three principal components as red, green and blue. Patches of like colour are alike to the model.",
    has: () => true,
    make: (data) => ({ grid: data.colours, rgb: data.colours.cells, words: "Principal components of the patch features." }),
  },
  activation: {
    name: "Class activation",
    uses: [],
    meaning: "What each place adds to the score of the most probable class, where it adds.",
    has: (data) => data.activation !== null,
    make(data) {
      const [rows, columns] = data.activation.cells.shape;
      const stride = [data.input.height / rows, data.input.width / columns];
      const grid = data.layers.find((layer) => layer.rows === rows && layer.columns === columns) ?? { rows, columns, stride };
      const high = Math.max(...data.activation.cells, 1e-9);
      return { grid, cells: data.activation.cells, low: 0, high, words: `What speaks for ${data.activation.label}.` };
    },
  },
  image: {
    name: "Image alone",
    uses: [],
    meaning: "The image as the model’s reader decoded it; what it does not see is dark.",
    has: () => true,
    make: () => ({ none: true, words: "" }),
  },
};
