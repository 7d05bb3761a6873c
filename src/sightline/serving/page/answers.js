// The answer to an image, by the key that a task gives it in `results`; a new task adds one row here.

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export const ANSWERS = {
  predictions(rows) {
    const list = element("ol", { className: "answers" });
    for (const row of rows) {
      const bar = element("span", { className: "bar", ariaHidden: "true" });
      bar.style.width = `${100 * row.score}%`;
      const share = row.score < 0.0005 ? "under 0.1 %" : `${(100 * row.score).toFixed(1)} %`;
      list.append(element("li", {}, bar, element("span", { textContent: row.label }), element("b", { textContent: share })));
    }
    return list;
  },
};

/** What a result says, in one element for each kind of answer that is known here. */
export function answers(result) {
  return Object.keys(ANSWERS).filter((key) => key in result).map((key) => ANSWERS[key](result[key]));
}

/** The answer in few words, for who cannot see it. */
export function inWords(result) {
  const best = result.predictions?.[0];
  return best ? `${best.label}, ${(100 * best.score).toFixed(0)} percent` : "answered";
}
