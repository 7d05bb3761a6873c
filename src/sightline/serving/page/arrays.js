// Arrays as the server sends them, and the questions that a hand asks of them.

/** A typed array from its JSON form {dtype, shape, data}; `shape` stays with it. */
export function unpacked(array) {
  if (!array) return null;
  const text = atob(array.data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  const values = array.dtype === "uint8" ? bytes : new Float32Array(bytes.buffer);
  return Object.assign(values, { shape: array.shape });
}

/** An explanation with its arrays unpacked, heads and depths by their layer. */
export function unpackedExplanation(sent) {
  const heads = new Map();
  for (const layer of sent.heads) addHeads(heads, layer);
  const depths = sent.depths && sent.depths.map((depth) => ({ cells: unpacked(depth.cells), scale: unpacked(depth.scale) }));
  const activation = sent.activation && { ...sent.activation, cells: unpacked(sent.activation.cells) };
  const colours = { ...sent.colours, cells: unpacked(sent.colours.cells) };
  return { ...sent, heads, depths, activation, colours, rollout: unpacked(sent.rollout), positions: unpacked(sent.positions) };
}

/** Puts one layer's maps beside the others. */
export function addHeads(heads, sent) {
  heads.set(sent.layer, { cells: unpacked(sent.cells), scale: unpacked(sent.scale), prefix: unpacked(sent.prefix) });
}

/** The shares of all patches, and of the prefix tokens, when `tokens` of a layer ask; the mean over heads if head < 0. */
export function headRow(maps, head, tokens) {
  const [heads, n, patches] = maps.cells.shape;
  const prefixes = maps.prefix.shape[2];
  const cells = new Float32Array(patches);
  let prefix = 0;
  const asked = head < 0 ? [...Array(heads).keys()] : [Math.min(head, heads - 1)];
  const weight = 1 / (asked.length * tokens.length);
  for (const h of asked) {
    for (const token of tokens) {
      const row = h * n + token;
      const scale = (maps.scale[row] / 255) * weight;
      for (let i = 0; i < patches; i++) cells[i] += maps.cells[row * patches + i] * scale;
      for (let i = 0; i < prefixes; i++) prefix += (maps.prefix[row * prefixes + i] / 255) * weight;
    }
  }
  return { cells, prefix };
}

/** The shares of the finest patches in what `tokens` of a layer hold. */
export function depthRow(depth, tokens) {
  const patches = depth.cells.shape[1];
  const cells = new Float32Array(patches);
  for (const token of tokens) {
    const scale = depth.scale[token] / 255 / tokens.length;
    for (let i = 0; i < patches; i++) cells[i] += depth.cells[token * patches + i] * scale;
  }
  const given = cells.reduce((sum, value) => sum + value, 0);
  return { cells, prefix: Math.max(1 - given, 0) };
}

/** How alike the position of one cell is to every other's, from -1 to 1. */
export function positionRow(positions, row, column) {
  const [, columns, rows, across] = positions.shape;
  const size = rows * across;
  const start = (row * columns + column) * size;
  return Float32Array.from(positions.subarray(start, start + size), (value) => value / 127.5 - 1);
}
