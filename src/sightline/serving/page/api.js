// What is asked of the server, which is the only host that this page ever asks.

import { unpackedExplanation } from "./arrays.js";

async function post(path, item, parameters) {
  const form = new FormData();
  form.append("images", item.blob, item.name);
  const query = new URLSearchParams(parameters);
  let response;
  try {
    response = await fetch(`${path}?${query}`, { method: "POST", body: form });
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const later = response.headers.get("retry-after");
  const words = said?.error?.message ?? `The server refused with status ${response.status}.`;
  throw new Error(later ? `${words} (in ${later} s)` : words);
}

/** Facts about the models that are served. */
export async function models() {
  const response = await fetch("/v1/models");
  if (!response.ok) throw new Error("The server does not say which models it has.");
  return (await response.json()).models;
}

/** The answer and the explanation of one image, with its picture ready to be drawn. */
export async function explained(item, model) {
  const response = await post("/v1/explain", item, { model, top: 5 });
  const result = (await response.json()).results[0];
  if (result.error) throw new Error(`${item.name}: ${result.error}`);
  const data = unpackedExplanation(result.explanation);
  const bytes = Uint8Array.from(atob(data.picture.data), (letter) => letter.charCodeAt(0));
  const picture = await createImageBitmap(new Blob([bytes], { type: data.picture.type }));
  return { result, data, picture };
}

/** One more layer's maps, as they are sent. */
export async function layer(item, model, number) {
  const response = await post("/v1/explain", item, { model, top: 1, layers: number });
  return (await response.json()).results[0].explanation.heads[0];
}

/** All arrays of an explanation, as a file for NumPy. */
export async function arrays(item, model) {
  return (await post("/v1/explain", item, { model, format: "npz" })).blob();
}
